"""What several members gave one text, in units that all of them have: tokens, or words (METHODS §4)."""

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
    """K members on one text.

    Attributes:
        matrix: float64 (K, n), log-probabilities of the units.
        spans: their character offsets in the text.
        tokens: the units as each member's tokens; None where they are words.
        own: all tokens of each member, in shared ids where there are any.
        shared: the ids that members of one family share, where theirs are not the same anyway.
    """

    matrix: Tensor
    spans: list[tuple[int, int]]
    tokens: list[Scored] | None
    own: list[Scored]
    shared: Shared | None


def in_common(members: Sequence[Member], encoded: Sequence[Encoded], logprobs: Sequence[Tensor | None]) -> Common:
    """Members that split the text into the same tokens are compared token by token, others by the words that end at
    boundaries of all of them.

    Args:
        members, encoded, logprobs: K members, how the text is encoded for each, and float64 (t_k,) of its scored
            tokens; None where the reading left that out.
    """
    akin = all(member.vocabulary.akin(members[0].vocabulary) for member in members[1:])
    if not akin:  # in one vocabulary all hide the same
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
    """One member's tokens of the scored text, with what the prefill gave them; NaN if it left that out."""
    if logprobs is None:
        logprobs = torch.full((len(encoded.positions),), torch.nan, dtype=torch.float64)
    ids = [encoded.ids[at] for at in encoded.positions]
    return Scored(ids, encoded.starts, encoded.ends, encoded.positions, logprobs)


def charged(logprobs: Tensor | None, encoded: Encoded, unknown: int | None) -> Tensor | None:
    """Log-probabilities of scored tokens, with 8 bits taken off for each byte that a member's tokenizer does not know.

    The probability of "unknown" says nothing of the text behind it: all of it could have been spelled at random.
    """
    if logprobs is None or unknown is None:
        return logprobs
    hidden = [
        len(encoded.text[start:end].encode()) if encoded.ids[at] == unknown else 0
        for at, start, end in zip(encoded.positions, encoded.starts, encoded.ends, strict=True)
    ]
    return logprobs - math.log(256) * torch.tensor(hidden, dtype=torch.float64)
