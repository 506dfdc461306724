"""Members at the ends of given ids, without a request around them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from packllm import Member
from packllm.decode.line import Line, open_lines
from packllm.engines.prefix import PrefixCache

K = TypeVar("K", bound=Hashable)


def lines(asked: Mapping[K, tuple[Member, Sequence[int]]]) -> dict[K, Line]:
    """Members after ids, read together."""
    opened, _, failed = open_lines({key: (member.open(), member, ids, ()) for key, (member, ids) in asked.items()})
    for error in failed.values():
        raise error
    return opened


def line(member: Member, ids: Sequence[int]) -> Line:
    """A member after ids."""
    return lines({None: (member, ids)})[None]


def scored(
    member: Member,
    ids: Sequence[int],
    positions: Sequence[int] | None = None,
    prefixes: PrefixCache | None = None,
    keep: bool = False,
) -> tuple[Line, Tensor]:
    """A member after ids; float64, the log-probabilities of those at some positions, of all but the first if None.
    `keep`: with the hidden states that they are made of."""
    positions = range(1, len(ids)) if positions is None else positions
    sequence = member.open(prefixes)
    if keep:
        member.engine.keep_hidden(sequence)
    opened, scores, failed = open_lines({None: (sequence, member, ids, list(positions))})
    for error in failed.values():
        raise error
    return opened[None], scores[None]
