"""Text that is read one character at a time, while it grows."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import suppress

Reading = Generator[None, str, None]


class Words:
    """Spellings to look for; none begins another."""

    def __init__(self, spellings: Iterable[str]) -> None:
        self.whole = frozenset(spellings)
        self.begun = frozenset(word[:n] for word in self.whole for n in range(1, len(word)))
        self.first = frozenset(word[0] for word in self.whole)


class Characters:
    """Reads a text in pieces, by a coroutine that asks for one character at a time and may go back.

    What is read out of a text so cannot depend on how it was cut into pieces, and the work is what the coroutine
    does for each character.

    Attributes:
        examined: characters asked for so far, those read again included.
    """

    def __init__(self) -> None:
        self.examined = 0
        self._again: list[str] = []
        self._over = False
        self._reading = self._read()
        next(self._reading)

    def _read(self) -> Reading:
        """Takes the text; must not end before it does."""
        raise NotImplementedError

    def _put(self, text: str) -> None:
        for character in text:
            self._reading.send(character)

    def _end(self) -> None:
        """No more text comes."""
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
        """The one of `words` that begins with the character just read; "", with nothing more read, if none does."""
        read = first
        while read not in words.whole:
            character = (yield from self._next()) if read in words.begun else ""
            if not character:
                self._unread(read[1:])
                return ""
            read += character
        return read
