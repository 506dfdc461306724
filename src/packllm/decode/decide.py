"""Decisions: which of several labels the pack would answer with, and the probabilities of the pack and its members."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packllm.errors import OptionError, shown
from packllm.weights.result import Weights


@dataclass(frozen=True)
class Decision:
    """A choice among labels.

    Attributes:
        choice: the most likely label; the first among equals.
        probabilities: of each label, given that the answer begins with one of them; they sum to 1.
        weights: the members' weights.
        mass: the probability that the answer begins with any label; small if the prompt does not ask for one.
        members: {name: probabilities} of each member that ran, by itself.
        disagreement: Σ λ_k KL(member k || pack) in nats over the labels: 0 if all members agree. NaN if a weight is
            negative.
    """

    choice: str
    probabilities: dict[str, float]
    weights: Weights
    mass: float
    members: dict[str, dict[str, float]]
    disagreement: float

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON-safe values."""
        return {
            "choice": self.choice,
            "probabilities": self.probabilities,
            "weights": self.weights.as_dict(),
            "mass": self.mass,
            "members": self.members,
            "disagreement": None if math.isnan(self.disagreement) else self.disagreement,
        }


def check_choices(choices: Sequence[str]) -> list[str]:
    """The labels. Raise OptionError unless there are at least two, all different and none empty."""
    labels = choices if isinstance(choices, list | tuple) else ()
    if len(labels) < 2 or not all(isinstance(label, str) and label for label in labels):
        raise OptionError(f"choices={shown(choices)}: give a list of two or more labels that are not empty")
    if twice := next((label for at, label in enumerate(labels) if label in labels[:at]), None):
        raise OptionError(f"choices: {twice!r} is given twice; labels must differ")
    return list(labels)


def decision(
    labels: Sequence[str],
    fused: Sequence[float],
    members: Mapping[str, Sequence[float]],
    weights: Weights,
    empty: Sequence[float] | None = None,
) -> Decision:
    """Make a decision from log-likelihoods.

    A label may begin another one ("yes", "yes, but"). It then counts only for answers that do not continue as the
    longer label.

    Args:
        fused: the pack's log p(label), in nats.
        members: each member's.
        weights: of the pack.
        empty: the pack's log p(label) after an empty prompt; each label's probability is divided by it (contextual
            calibration, arXiv 2102.09690). `mass` and `members` are not changed by it.
    """
    exclusive = _alone(labels, fused)
    scores = exclusive if empty is None else [p - q for p, q in zip(exclusive, _alone(labels, empty), strict=True)]
    pack = _normalised(scores)
    plain = _normalised(exclusive)
    of_members = {name: _normalised(_alone(labels, member)) for name, member in members.items()}
    return Decision(
        labels[max(range(len(labels)), key=pack.__getitem__)],
        dict(zip(labels, pack, strict=True)),
        weights,
        math.fsum(math.exp(logprob) for logprob in exclusive),
        {name: dict(zip(labels, member, strict=True)) for name, member in of_members.items()},
        _disagreement(plain, of_members, weights),
    )


def _alone(labels: Sequence[str], logprobs: Sequence[float]) -> list[float]:
    """log p that a text begins with a label but with no longer label."""
    results = []
    for label, logprob in zip(labels, logprobs, strict=True):
        longer = [i for i, other in enumerate(labels) if other != label and other.startswith(label)]
        longest = [i for i in longer if not any(j != i and labels[i].startswith(labels[j]) for j in longer)]
        remainder = math.exp(logprob) - math.fsum(math.exp(logprobs[i]) for i in longest)
        results.append(logprob if not longest else math.log(remainder) if remainder > 0 else -math.inf)
    return results


def _normalised(logprobs: Sequence[float]) -> list[float]:
    peak = max(logprobs)
    if peak == -math.inf:
        return [1 / len(logprobs)] * len(logprobs)
    shares = [math.exp(logprob - peak) for logprob in logprobs]
    return [share / math.fsum(shares) for share in shares]


def _disagreement(pack: Sequence[float], members: Mapping[str, Sequence[float]], weights: Weights) -> float:
    if min(weights.values) < 0:
        return math.nan
    shares = dict(zip(weights.names, weights.values, strict=True))
    return math.fsum(
        shares[name] * p * (math.log(p) - math.log(max(q, 1e-300)))
        for name, member in members.items()
        for p, q in zip(member, pack, strict=True)
        if p > 0
    )
