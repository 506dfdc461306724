"""A bound on the memory of the KV caches of all requests in flight; requests beyond it wait in order of arrival."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOOK = 0.05
"""Seconds between checks whether a waiting request was cancelled."""


class Admission:
    """A bound on the bytes of caches in flight.

    Args:
        limit: upper bound in bytes; a request that needs more runs alone. None: no bound.

    Attributes:
        waiting: tickets of waiting requests, first come first.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._condition = threading.Condition()
        self.waiting: deque[object] = deque()
        self._used = self._inside = 0

    @contextmanager
    def admitted(self, need: int, check: Callable[[], object]) -> Iterator[None]:
        """Reserve `need` bytes for a request while the context is open; wait until they are free.

        Args:
            need: bytes.
            check: called while the request waits; an exception from it ends the wait.
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
