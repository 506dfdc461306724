"""A prompt that somebody formatted already, and which parts of it are the words that were put into it."""

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
        words: what is scored of it, by source; all of the text where the words put into it cannot be told from what is
            around them. Then nothing in it is a control token.
        vouched: whether they can be told.
    """

    words: dict[int, str]
    vouched: bool

    @classmethod
    def whole(cls, text: str) -> Formatted:
        """A formatted text of which nothing else is known."""
        return cls._made(text, [(len(text), 0, 0)], {0: text}, vouched=False)

    @classmethod
    def by(
        cls, write: Callable[[list[str]], str], contents: Sequence[str], scored: Sequence[int] | None = None
    ) -> Formatted:
        """What `write` makes of contents; those with the indices `scored` (all) are the user's.

        Control tokens outside the contents are meant. Where they are is told by writing marks in their place too.
        """
        text = write(list(contents))
        marks = [f"{secrets.randbits(64):020d}" for _ in contents]
        try:
            around = re.split("|".join(marks), write(marks)) if marks else [text]
        except Exception:  # a formatter that looks at its contents may not take these
            around = []
        if len(around) != len(contents) + 1 or _filled(around, contents) != text:
            return cls.whole(text)
        runs: list[Run] = [(len(around[0]), TEMPLATE, 0)]
        for source, (content, after) in enumerate(zip(contents, around[1:], strict=True)):
            runs += [(len(content), source, 0), (len(after), TEMPLATE, 0)]
        which = range(len(contents)) if scored is None else scored
        return cls._made(text, runs, {source: contents[source] for source in which}, vouched=True)

    @classmethod
    def _made(cls, text: str, runs: list[Run], words: dict[int, str], vouched: bool) -> Formatted:
        self = cls(text, runs)
        assert isinstance(self, Formatted)
        self.words, self.vouched = words, vouched
        return self


def _filled(around: Sequence[str], contents: Sequence[str]) -> str:
    return around[0] + "".join(content + after for content, after in zip(contents, around[1:], strict=True))


class Tokens(Formatted):
    """A text given as token ids, which members of their vocabulary read as they are; others read the text.

    Attributes:
        ids: at least one.
        vocabulary: of the ids.
        offsets: where each token is in the text; bytes of one character share its place.
    """

    ids: list[int]
    vocabulary: Vocabulary
    offsets: list[tuple[int, int]]

    @classmethod
    def of(cls, ids: Sequence[int], vocabulary: Vocabulary) -> Tokens:
        """
        Raises:
            PromptError: an id that the vocabulary does not have, or none that is text.
        """
        strange = next((i for i in ids if not 0 <= i < len(vocabulary) or i in vocabulary.unused), None)
        if strange is not None:
            raise PromptError(f"the prompt holds the token id {strange}; ids are 0 to {len(vocabulary) - 1}")
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        text, offsets = "", []
        for i in ids:
            start, piece = len(text), vocabulary.text_bytes(i)
            text += decoder.decode(piece)
            offsets.append((start, max(len(text), start + bool(piece))))
        text += decoder.decode(b"", final=True)
        if not text:
            raise PromptError("the prompt's token ids hold no text; give at least one character")
        self = cls._made(text, [(len(text), 0, 0)], {0: text}, vouched=True)
        assert isinstance(self, Tokens)
        self.ids, self.vocabulary, self.offsets = list(ids), vocabulary, offsets
        return self

    def ids_in(self, other: Vocabulary) -> list[int] | None:
        """The ids in a vocabulary of the same family; None: it is of another, or has not all the tokens."""
        if other.same_as(self.vocabulary):
            return self.ids
        if not other.akin(self.vocabulary):
            return None
        own = {token: i for i, token in enumerate(other.tokens) if token}
        found = [own.get(self.vocabulary.tokens[i]) for i in self.ids]
        return None if None in found else [i for i in found if i is not None]
