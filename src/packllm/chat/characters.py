"""Parsers that read a growing text one character at a time."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import suppress

Reading = Generator[None, str, None]


class Words:
    """Strings to search for; none may be a prefix of another."""

    def __init__(self, spellings: Iterable[str]) -> None:
        self.whole = frozenset(spellings)
        self.begun = frozenset(word[:n] for word in self.whole for n in range(1, len(word)))
        self.first = frozenset(word[0] for word in self.whole)


class Characters:
    """Reads a text that comes in pieces. A coroutine asks for one character at a time and may go back.

    So the result cannot depend on how the text was cut into pieces, and the time is what the coroutine needs per
    character.

    Attributes:
        examined: number of characters requested so far; characters read twice count twice.
    """

    def __init__(self) -> None:
        self.examined = 0
        self._again: list[str] = []
        self._over = False
        self._reading = self._read()
        next(self._reading)

    def _read(self) -> Reading:
        """The coroutine that parses the text; it must not end before the text does."""
        raise NotImplementedError

    def _put(self, text: str) -> None:
        for character in text:
            self._reading.send(character)

    def _end(self) -> None:
        """End the text."""
        if not self._over:
            self._over = True
            with suppress(StopIteration):
                self._reading.send("")

    def _next(self) -> Generator[None, str, str]:
        """The next character; "" at the end."""
        self.examined += 1
        if self._again:
            return self._again.pop()
        return "" if self._over else (yield)

    def _unread(self, text: str) -> None:
        self._again.extend(reversed(text))

    def _word(self, first: str, words: Words) -> Generator[None, str, str]:
        """The word of `words` here, whose character `first` was read; "" if there is none, with nothing else read."""
        prefix = first
        while prefix not in words.whole:
            character = (yield from self._next()) if prefix in words.begun else ""
            if not character:
                self._unread(prefix[1:])
                return ""
            prefix += character
        return prefix
