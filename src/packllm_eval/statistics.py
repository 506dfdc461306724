"""Bootstrap intervals and paired tests for means over documents or questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROUNDS = 2000


@dataclass(frozen=True)
class Interval:
    """An estimate with a percentile bootstrap interval (Efron 1979)."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def interval(
    values: Sequence[float], sizes: Sequence[float] | None = None, *, level: float = 0.95, seed: int = 0
) -> Interval:
    """The mean of `values`, or Σ values / Σ sizes, with an interval from resampled rows.

    Args:
        values: one number per row (a document's bits, 1 for a right answer); at least one.
        sizes: the denominator of each row (a document's bytes); None: 1.
        level: confidence level.
        seed: of the resampling.
    """
    sums, denominators = np.asarray(values, dtype=np.float64), np.ones(len(values))
    if sizes is not None:
        denominators = np.asarray(sizes, dtype=np.float64)
    samples = np.random.default_rng(seed).integers(0, len(sums), (ROUNDS, len(sums)))
    means = sums[samples].sum(1) / denominators[samples].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(sums.sum() / denominators.sum()), float(low), float(high))


def proportion(hits: Sequence[bool], *, seed: int = 0) -> Interval:
    """The share of hits with a 95 % interval. If all are equal, resampling has no spread: Wilson's interval (1927)."""
    if len({*hits}) > 1:
        return interval([float(hit) for hit in hits], seed=seed)
    rest = 1.96**2 / (len(hits) + 1.96**2)
    return Interval(1.0, 1 - rest, 1.0) if hits[0] else Interval(0.0, 0.0, rest)


@dataclass(frozen=True)
class Paired:
    """The difference a − b of two methods on the same rows, its interval, and the two-sided p-value of a sign-flip
    permutation test of no difference (Fisher 1935)."""

    difference: Interval
    p: float

    def as_dict(self) -> dict[str, float]:
        return {**self.difference.as_dict(), "p": self.p}


def paired(
    a: Sequence[float], b: Sequence[float], sizes: Sequence[float] | None = None, *, seed: int = 0, rounds: int = 10000
) -> Paired:
    """Compare two methods row by row; arguments as interval()."""
    delta = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), (rounds, len(delta)))
    as_far = np.abs(signs @ delta) >= abs(delta.sum()) - 1e-12
    return Paired(interval(delta.tolist(), sizes, seed=seed), float((as_far.sum() + 1) / (rounds + 1)))
