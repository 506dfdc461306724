"""Where a segment may end: at word boundaries that several tokenizers share (Cool-Fusion §2.1)."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from packllm.chat.prompt import Encoder


def common_boundaries(text: str, encoders: Sequence[Encoder]) -> list[int]:
    """Ascending offsets inside `text` at which a word ends for every tokenizer.

    The end of `text` is not among them: the last word may still continue.

    A tokenizer's words are those of its pre-tokenizer. For a tokenizer without one (SentencePiece, Gemma) a word ends
    where a token ends before white space, after a line break, or between two scripts.
    """
    common = {at for at in range(1, len(text)) if not inside_character(text, at)}
    for encoder in encoders:
        if not common:
            return []
        common &= encoder.starts(text)
        if not encoder.has_words:
            common = {at for at in common if _parts(text[at - 1], text[at])}
    return sorted(common)


def inside_character(text: str, at: int) -> bool:
    """Whether offset `at` lies inside what readers see as one character: a letter with its combining marks, an emoji
    of several code points, a flag."""
    before, after = text[at - 1], text[at]
    if before == _JOINER or after == _JOINER or unicodedata.category(after)[0] == "M" or _is_skin_tone(after):
        return True
    if not (_is_regional(before) and _is_regional(after)):
        return False
    start = at
    while start > 0 and _is_regional(text[start - 1]):
        start -= 1
    return (at - start) % 2 == 1  # a flag is a pair of regional indicators


_JOINER = "\u200d"


def _is_regional(character: str) -> bool:
    return "\U0001f1e6" <= character <= "\U0001f1ff"


def _is_skin_tone(character: str) -> bool:
    return "\U0001f3fb" <= character <= "\U0001f3ff"


def _parts(before: str, after: str) -> bool:
    """Whether a word ends between two characters, judged by white space and scripts alone."""
    if before.isspace() or after.isspace():
        return not before.isspace() or (before in "\r\n" and after not in "\r\n")
    return before.isalpha() and after.isalpha() and _script(before) != _script(after)


@lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    # The first word of a letter's Unicode name is its script: LATIN, CJK, HIRAGANA, DEVANAGARI, ...
    return unicodedata.name(letter, "").partition(" ")[0]
