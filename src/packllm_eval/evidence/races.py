"""Racing prefill on the arrays: what members read, and what that costs the likelihood of what follows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from packllm.decode.race import hopeless
from packllm_eval.evidence.methods import dropped, em, nll
from packllm_eval.evidence.show import table, versus

LEASTS = (0.01, 0.03, 0.05, 0.1)
CHUNKS = (64, 128)
PIECE = 16
"""Tokens in a row of a first chunk that is spread over the prompt."""

HEADINGS = [
    "text",
    "first chunk",
    "min_weight",
    "tokens read",
    "bits/byte against all read",
    "the same, both with adapt",
    "with adapt, against all read and min_weight 0.01",
    "best member dropped",
]


def racing(prompt: np.ndarray, least: float, chunk: int) -> tuple[np.ndarray, float]:
    """Which members read a prompt (K, t) to its end under the option race, and the share of tokens that was read."""
    members, tokens = prompt.shape
    left, read, end = np.ones(members, bool), 0, 0
    while end < tokens:
        start, end = end, min(2 * end or chunk, tokens)
        read += int(left.sum()) * (end - start)
        here = np.flatnonzero(left)
        if end < tokens and len(here) > 1:
            left[here[hopeless(prompt[here, :end], least)]] = False
    return left, read / (members * tokens)


def spread(prompt: np.ndarray, least: float, chunk: int) -> tuple[np.ndarray, float]:
    """As racing(), of one first chunk that is taken from all over the prompt. It is a text of its own, so those that go
    on read the prompt from its beginning. Its tokens have the probabilities here that they have in the prompt, with all
    that is before them: better than such a chunk could."""
    members, tokens = prompt.shape
    starts = np.linspace(0, max(0, tokens - PIECE), chunk // PIECE).astype(int)
    places = np.unique(np.concatenate([np.arange(start, min(start + PIECE, tokens)) for start in starts]))
    left = np.ones(members, bool)
    left[hopeless(prompt[:, places], least)] = False
    return left, (members * len(places) + int(left.sum()) * tokens) / (members * tokens)


def raced(texts: dict[str, list[tuple[np.ndarray, np.ndarray, int]]], spread_in: str) -> Iterator[str]:
    """The table.

    Args:
        texts: {heading: (prompt (K, t), what follows (K, n), bytes of it) of each row}.
        spread_in: the heading whose first chunks are spread, too.
    """
    lines = []
    for heading, rows in texts.items():
        prompts, answers = [prompt for prompt, _, _ in rows], [answer for _, answer, _ in rows]
        octets = np.array([size for *_, size in rows])
        whole = [em(prompt) for prompt in prompts]
        surest = nll(np.stack([dropped(full) for full in whole]), answers, True)
        ways = [(racing, chunk, str(chunk)) for chunk in CHUNKS]
        ways += [(spread, chunk, f"{chunk}, spread") for chunk in CHUNKS if heading == spread_in]
        for rule, chunk, told in ways:
            for least in LEASTS:
                left, shares = zip(*(rule(prompt, least, chunk) for prompt in prompts), strict=True)
                lost = sum(not some[full.argmax()] for some, full in zip(left, whole, strict=True))
                full = np.stack([dropped(weights, least) for weights in whole])
                kept = np.zeros_like(full)
                for row, (some, prompt) in enumerate(zip(left, prompts, strict=True)):
                    kept[row, some] = whole[row] if some.all() else em(prompt[some])
                    kept[row] = dropped(kept[row], least)
                moved = nll(kept, answers, True)
                pairs = [(nll(kept, answers), nll(full, answers)), (moved, nll(full, answers, True)), (moved, surest)]
                losses = [versus(a / np.log(2), b / np.log(2), octets, places=5) for a, b in pairs]
                lines.append([heading, told, f"{least:g}", f"{np.mean(shares):.3f}", *losses, str(lost)])
    if lines:
        yield f"## Racing prefill\n\n{table(HEADINGS, lines)}"
