"""The log-probabilities of several members on one text, in common units: tokens or words (METHODS §4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from packllm.align.shared import Shared
from packllm.align.words import Scored, common_tokens, common_words
from packllm.chat.prompt import Encoded
from packllm.engines.member import Member


@dataclass(frozen=True)
class Common:
    """Scores of K members on one text, in common units.

    Attributes:
        matrix: float64 (K, n), log-probabilities of the units.
        spans: character offsets (start, end) of the units in the text.
        tokens: the units as each member's tokens; None if the units are words.
        own: all scored tokens of each member, as shared ids if members share any.
        shared: the ids that members of one family share; None if their ids are equal or they share none.
    """

    matrix: Tensor
    spans: list[tuple[int, int]]
    tokens: list[Scored] | None
    own: list[Scored]
    shared: Shared | None


def in_common(members: Sequence[Member], encoded: Sequence[Encoded], logprobs: Sequence[Tensor | None]) -> Common:
    """Compare members token by token if they split the text alike, otherwise by the words that end at token boundaries
    of all members.

    Args:
        members, encoded, logprobs: of K members: the member, its encoding of the text, and its log-probabilities of the
            scored tokens, float64 (t_k,); None if the prefill did not compute them.
    """
    akin = all(member.vocabulary.akin(members[0].vocabulary) for member in members[1:])
    if not akin:  # in one vocabulary all have the same unknown tokens
        unknown = [member.vocabulary.special.get("unk") for member in members]
        logprobs = [charged(*each) for each in zip(logprobs, encoded, unknown, strict=True)]
    own = [scored(e, p) for e, p in zip(encoded, logprobs, strict=True)]
    shared = None
    if akin and not all(member.vocabulary.same_as(members[0].vocabulary) for member in members[1:]):
        vocabularies, ends = [member.vocabulary for member in members], [member.end_ids for member in members]
        shared = Shared.of(vocabularies, ends, [member.vocabulary_size for member in members])
    if shared is not None:
        own = [replace(one, ids=shared.first(k, one.ids)) for k, one in enumerate(own)]
    tokens = common_tokens(own) if akin else None
    if tokens is None:
        return Common(*common_words(encoded[0].text, own), None, own, shared)
    spans = list(zip(tokens[0].starts, tokens[0].ends, strict=True))
    return Common(torch.stack([one.logprobs for one in tokens]), spans, tokens, own, shared)


def scored(encoded: Encoded, logprobs: Tensor | None) -> Scored:
    """One member's tokens of the scored text with their log-probabilities; NaN if `logprobs` is None."""
    if logprobs is None:
        logprobs = torch.full((len(encoded.positions),), torch.nan, dtype=torch.float64)
    ids = [encoded.ids[at] for at in encoded.positions]
    return Scored(ids, encoded.starts, encoded.ends, encoded.positions, logprobs)


def charged(logprobs: Tensor | None, encoded: Encoded, unknown: int | None) -> Tensor | None:
    """Log-probabilities of scored tokens, with 8 bits subtracted for each byte that the member's tokenizer does not
    know.

    The probability of "unknown" says nothing about the text behind it. 8 bits a byte is the cost of random bytes.
    """
    if logprobs is None or unknown is None:
        return logprobs
    unknown_bytes = [
        len(encoded.text[start:end].encode()) if encoded.ids[at] == unknown else 0
        for at, start, end in zip(encoded.positions, encoded.starts, encoded.ends, strict=True)
    ]
    return logprobs - math.log(256) * torch.tensor(unknown_bytes, dtype=torch.float64)
