"""Words that several tokenizers have in common in a text, and the members' log-probabilities of them (METHODS §4)."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scored:
    """The tokens of a scored text, and one member's log-probabilities of them.

    Attributes:
        ids: token ids, in order.
        starts, ends: character offsets of each token in the scored text.
        positions: index of each token in the member's prompt ids.
        logprobs: float64 (n,), log-probability of each token; filled in by the prefill.
    """

    ids: list[int]
    starts: list[int]
    ends: list[int]
    positions: list[int]
    logprobs: Tensor


def offsets(text: str, tokens: Sequence[bytes]) -> tuple[list[int], list[int]] | None:
    """Character offsets (starts, ends) in `text` of the tokens that spell it; None if they spell another text.

    A token that holds only some bytes of a character has the offsets of that character.
    """
    if b"".join(tokens) != text.encode() or not all(tokens):
        return None
    character_at = [at for at, character in enumerate(text) for _ in character.encode()]
    cuts = [0, *accumulate(map(len, tokens))]
    return [character_at[cut] for cut in cuts[:-1]], [character_at[cut - 1] + 1 for cut in cuts[1:]]


def common_tokens(members: Sequence[Scored]) -> list[Scored] | None:
    """The tokens that every member predicted, if all split the text alike; None otherwise.

    A member without BOS does not predict its first token. So only the last n tokens, n as of the shortest, are
    compared, and the ones before them are left out for all members.
    """
    count = min(len(member.ids) for member in members)
    tails = [_last(member, count) for member in members]
    first = tails[0]
    if all(m.ids == first.ids and m.starts == first.starts and m.ends == first.ends for m in tails[1:]):
        return tails
    return None


def _last(scored: Scored, count: int) -> Scored:
    cut = len(scored.ids) - count
    return Scored(
        scored.ids[cut:], scored.starts[cut:], scored.ends[cut:], scored.positions[cut:], scored.logprobs[cut:]
    )


def common_words(text: str, members: Sequence[Scored]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Log-probabilities of the words of `text` that end at token boundaries of every member.

    p_k(word) is the product of member k's token probabilities inside the word. A word that some member did not
    predict completely (the first one, without BOS) is left out.

    Args:
        text: the scored text.
        members: one Scored per member, over that text.

    Returns:
        float64 (K, words), and the (start, end) character span of each word.
    """
    sweeps = [_Sweep(member) for member in members]
    boundaries = set.intersection(*(set(sweep.index) for sweep in sweeps))
    cuts = sorted(c for c in boundaries if is_word_boundary(text, c))
    spans = []
    columns = []
    for start, end in pairwise(cuts):
        column = [sweep.total(start, end) for sweep in sweeps]
        if None not in column:
            spans.append((start, end))
            columns.append(column)
    matrix = torch.tensor(columns, dtype=torch.float64).T if columns else torch.zeros(len(members), 0).double()
    return matrix, spans


class _Sweep:
    """One member's tokens, prepared for sums between two offsets that are token boundaries."""

    def __init__(self, member: Scored) -> None:
        self.index: dict[int, int] = {}  # offset -> number of tokens that end before it
        self._ends = member.ends
        self._logprobs = member.logprobs.tolist()
        self._gaps = [0]  # for the first i tokens: how many have characters without a token before them
        for i, start in enumerate(member.starts):
            before = member.ends[i - 1] if i else start
            # The bytes of one character share its offsets: such a token starts before the previous one ends.
            if before <= start:
                self.index[start] = i
            self._gaps.append(self._gaps[-1] + (before < start))
        if member.ends:
            self.index[member.ends[-1]] = len(member.ends)

    def total(self, start: int, end: int) -> float | None:
        """Sum of the log-probabilities of [start, end); None if a part of it has no token."""
        first, last = self.index[start], self.index[end]
        if self._ends[last - 1] != end or self._gaps[last] != self._gaps[first + 1]:
            return None
        return math.fsum(self._logprobs[first:last])  # not a difference of running sums: a term may be -infinity


def is_word_boundary(text: str, at: int) -> bool:
    """Whether a word of `text` may end before character `at`. It may not before a combining mark, nor between two
    letters or digits of a script that separates words by spaces."""
    if at <= 0 or at >= len(text):
        return True
    before, after = text[at - 1], text[at]
    return not _is_mark(after) and not (_joins(before) and _joins(after))


def _joins(character: str) -> bool:
    # Scripts without spaces (CJK, Thai, ...) lie at or above U+0E00 outside Hangul; each character may end a word.
    letter = character.isalnum() or _is_mark(character)
    return letter and (character < "\u0e00" or "\uac00" <= character <= "\ud7a3")


def _is_mark(character: str) -> bool:
    return character >= "\u0300" and unicodedata.category(character)[0] == "M"
