"""The tokens that members of one family share, and one event for the end of an answer (METHODS §4).

Two tokenizers are one vocabulary if their text tokens are the same byte strings, by id or by a permutation of ids.
Added, special, pad and reserved tokens do not matter: a base, its fine-tune with <pad>, and another with ChatML's
tokens fuse token by token. A control token that all of them spell alike stays, so that calls and thoughts can be
written.

Where one member ends its answers with </s> and another with <|im_end|>, the fused distribution has one event for
both: each member's probability of it is the sum over its own end ids. In the log pool they would otherwise rule each
other out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from packllm.align.vocabulary import Vocabulary

_known: dict[tuple, Shared] = {}
_MOST = 32


class Shared:
    """What several vocabularies of one family have in common, in the ids of the first.

    Args:
        vocabularies: K of one family.
        ends: each member's end ids.
        sizes: of each member, how many first ids it gives log-probabilities of.

    Attributes:
        end: the id of the END event: one of the first member's end ids, or one more id where it has none.
        size: ids of the fused distribution.
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
        """The same, kept for the next request; None where all have the same ids and ends: nothing is to be mapped."""
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
        """For each shared id the member's own, and where there is none."""
        ids, absent = torch.zeros(self.size, dtype=torch.long), torch.ones(self.size, dtype=torch.bool)
        places = torch.tensor(list(own), dtype=torch.long)
        ids[places] = torch.tensor(list(own.values()), dtype=torch.long)
        absent[places] = False
        return ids, absent

    def rows(self, member: int, logprobs: Tensor) -> Tensor:
        """(..., size), log-probabilities of the shared ids and of END, of a member's own (..., V)."""
        ids, absent = (part.to(logprobs.device) for part in self._gathers[member])
        gathered = logprobs.index_select(-1, ids).masked_fill(absent, -torch.inf)
        if self._ends[member]:
            gathered[..., self.end] = logprobs[..., self._ends[member]].logsumexp(-1)
        return gathered

    def own(self, member: int, ids: Sequence[int]) -> list[int]:
        """A member's own ids of shared ones."""
        return [self._own[member][i] for i in ids]

    def first(self, member: int, ids: Sequence[int]) -> list[int]:
        """The first member's ids of a member's own; -1 for those that are not shared."""
        return [self._first[member].get(i, -1) for i in ids]


def _spelled(vocabulary: Vocabulary, ends: Collection[int], size: int) -> dict[tuple[bytes, bool], int]:
    """Ids of tokens by what they spell and whether that is text, of equal ones the first. What begins, fills or ends a
    text stands for nothing in it."""
    out = {*ends, *(vocabulary.special.get(role) for role in ("bos", "pad", "unk", "eos"))}
    found: dict[tuple[bytes, bool], int] = {}
    for i, token in enumerate(vocabulary.tokens[:size]):
        if token and i not in out and i not in vocabulary.unused:
            found.setdefault((token, vocabulary.is_text(i)), i)
    return found


def overlap(one: Vocabulary, other: Vocabulary) -> float:
    """Share of the text tokens of both that both have."""
    return len(one.spelled & other.spelled) / max(1, len(one.spelled | other.spelled))
