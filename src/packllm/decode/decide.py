"""Decisions: which of several labels the pack would answer with, and the probabilities of the pack and its members."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packllm.chat.messages import check_unicode, says_nothing
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


Longer = Sequence[Collection[int]]
"""For each label, the indices of the labels that it begins."""


def check_choices(choices: Sequence[str]) -> list[str]:
    """The labels. Raise OptionError unless there are at least two, all different and none blank."""
    labels = choices if isinstance(choices, list | tuple) else ()
    if len(labels) < 2 or not all(isinstance(label, str) and not says_nothing(label) for label in labels):
        raise OptionError(f"choices={shown(choices)}: give a list of two or more labels that are not empty")
    if twice := next((label for at, label in enumerate(labels) if label in labels[:at]), None):
        raise OptionError(f"choices: {twice!r} is given twice; labels must differ")
    for at, label in enumerate(labels):
        check_unicode(label, f"choices[{at}]")
    return list(labels)


def decision(
    labels: Sequence[str],
    fused: Sequence[float],
    members: Mapping[str, Sequence[float]],
    weights: Weights,
    empty: Sequence[float] | None = None,
    longer: Mapping[str, Longer] | None = None,
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
        longer: by member, which labels begin which in its tokens (see begun). None: as in their texts.
    """
    by_member = longer or dict.fromkeys(weights.names, begun(labels))
    running = [by_member[name] for name, value in zip(weights.names, weights.values, strict=True) if value]
    in_all = [set.intersection(*map(set, others)) for others in zip(*running, strict=True)]
    exclusive = _alone(fused, in_all)
    scores = exclusive
    if empty is not None:
        scores = [_ratio(p, q) for p, q in zip(exclusive, _alone(empty, in_all), strict=True)]
    pack = _normalised(scores)
    plain = _normalised(exclusive)
    of_members = {name: _normalised(_alone(member, by_member[name])) for name, member in members.items()}
    return Decision(
        labels[max(range(len(labels)), key=pack.__getitem__)],
        dict(zip(labels, pack, strict=True)),
        weights,
        math.fsum(math.exp(logprob) for logprob in exclusive),
        {name: dict(zip(labels, member, strict=True)) for name, member in of_members.items()},
        _disagreement(plain, of_members, weights),
    )


def begun(labels: Sequence[str], ids: Sequence[Sequence[int]] = ()) -> Longer:
    """Which labels each label begins.

    Args:
        ids: their tokens. A label whose tokens do not begin those of a longer label is a different answer: "no" where
            "nothing" is one token. Empty: only the texts are compared.
    """

    def begins(i: int, j: int) -> bool:
        in_tokens = not ids or (len(ids[i]) < len(ids[j]) and list(ids[j][: len(ids[i])]) == list(ids[i]))
        return labels[i] != labels[j] and labels[j].startswith(labels[i]) and in_tokens

    rows = range(len(labels))
    return [[j for j in rows if begins(i, j)] for i in rows]


def _alone(logprobs: Sequence[float], longer: Longer) -> list[float]:
    """log p that a text begins with a label but with no longer label."""
    results = []
    for logprob, others in zip(logprobs, longer, strict=True):
        if not others or logprob == -math.inf:
            results.append(logprob)
            continue
        shortest = [j for j in others if not any(j in longer[i] for i in others)]
        # As a share of p(label), because p of a label of many tokens is too small for a float.
        share = math.fsum(math.exp(min(logprobs[j] - logprob, 0.0)) for j in shortest)
        results.append(logprob + math.log1p(-share) if share < 1 else -math.inf)
    return results


def _ratio(logprob: float, empty: float) -> float:
    """log p / q. A label that the prompt rules out stays ruled out."""
    return logprob if logprob == -math.inf else logprob - empty


def _normalised(logprobs: Sequence[float]) -> list[float]:
    peak = max(logprobs)
    if not math.isfinite(peak):  # no label has any probability, or the empty prompt rules some out
        return [float(one == peak) / logprobs.count(peak) for one in logprobs]
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
