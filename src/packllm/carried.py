"""What members gave parts of a prompt, and who carried the tokens of an answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packllm.errors import PromptError, shown


def shares(weights: Mapping[str, float], logprobs: Mapping[str, float]) -> dict[str, float]:
    """Each member's share λ_k p_k / Σ λ_j p_j of what the pack gave a token; they sum to 1.

    Args:
        weights: λ by name. Below 0 (DExperts) it carries nothing.
        logprobs: log p in nats, by name; a member that is not there has share 0. Where all that have a weight gave
            nothing, the weights are the shares.
    """
    carried = {name: value for name, value in weights.items() if value > 0 and name in logprobs}
    logs = {name: math.log(value) + logprobs[name] for name, value in carried.items()}
    peak = max(logs.values(), default=-math.inf)
    parts = {name: math.exp(log - peak) for name, log in logs.items()} if math.isfinite(peak) else carried
    total = math.fsum(parts.values())
    return {name: parts[name] / total if name in parts else 0.0 for name in weights}


@dataclass(frozen=True)
class Part:
    """A message or a marked passage of the prompt.

    Attributes:
        text: its text.
        scored: how many units of it were scored; the first of a prompt has nothing before it to predict it by.
        perplexity: {name: exp of the mean negative log-likelihood per unit}, of this part alone, after all that is
            before it; None for a member that did not score it.
        share: {name: mean over the units of λ_k p_k / Σ λ_j p_j}, under the final weights; they sum to 1. Empty where
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
        text: what it adds to the answer; part of a character is shown as U+FFFD.
        logprob: fused, in nats (see TokenLogprob).
        share: {name: λ_k p_k / Σ λ_j p_j}; they sum to 1. A member that could not judge it has 0.
        weights: {name: λ_k} when it was chosen.
    """

    text: str
    logprob: float
    share: dict[str, float]
    weights: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        return {"text": self.text, "logprob": _safe(self.logprob), "share": self.share, "weights": self.weights}


def places(text: str, passages: Sequence[str]) -> list[tuple[int, int]]:
    """Where passages are in the user's text; one that is given twice, where it is for the first and the second time.

    Raises:
        PromptError: one is not there.
    """
    found: list[tuple[int, int]] = []
    for at, passage in enumerate(passages):
        start = max((end for (_, end), other in zip(found, passages, strict=False) if other == passage), default=0)
        start = text.find(passage, start)
        if start < 0:
            raise PromptError(
                f"passages[{at}]={shown(passage)} does not occur (again) in the user's text of the prompt; give it "
                f"word for word"
            )
        found.append((start, start + len(passage)))
    return found


def part(text: str, weights: Mapping[str, float], columns: Mapping[str, Sequence[float]], units: Sequence[int]) -> Part:
    """A part of a prompt.

    Args:
        text: its text.
        weights: final ones of all members, by name.
        columns: of each member that scored it, log-probabilities of its tokens or words.
        units: what each of these counts for (its bytes, or 1).
    """
    count = sum(units)
    rows = [dict(zip(columns, column, strict=True)) for column in zip(*columns.values(), strict=True)]
    carried = [shares(weights, row) for row in rows]
    return Part(
        text,
        count,
        {name: _perplexity(columns[name], count) if name in columns and count else None for name in weights},
        {name: math.fsum(one[name] for one in carried) / len(carried) for name in weights} if carried else {},
    )


def _perplexity(logprobs: Sequence[float], count: int) -> float:
    mean = -math.fsum(logprobs) / count
    return math.exp(mean) if mean < 700 else math.inf


def _safe(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
