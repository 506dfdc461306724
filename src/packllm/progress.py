"""Progress bars: none for work that takes less than two seconds, none without a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SLOW = 2.0
"""Seconds of work before its bar appears."""


@contextmanager
def bars_if_slow() -> Iterator[None]:
    """Let transformers' progress bars appear only for slow work; a tqdm hook that is already set is kept."""
    from transformers.utils import logging

    def patient(make: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        options = {**options, "delay": SLOW, "disable": options.get("disable") or None}
        return make(*args, **options) if before is None else before(make, args, options)

    before = logging.set_tqdm_hook(patient)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)
