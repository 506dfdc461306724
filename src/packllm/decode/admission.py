"""Requests in flight share a bound on the memory of their caches: those beyond it wait their turn, first come first
served."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOOK = 0.05
"""Seconds between looks whether a request that waits is still wanted."""


class Admission:
    """A bound on bytes in flight.

    Args:
        limit: most bytes; a request that needs more runs alone. None: no bound.

    Attributes:
        waiting: tickets of those that wait, in order.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._condition = threading.Condition()
        self.waiting: deque[object] = deque()
        self._used = self._inside = 0

    @contextmanager
    def admitted(self, need: int, check: Callable[[], object]) -> Iterator[None]:
        """While this is open, `need` bytes are this request's; it opens when they are there.

        Args:
            need: bytes.
            check: called while it waits; what it raises ends the wait.
        """
        ticket = object()
        with self._condition:
            self.waiting.append(ticket)
            try:
                while self.waiting[0] is not ticket or not self._fits(need):
                    self._condition.wait(LOOK)
                    check()
            finally:
                self.waiting.remove(ticket)
                self._condition.notify_all()
            self._used += need
            self._inside += 1
        try:
            yield
        finally:
            with self._condition:
                self._used -= need
                self._inside -= 1
                self._condition.notify_all()

    def _fits(self, need: int) -> bool:
        return self.limit is None or not self._inside or self._used + need <= self.limit
