"""Weight merging: several members of one shape averaged into a single one (Wortsman et al. 2022, arXiv 2203.05482;
the baseline of PackLLM §6, Table 3C). One forward a token, whatever the number of members."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from packllm.errors import LoadError
from packllm.member import Member


def average(members: Sequence[Member], name: str = "average") -> Member:
    """A member whose weights are the mean of the given members' weights.

    LoRA experts of one base merge like any others: the mean of W + B_k A_k. What all members share stays
    shared.

    Raises:
        LoadError: fewer than two members, other vocabularies, or weights that differ in name or shape.
    """
    if len(members) < 2:
        raise LoadError("merging takes at least two members")
    first = members[0]
    own = first.model.state_dict()
    others = []
    for member in members[1:]:
        if not member.vocabulary.same_as(first.vocabulary):
            raise LoadError(
                f"members {first.name!r} and {member.name!r} have different vocabularies; fuse them instead"
            )
        weights = member.model.state_dict()
        for key in {**own, **weights}:
            shapes = [tuple(w[key].shape) if key in w else "absent" for w in (own, weights)]
            if shapes[0] != shapes[1]:
                raise LoadError(
                    f"members {first.name!r} and {member.name!r} cannot be merged: {key} is {shapes[0]} in one and "
                    f"{shapes[1]} in the other; fuse them instead"
                )
        others.append(weights)
    shared = [*first.model.parameters(), *first.model.buffers()]
    model = copy.deepcopy(first.model, {id(tensor): tensor for tensor in shared})
    for key, parameter in dict(model.named_parameters()).items():
        parts = [own[key], *(weights[key] for weights in others)]
        if all(part.data_ptr() == parts[0].data_ptr() for part in parts):
            continue
        mean = sum(part.to(parameter.device).float() for part in parts) / len(parts)
        module = model.get_submodule(key.rpartition(".")[0])
        setattr(module, key.rpartition(".")[2], torch.nn.Parameter(mean.to(parameter.dtype), requires_grad=False))
    return Member(model, first.tokenizer, name, first.encoder)
