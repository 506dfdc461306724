"""A task that is cancelled stops the thread that works for it, before the next forward pass."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import CancelledError
from contextlib import suppress
from threading import Event
from typing import TypeVar

T = TypeVar("T")


class Cancelled(Event):
    """Set when nobody waits any more; it then closes the stream that it watches."""

    def __init__(self) -> None:
        super().__init__()
        self._stream: Generator | None = None

    def set(self) -> None:
        super().set()
        if self._stream is not None:
            with suppress(ValueError):  # a plain generator that is executing; it is asked at its next item
                self._stream.close()

    def watch(self, stream: Generator[T, None, None]) -> Iterator[T]:
        """The stream's items.

        Raises:
            CancelledError: it is set.
        """
        self._stream = stream
        if not self.is_set():
            for item in stream:
                if self.is_set():
                    break
                yield item
        if self.is_set():
            raise CancelledError("the task that waited for this answer was cancelled")
