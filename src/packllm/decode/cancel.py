"""Cancelling a request. Before every forward pass a request checks whether its result is still wanted."""

from __future__ import annotations

from collections.abc import Generator
from threading import Event
from typing import Any, TypeVar

from packllm.errors import CancelledError

T = TypeVar("T")


class Stop:
    """Whether a request has to end.

    Args:
        event: ends the request once it is set; the caller who waits for the result gets CancelledError.

    Attributes:
        closed: True once nobody waits for the result.
    """

    def __init__(self, event: Event | None = None) -> None:
        self._event, self.closed = event, False

    def check(self) -> None:
        """Raise CancelledError if the request has to end."""
        if self.closed or (self._event is not None and self._event.is_set()):
            raise CancelledError("the request was cancelled")


class Stream(Generator[T, None, None]):
    """A generator that any thread may close, even while another thread waits for its next item. The work then ends
    before its next forward pass, in the thread that runs it; for that thread the generator is exhausted.

    Args:
        items: the generator, whose work calls stop.check().
        stop: belongs to these items only.
    """

    def __init__(self, items: Generator[T, None, None], stop: Stop) -> None:
        self._items, self._stop = items, stop

    def send(self, value: None) -> T:
        try:
            item = self._items.send(value)
        except (CancelledError, ValueError):  # ValueError: another thread is closing it
            if self._stop.closed:
                raise StopIteration from None
            raise
        if self._stop.closed:  # another thread closed it while this item was made
            self._items.close()
            raise StopIteration
        return item

    def throw(self, *error: Any) -> T:
        return self._items.throw(*error)

    def close(self) -> None:
        """End the work and free its resources: at once, or before the next forward pass if one is running."""
        self._stop.closed = True
        try:
            self._items.close()
        except ValueError:  # it is running; the thread that runs it closes it
            if not getattr(self._items, "gi_running", False):
                self._items.close()
