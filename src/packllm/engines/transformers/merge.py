"""Weight merging: the mean of several members with equal shapes (Wortsman et al. 2022, arXiv 2203.05482; the baseline
of PackLLM §6, Table 3C). One forward pass per token, whatever the number of members."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from packllm.engines.member import Member
from packllm.errors import LoadError


def average(members: Sequence[Member], name: str = "average") -> Member:
    """A member whose weights are the mean of those of the given members, which are not changed.

    This includes LoRA experts of one base: the mean of W + B_k A_k.

    Raises:
        LoadError: fewer than two members, different vocabularies, or weights that differ in name or shape.
    """
    if len(members) < 2:
        raise LoadError(f"merging takes at least two members, not {len(members)}; give more")
    first = members[0]
    for member in members[1:]:
        if not member.vocabulary.same_as(first.vocabulary):
            raise LoadError(
                f"members {first.name!r} and {member.name!r} have different vocabularies; fuse them instead"
            )
    reference = first.merged().state_dict()
    mean = {key: weight.float() / len(members) for key, weight in reference.items()}
    for member in members[1:]:
        weights = member.merged().state_dict()
        _require_one_shape(first, reference, member, weights)
        for key, weight in weights.items():
            mean[key] += weight.to(mean[key].device).float() / len(members)
    model = copy.deepcopy(first.merged())
    with torch.no_grad():
        model.load_state_dict(mean)
    return Member(model, first.tokenizer, name, first.encoder)


def _require_one_shape(first: Member, reference: dict[str, Any], other: Member, weights: dict[str, Any]) -> None:
    for key in {**reference, **weights}:
        shapes = [tuple(w[key].shape) if key in w else "absent" for w in (reference, weights)]
        if shapes[0] != shapes[1]:
            raise LoadError(
                f"members {first.name!r} and {other.name!r} cannot be merged: {key} is {shapes[0]} in one and "
                f"{shapes[1]} in the other; fuse them instead"
            )
