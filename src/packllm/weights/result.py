"""Weights: what a weighting returns and every answer carries."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from packllm.explanation import Explanation

Pool = Literal["linear", "log"]
Unit = Literal["token", "byte", "word"]


@dataclass(frozen=True)
class Weights:
    """What each member counts for, in member order.

    Attributes:
        values: the weights; they sum to 1, and only log-pool weights may be negative (DExperts). Those of an answer
            that adapts are of what comes next; the NLLs are of the prompt all the same.
        names: the members' names.
        pool: how the members fuse: "linear" (mixture, METHODS Eq. 8) or "log" (PackLLM Eq. 1).
        nll: each member's mean negative log-likelihood of the scored text, in nats per `unit` (Eq. 2);
            None for a member that was not scored, and for all where nothing could be scored.
        unit: what `nll` and `fused_nll` are counted per.
        strategy: the weighting's name, "fixed" for a mapping.
        fused_nll: NLL of the fused pack on the scored text under `values`, where the weighting computes it.
        gap: upper bound in nats per token on how far `fused_nll` is from the optimum (exact, map).
        scored: number of units the NLLs are means of.
        start: what `values` were when the answer began, where they have moved since.
        path: what they were at the start of every 16 tokens of the answer, where they move and that was asked for.
        explanation: of Pack.weigh with `explain`: what members gave each message and passage. Answers have their own.
    """

    values: tuple[float, ...]
    names: tuple[str, ...]
    pool: Pool
    nll: tuple[float | None, ...]
    unit: Unit
    strategy: str
    fused_nll: float | None = None
    gap: float | None = None
    scored: int = 0
    start: tuple[float, ...] | None = None
    path: tuple[tuple[float, ...], ...] | None = None
    explanation: Explanation | None = None

    @property
    def at_start(self) -> Weights:
        """What they were when the answer began."""
        return self if self.start is None else replace(self, values=self.start, start=None, path=None)

    @property
    def perplexity(self) -> tuple[float | None, ...]:
        """exp(nll) of each member, per `unit`."""
        return tuple(None if n is None else math.exp(n) if n < 700 else math.inf for n in self.nll)

    @property
    def top(self) -> str:
        """Name of the member with the largest weight (the first of equals)."""
        return self.names[max(range(len(self.values)), key=self.values.__getitem__)]

    @property
    def note(self) -> str | None:
        """Why nothing was scored, where nothing was; None elsewhere."""
        if self.scored or self.strategy == "fixed":
            return None
        alike = "all members count the same" if len({*self.values}) == 1 else "the prior alone counts"
        return (
            f"nothing was scored, so {alike}: a model predicts tokens from those before them, and "
            "of the text that is scored none has one before it that all members share; give a longer text"
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-safe: non-finite numbers become None."""

        def safe(number: float | None) -> float | None:
            return number if number is not None and math.isfinite(number) else None

        return {
            "strategy": self.strategy,
            "pool": self.pool,
            "unit": self.unit,
            "scored": self.scored,
            "names": list(self.names),
            "weights": list(self.values),
            "nll": [safe(n) for n in self.nll],
            "perplexity": [safe(p) for p in self.perplexity],
            "fused_nll": safe(self.fused_nll),
            "gap": safe(self.gap),
            "note": self.note,
            "start": None if self.start is None else list(self.start),
            "path": None if self.path is None else [list(row) for row in self.path],
            **({} if self.explanation is None else {"explanation": self.explanation.as_dict()}),
        }
