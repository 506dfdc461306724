"""Weights of one prompt, from the scores of the members that read it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from packllm.chat.prompt import Encoded
from packllm.decode.line import Line
from packllm.decode.remote import ServerLine
from packllm.engines.member import Author, Member
from packllm.errors import WeightsError
from packllm.options import Options
from packllm.weights import Weights
from packllm.weights.common import Common, in_common
from packllm.weights.scoring import weights_of
from packllm.weights.unscored import check_unscored, joined


@dataclass(frozen=True)
class Reading:
    """One prompt with the results of the members that read it. All mappings have member indices as keys, in the same
    order.

    Attributes:
        members: the members.
        lines: each member's line, with the prompt in its KV cache.
        encoded: the prompt in each member's tokens.
        scores: log-probabilities of the scored tokens, float64 (n,); None if a member cannot score, or if the scores
            are computed together with the weights.
    """

    members: Mapping[int, Author]
    lines: Mapping[int, Line | ServerLine]
    encoded: Mapping[int, Encoded]
    scores: Mapping[int, Tensor | None]

    def evidence(self) -> tuple[Sequence[int], Common]:
        """Indices of the members that scored the prompt, and their scores in a common unit."""
        scored = [k for k, score in self.scores.items() if score is not None]
        if not scored:
            return (), Common(torch.empty(0, 0), [], None, [], None)
        members: list[Any] = [self.members[k] for k in scored]
        return scored, in_common(members, [self.encoded[k] for k in scored], [self.scores[k] for k in scored])

    def weigh(self, options: Options) -> Weights:
        """The weights of these members, in this order."""
        judges = [k for k, score in self.scores.items() if score is not None or isinstance(self.members[k], Member)]
        if len(judges) < len(self.members):
            return self._joined(judges, options)
        lines = list(self.lines.values())
        check_unscored(options, [line.member.name for line in lines if isinstance(line, ServerLine)])
        members: list[Any] = list(self.members.values())
        sequences = [line.sequence for line in lines if isinstance(line, Line)]
        return weights_of(members, sequences, list(self.encoded.values()), list(self.scores.values()), options)

    def _joined(self, judges: Sequence[int], options: Options) -> Weights:
        """Combine the weights if only the judges can score the prompt."""
        names, scored = [member.name for member in self.members.values()], [self.members[k].name for k in judges]
        check_unscored(options, [name for name in names if name not in scored])
        uniform = options.model_copy(update={"weighting": "uniform"})  # fixed weights are for all members
        alone = uniform if isinstance(options.weighting, dict) else options
        return joined(self.of(judges).weigh(alone) if judges else None, names, scored, options)

    def of(self, which: Sequence[int]) -> Reading:
        """The same prompt, restricted to some members."""
        return Reading(
            {k: self.members[k] for k in which},
            {k: self.lines[k] for k in which},
            {k: self.encoded[k] for k in which},
            {k: self.scores[k] for k in which},
        )


def renormalised(options: Options, names: Sequence[str]) -> Options:
    """The options, with fixed weights renormalized over the members with these names."""
    if not isinstance(options.weighting, dict) or len(names) == len(options.weighting):
        return options
    left = {name: options.weighting[name] for name in names}
    total = math.fsum(left.values())
    if total <= 0:
        raise WeightsError(f"weighting={left!r} remains after members failed; the weights must sum to more than 0")
    return options.model_copy(update={"weighting": {name: value / total for name, value in left.items()}})


def over_all(weights: Weights, which: Sequence[int], names: Sequence[str]) -> Weights:
    """Extend the weights of some members to all: the others have weight 0 and no NLL."""
    values = [0.0] * len(names)
    nll: list[float | None] = [None] * len(names)
    for k, value, score in zip(which, weights.values, weights.nll, strict=True):
        values[k], nll[k] = value, score
    return replace(weights, names=tuple(names), values=tuple(values), nll=tuple(nll))
