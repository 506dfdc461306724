"""The tokens that the members of one family share, and one event for the end of an answer (METHODS §4).

Two tokenizers have one vocabulary if their text tokens are the same byte strings, by id or by a permutation of ids.
Added, special, pad and reserved tokens do not matter: a base model, its fine-tune with <pad>, and another with ChatML's
tokens are fused token by token. Control tokens that all members spell alike are shared too: tool calls and reasoning
need them.

One member may end its answers with </s> and another with <|im_end|>. The fused distribution has one END event for
both: a member's probability of END is the sum over its own end ids. Without it, end ids of different members would
cancel each other in the log pool, and answers would never end.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from packllm.align.vocabulary import Vocabulary

_known: dict[tuple, Shared] = {}
_MOST = 32


class Shared:
    """The shared tokens of several vocabularies of one family, as ids of the first vocabulary.

    Args:
        vocabularies: K vocabularies of one family.
        ends: each member's end ids.
        sizes: the number of ids, counted from 0, that each member gives log-probabilities of.

    Attributes:
        end: the id of the END event: one of the first member's end ids, or a new id where it has none.
        size: the number of ids of the fused distribution.
    """

    def __init__(
        self, vocabularies: Sequence[Vocabulary], ends: Sequence[Collection[int]], sizes: Sequence[int]
    ) -> None:
        self._ends = [sorted(i for i in own if i < size) for own, size in zip(ends, sizes, strict=True)]
        self.end = self._ends[0][0] if self._ends[0] else sizes[0]
        self.size = max(sizes[0], self.end + 1)
        spelled = [_spelled(*each) for each in zip(vocabularies, self._ends, sizes, strict=True)]
        common = set.intersection(*map(set, spelled))
        self._own = [{spelled[0][token]: own[token] for token in common} for own in spelled]
        self._first = [{own: first for first, own in ids.items()} for ids in self._own]
        self._gathers = [self._gather(ids) for ids in self._own]

    @classmethod
    def of(
        cls, vocabularies: Sequence[Vocabulary], ends: Sequence[Collection[int]], sizes: Sequence[int]
    ) -> Shared | None:
        """A cached instance; None if all members have the same ids and ends, so that nothing needs a mapping."""
        first = vocabularies[0]
        if len({frozenset(own) for own in ends}) == 1 and all(one.same_as(first) for one in vocabularies[1:]):
            return None
        key = (*((one.fingerprint, one.family) for one in vocabularies), *map(frozenset, ends), *sizes)
        if key not in _known:
            while len(_known) >= _MOST:
                _known.pop(next(iter(_known)), None)
            _known[key] = cls(vocabularies, ends, sizes)
        return _known[key]

    def _gather(self, own: dict[int, int]) -> tuple[Tensor, Tensor]:
        """The member's own id of each shared id, and a mask of the ids that it does not have."""
        ids, absent = torch.zeros(self.size, dtype=torch.long), torch.ones(self.size, dtype=torch.bool)
        places = torch.tensor(list(own), dtype=torch.long)
        ids[places] = torch.tensor(list(own.values()), dtype=torch.long)
        absent[places] = False
        return ids, absent

    def rows(self, member: int, logprobs: Tensor) -> Tensor:
        """Map a member's log-probabilities (..., V) to the shared ids and END: (..., size)."""
        ids, absent = (part.to(logprobs.device) for part in self._gathers[member])
        gathered = logprobs.index_select(-1, ids).masked_fill(absent, -torch.inf)
        if self._ends[member]:
            gathered[..., self.end] = logprobs[..., self._ends[member]].logsumexp(-1)
        return gathered

    def own(self, member: int, ids: Sequence[int]) -> list[int]:
        """Map shared ids to a member's own."""
        return [self._own[member][i] for i in ids]

    def first(self, member: int, ids: Sequence[int]) -> list[int]:
        """Map a member's own ids to the first member's; -1 where an id is not shared."""
        return [self._first[member].get(i, -1) for i in ids]


def _spelled(vocabulary: Vocabulary, ends: Collection[int], size: int) -> dict[tuple[bytes, bool], int]:
    """Ids by (spelling, whether it is text); the first of equal tokens. End, bos, pad and unk tokens are left out: they
    spell no part of a text."""
    excluded = {*ends, *(vocabulary.special.get(role) for role in ("bos", "pad", "unk", "eos"))}
    id_of: dict[tuple[bytes, bool], int] = {}
    for i, token in enumerate(vocabulary.tokens[:size]):
        if token and i not in excluded and i not in vocabulary.unused:
            id_of.setdefault((token, vocabulary.is_text(i)), i)
    return id_of


def overlap(one: Vocabulary, other: Vocabulary) -> float:
    """The share of text tokens that both vocabularies have, among those that either has."""
    return len(one.spelled & other.spelled) / max(1, len(one.spelled | other.spelled))
