"""One notion of cancelling: before every forward pass a request asks whether anybody still waits for it."""

from __future__ import annotations

from collections.abc import Generator
from threading import Event
from typing import Any, TypeVar

from packllm.errors import CancelledError

T = TypeVar("T")


class Stop:
    """Whether a request is to end.

    Args:
        event: ends it, once set; whoever waits for the result then gets CancelledError.

    Attributes:
        closed: set where nobody waits for a result any more.
    """

    def __init__(self, event: Event | None = None) -> None:
        self._event, self.closed = event, False

    def check(self) -> None:
        """CancelledError if the request is to end."""
        if self.closed or (self._event is not None and self._event.is_set()):
            raise CancelledError("the request was cancelled")


class Stream(Generator[T, None, None]):
    """A generator that any thread may close, also while another one waits for its next item: the work then ends
    before its next forward pass, in the thread that does it, and that thread finds the generator exhausted.

    Args:
        items: the generator, whose work asks `stop`.
        stop: of these items alone.
    """

    def __init__(self, items: Generator[T, None, None], stop: Stop) -> None:
        self._items, self._stop = items, stop

    def send(self, value: None) -> T:
        try:
            item = self._items.send(value)
        except (CancelledError, ValueError):  # the latter: another thread closes it just now
            if self._stop.closed:
                raise StopIteration from None
            raise
        if self._stop.closed:  # by another thread, too late for that item
            self._items.close()
            raise StopIteration
        return item

    def throw(self, *error: Any) -> T:
        return self._items.throw(*error)

    def close(self) -> None:
        """End the work and free what it holds: now, or where it is under way, before its next forward pass."""
        self._stop.closed = True
        try:
            self._items.close()
        except ValueError:  # it is executing; whoever runs it closes it
            if not getattr(self._items, "gi_running", False):
                self._items.close()
