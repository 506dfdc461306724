"""Weights: the result of a weighting, and part of every answer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from packllm.explanation import Explanation

Pool = Literal["linear", "log"]
Unit = Literal["token", "byte", "word"]


@dataclass(frozen=True)
class Weights:
    """Each member's weight, in member order.

    Attributes:
        values: the weights; they sum to 1, and only log-pool weights may be negative (DExperts). In an answer with
            adaptive weights they are those for the next token; the NLLs are still those of the prompt.
        names: the members' names.
        pool: how the members are fused: "linear" (mixture, METHODS Eq. 8) or "log" (PackLLM Eq. 1).
        nll: each member's mean negative log-likelihood of the scored text, in nats per `unit` (Eq. 2); None for a
            member that was not scored, and for all members if nothing could be scored.
        unit: the unit of `nll` and `fused_nll`.
        strategy: the weighting's name, "fixed" for a mapping.
        fused_nll: NLL of the fused pack on the scored text under `values`, if the weighting computes it.
        gap: upper bound, in nats per token, of the distance of `fused_nll` from the optimum (exact, map).
        scored: number of units that the NLLs are averaged over.
        start: `values` before the answer, if adaptive weights have changed since.
        path: `values` at the start of every 16 tokens of the answer, if weights adapt and `weight_path` is set.
        explanation: only from Pack.weigh with `explain`: the members' perplexities of each message and passage.
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
        """The weights from before the answer."""
        return self if self.start is None else replace(self, values=self.start, start=None, path=None)

    @property
    def perplexity(self) -> tuple[float | None, ...]:
        """Each member's perplexity, exp(nll), per `unit`."""
        return tuple(None if n is None else math.exp(n) if n < 700 else math.inf for n in self.nll)

    @property
    def top(self) -> str:
        """Name of the member with the largest weight (the first among equals)."""
        return self.names[max(range(len(self.values)), key=self.values.__getitem__)]

    @property
    def note(self) -> str | None:
        """Why nothing was scored, in words; None if something was."""
        if self.scored or self.strategy == "fixed":
            return None
        alike = "all members have the same weight" if len({*self.values}) == 1 else "only the prior counts"
        return (
            f"nothing was scored, so {alike}: a model predicts a token only from tokens before it, and no token of the "
            "scored text has one that all members share; give a longer text"
        )

    def as_dict(self) -> dict[str, Any]:
        """A JSON-safe dict; non-finite numbers become None."""

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
