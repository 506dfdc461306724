"""Prompts that the caller has formatted already, and which parts of them are the caller's contents."""

from __future__ import annotations

import codecs
import re
import secrets
from collections.abc import Callable, Sequence

from packllm.align.vocabulary import Vocabulary
from packllm.chat.traced import TEMPLATE, Run, Traced
from packllm.errors import PromptError


class Formatted(Traced):
    """Text that goes to the members without their chat templates.

    Attributes:
        words: the scored parts, by source. If the contents cannot be located in the text, all of it is scored and
            nothing in it is a control token.
        vouched: whether the contents were located.
    """

    words: dict[int, str]
    vouched: bool

    @classmethod
    def whole(cls, text: str) -> Formatted:
        """A formatted text without known contents."""
        return cls._with_words(text, [(len(text), 0, 0)], {0: text}, vouched=False)

    @classmethod
    def by(
        cls, write: Callable[[list[str]], str], contents: Sequence[str], scored: Sequence[int] | None = None
    ) -> Formatted:
        """The text that `write` makes of contents; the contents at the indices `scored` (None: all) are scored.

        Control tokens outside the contents keep their meaning. The contents are located by a second call of `write`
        with random marks in their place.
        """
        text = write(list(contents))
        marks = [f"{secrets.randbits(64):020d}" for _ in contents]
        try:
            around = re.split("|".join(marks), write(marks)) if marks else [text]
        except Exception:  # a formatter may check its contents and refuse marks
            around = []
        if len(around) != len(contents) + 1 or _filled(around, contents) != text:
            return cls.whole(text)
        runs: list[Run] = [(len(around[0]), TEMPLATE, 0)]
        for source, (content, after) in enumerate(zip(contents, around[1:], strict=True)):
            runs += [(len(content), source, 0), (len(after), TEMPLATE, 0)]
        which = range(len(contents)) if scored is None else scored
        return cls._with_words(text, runs, {source: contents[source] for source in which}, vouched=True)

    @classmethod
    def _with_words(cls, text: str, runs: list[Run], words: dict[int, str], vouched: bool) -> Formatted:
        self = cls(text, runs)
        assert isinstance(self, Formatted)
        self.words, self.vouched = words, vouched
        return self


def _filled(around: Sequence[str], contents: Sequence[str]) -> str:
    return around[0] + "".join(content + after for content, after in zip(contents, around[1:], strict=True))


class Tokens(Formatted):
    """A prompt given as token ids. Members with the ids' vocabulary read the ids, others read their text.

    Attributes:
        ids: at least one.
        vocabulary: the vocabulary of the ids.
        offsets: (start, end) of each token in the text; the bytes of one character share its offsets.
    """

    ids: list[int]
    vocabulary: Vocabulary
    offsets: list[tuple[int, int]]

    @classmethod
    def of(cls, ids: Sequence[int], vocabulary: Vocabulary) -> Tokens:
        """A prompt of these ids.

        Raises:
            PromptError: the vocabulary lacks an id, or no id is text.
        """
        invalid = next((i for i in ids if not 0 <= i < len(vocabulary) or i in vocabulary.unused), None)
        if invalid is not None:
            raise PromptError(f"the prompt has the token id {invalid}; valid ids are 0 to {len(vocabulary) - 1}")
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        text, offsets = "", []
        for i in ids:
            start, piece = len(text), vocabulary.text_bytes(i)
            text += decoder.decode(piece)
            offsets.append((start, max(len(text), start + bool(piece))))
        text += decoder.decode(b"", final=True)
        if not text:
            raise PromptError("the prompt's token ids contain no text; give at least one character")
        self = cls._with_words(text, [(len(text), 0, 0)], {0: text}, vouched=True)
        assert isinstance(self, Tokens)
        self.ids, self.vocabulary, self.offsets = list(ids), vocabulary, offsets
        return self

    def ids_in(self, other: Vocabulary) -> list[int] | None:
        """The ids in another vocabulary of the same family; None if it is of another family or lacks a token."""
        if other.same_as(self.vocabulary):
            return self.ids
        if not other.akin(self.vocabulary):
            return None
        id_of = {token: i for i, token in enumerate(other.tokens) if token}
        ids = [id_of.get(self.vocabulary.tokens[i]) for i in self.ids]
        return None if None in ids else [i for i in ids if i is not None]
