"""A prompt that somebody formatted already, and which parts of it are the words that were put into it."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence

from packllm.chat.traced import TEMPLATE, Run, Traced


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
