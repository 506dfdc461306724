"""Tables in Markdown, and differences with intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from packllm_eval.statistics import interval


def table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(["| " + " | ".join(line) + " |" for line in [headings, ["---"] * len(headings), *lines]])


def versus(a: np.ndarray, b: np.ndarray, sizes: np.ndarray | None = None, places: int = 4) -> str:
    """a − b on the same rows, with a 95 % bootstrap interval."""
    found = interval((a - b).tolist(), None if sizes is None else sizes.tolist())
    return f"{found.value:+.{places}f} [{found.low:+.{places}f}, {found.high:+.{places}f}]"
