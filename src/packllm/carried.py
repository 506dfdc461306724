"""Each member's perplexity and share of parts of a prompt, and its share of an answer's tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packllm.errors import PromptError, shown


def shares(weights: Mapping[str, float], logprobs: Mapping[str, float]) -> dict[str, float]:
    """Each member's share λ_k p_k / Σ λ_j p_j of the pack's probability of a token; the shares sum to 1.

    Args:
        weights: λ by name. Negative weights (DExperts) have share 0.
        logprobs: log p in nats, by name; a member that is missing has share 0. If all members with weight have
            probability 0, their shares are proportional to the weights.
    """
    positive = {name: value for name, value in weights.items() if value > 0 and name in logprobs}
    logs = {name: math.log(value) + logprobs[name] for name, value in positive.items()}
    peak = max(logs.values(), default=-math.inf)
    parts = {name: math.exp(log - peak) for name, log in logs.items()} if math.isfinite(peak) else positive
    total = math.fsum(parts.values())
    return {name: parts[name] / total if name in parts else 0.0 for name in weights}


@dataclass(frozen=True)
class Part:
    """A message or a marked passage of the prompt.

    Attributes:
        text: its text.
        scored: how many of its units were scored; a prompt's first unit has nothing before it, so it has no score.
        perplexity: {name: exp of the mean negative log-likelihood per unit} of this part alone, given everything
            before it; None for a member that did not score it.
        share: {name: mean over the units of λ_k p_k / Σ λ_j p_j}, under the final weights; they sum to 1. Empty if
            nothing was scored.
    """

    text: str
    scored: int
    perplexity: dict[str, float | None]
    share: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "scored": self.scored,
            "perplexity": {name: _safe(value) for name, value in self.perplexity.items()},
            "share": self.share,
        }


@dataclass(frozen=True)
class CarriedToken:
    """A token of the answer; in Cool-Fusion, a segment.

    Attributes:
        text: the text that it adds to the answer; a part of a character is shown as U+FFFD.
        logprob: fused, in nats (see TokenLogprob).
        share: {name: λ_k p_k / Σ λ_j p_j}; they sum to 1. A member that could not judge the token has 0.
        weights: {name: λ_k} at the time of its choice.
    """

    text: str
    logprob: float
    share: dict[str, float]
    weights: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        return {"text": self.text, "logprob": _safe(self.logprob), "share": self.share, "weights": self.weights}


def places(text: str, passages: Sequence[str], score_on: str | None = None) -> list[tuple[int, int]]:
    """Spans (start, end) of passages in the user's text, as far as it is scored (see the option score_on). A passage
    that is given twice gets its first and its second occurrence.

    Raises:
        PromptError: a passage does not occur.
    """
    spans: list[tuple[int, int]] = []
    for at, passage in enumerate(passages):
        start = max((end for (_, end), other in zip(spans, passages, strict=False) if other == passage), default=0)
        start = text.find(passage, start)
        if start < 0:
            where = "the user's text of the prompt"
            if score_on is not None:
                where = f"the scored text, score_on={shown(score_on)}"
            remedy = "give it word for word" if score_on is None else "leave out one of the two"
            raise PromptError(f"passages[{at}]={shown(passage)} does not occur (again) in {where}; {remedy}")
        spans.append((start, start + len(passage)))
    return spans


def part(text: str, weights: Mapping[str, float], columns: Mapping[str, Sequence[float]], units: Sequence[int]) -> Part:
    """Make the Part of a text.

    Args:
        text: the text.
        weights: final weights of all members, by name.
        columns: by name of each member that scored the text, the log-probabilities of its tokens or words.
        units: how many units each token or word counts as (its bytes, or 1).
    """
    count = sum(units)
    rows = [dict(zip(columns, column, strict=True)) for column in zip(*columns.values(), strict=True)]
    row_shares = [shares(weights, row) for row in rows]
    return Part(
        text,
        count,
        {name: _perplexity(columns[name], count) if name in columns and count else None for name in weights},
        {name: math.fsum(one[name] for one in row_shares) / len(row_shares) for name in weights} if row_shares else {},
    )


def _perplexity(logprobs: Sequence[float], count: int) -> float:
    mean = -math.fsum(logprobs) / count
    return math.exp(mean) if mean < 700 else math.inf


def _safe(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
