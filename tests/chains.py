"""Members over five tokens whose next token depends on the last one alone, and the test of what a pack draws.

All that a pack of them draws after the token a has the distribution fused from the members' rows for a, whatever came
before: the draws after the first `VISITS` visits of a are independent. For five tokens the total variation distance of
the frequencies from the truth exceeds ε with odds below 2^5 · exp(-2 · VISITS · ε²) (Bretagnolle, Huber and Carol).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from lines import lines
from scripted import follows, llama3_like

from packllm import Member
from packllm.decode.sampling import make_sampler
from packllm.decode.tokens import Ensemble, Row
from packllm.weights.result import Weights

LETTERS = "abcde"
VISITS = 400
MARGIN = 0.16
"""Odds below 32 · exp(-20) < 7e-8 for each of the five states."""

TABLES = [
    {
        "a": [0.1, 0.6, 0.1, 0.1, 0.1],
        "b": [0.2, 0.1, 0.5, 0.1, 0.1],
        "c": [0.05, 0.15, 0.1, 0.65, 0.05],
        "d": [0.1, 0.1, 0.1, 0.2, 0.5],
        "e": [0.4, 0.1, 0.1, 0.2, 0.2],
    },
    {
        "a": [0.3, 0.05, 0.05, 0.3, 0.3],
        "b": [0.1, 0.6, 0.1, 0.1, 0.1],
        "c": [0.6, 0.1, 0.1, 0.1, 0.1],
        "d": [0.25, 0.25, 0.25, 0.05, 0.2],
        "e": [0.05, 0.05, 0.6, 0.25, 0.05],
    },
    {
        "a": [0.05, 0.05, 0.8, 0.05, 0.05],
        "b": [0.7, 0.05, 0.05, 0.1, 0.1],
        "c": [0.1, 0.1, 0.1, 0.1, 0.6],
        "d": [0.2, 0.2, 0.2, 0.2, 0.2],
        "e": [0.1, 0.7, 0.1, 0.05, 0.05],
    },
]


def chain_members() -> list[Member]:
    """One for each of TABLES."""
    tokenizer = llama3_like(list(LETTERS))
    rows = [{a: dict(zip(LETTERS, row, strict=True)) for a, row in table.items()} for table in TABLES]
    return [follows(tokenizer, row, f"chain-{k}") for k, row in enumerate(rows)]


def fused_table(values: Sequence[float], pool: str) -> dict[str, list[float]]:
    """The rows that the members' rows fuse to, by the definition."""
    fused = {}
    for a in LETTERS:
        parts = [table[a] for table in TABLES]
        if pool == "linear":
            fused[a] = [sum(w * p[i] for w, p in zip(values, parts, strict=True)) for i in range(5)]
        else:
            powers = [math.prod(p[i] ** w for w, p in zip(values, parts, strict=True)) for i in range(5)]
            fused[a] = [power / sum(powers) for power in powers]
    return fused


def distance(p: Sequence[float], q: Sequence[float]) -> float:
    """Total variation."""
    return sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2


def run(
    members: Sequence[Member],
    values: Sequence[float],
    pool: str,
    decode: Callable[[Ensemble, list[Row]], Iterator[tuple[int, int]]],
    count: int = 32,
    length: int = 140,
    **filters: float,
) -> tuple[list[str], list[Row]]:
    """What `count` rows draw, each with a seed of its own, as letters; all start after "a"."""
    ids = {next(iter(members[0].encoder.plain(letter))): letter for letter in LETTERS}
    start = next(i for i, letter in ids.items() if letter == "a")
    at_start = lines({(k, r): (member, [start]) for k, member in enumerate(members) for r in range(count)})
    weights = Weights(tuple(values), tuple(m.name for m in members), pool, (None,) * len(members), "token", "fixed")
    settings = {"temperature": 1.0, "top_p": 1.0, "top_k": None} | filters
    rows = [Row(weights, make_sampler(**settings, seed=seed), limit=length) for seed in range(count)]
    drawn: list[list[str]] = [["a"] for _ in rows]
    for r, token in decode(Ensemble(at_start, rows), rows):
        drawn[r].append(ids[token])
        rows[r].done = len(drawn[r]) > length
    return ["".join(letters) for letters in drawn], rows


def distances(drawn: Sequence[str], expected: dict[str, list[float]], visits: int = VISITS) -> dict[str, float]:
    """For each state, how far the frequencies after its first visits are from what is expected."""
    found = {}
    for a in LETTERS:
        after = [text[i + 1] for text in drawn for i in range(len(text) - 1) if text[i] == a][:visits]
        assert len(after) == visits
        found[a] = distance([after.count(letter) / visits for letter in LETTERS], expected[a])
    return found
