"""Weight merging: several members of one shape averaged into a single one (Wortsman et al. 2022, arXiv 2203.05482;
the baseline of PackLLM §6, Table 3C). One forward a token, whatever the number of members."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from packllm.engines.member import Member
from packllm.errors import LoadError


def average(members: Sequence[Member], name: str = "average") -> Member:
    """A member whose weights are the mean of the given members' weights; they stay as they are.

    LoRA experts of one base merge like any others: the mean of W + B_k A_k.

    Raises:
        LoadError: fewer than two members, other vocabularies, or weights that differ in name or shape.
    """
    if len(members) < 2:
        raise LoadError("merging takes at least two members")
    first = members[0]
    for member in members[1:]:
        if not member.vocabulary.same_as(first.vocabulary):
            raise LoadError(
                f"members {first.name!r} and {member.name!r} have different vocabularies; fuse them instead"
            )
    own = first.merged().state_dict()
    mean = {key: weight.float() / len(members) for key, weight in own.items()}
    for member in members[1:]:
        weights = member.merged().state_dict()
        _require_one_shape(first, own, member, weights)
        for key, weight in weights.items():
            mean[key] += weight.to(mean[key].device).float() / len(members)
    model = copy.deepcopy(first.merged())
    with torch.no_grad():
        model.load_state_dict(mean)
    return Member(model, first.tokenizer, name, first.encoder)


def _require_one_shape(first: Member, own: dict[str, Any], other: Member, weights: dict[str, Any]) -> None:
    for key in {**own, **weights}:
        shapes = [tuple(w[key].shape) if key in w else "absent" for w in (own, weights)]
        if shapes[0] != shapes[1]:
            raise LoadError(
                f"members {first.name!r} and {other.name!r} cannot be merged: {key} is {shapes[0]} in one and "
                f"{shapes[1]} in the other; fuse them instead"
            )
