"""Admission control: how many requests run at once, how many wait, and which are rejected."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from packllm.serve.errors import ServeError


class Places:
    """Slots for running requests; further requests wait in order.

    Args:
        most: requests that run at once; they share the members' forward passes.
        queue: requests that may wait.

    Attributes:
        running, waiting: current numbers of requests.
    """

    def __init__(self, most: int, queue: int) -> None:
        self.most, self.queue = most, queue
        self.running = self.waiting = 0
        self._free = asyncio.Semaphore(most)
        self._took: deque[float] = deque([1.0], maxlen=32)  # durations of the last requests, in seconds

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Hold a slot while this context is open.

        Raises:
            ServeError: 429, the queue is full.
        """
        if self.running + self.waiting >= self.most + self.queue:
            raise ServeError(
                429,
                f"the server is busy: {self.running} requests run and {self.waiting} wait; retry later",
                "queue_full",
                retry_after=str(self._later()),
            )
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        started = time.monotonic()
        try:
            yield
        finally:
            self._took.append(time.monotonic() - started)
            self.running -= 1
            self._free.release()

    def _later(self) -> int:
        """Estimated seconds until a slot is free, for Retry-After."""
        mean = sum(self._took) / len(self._took)
        return min(60, max(1, math.ceil(mean * (self.waiting + 1) / self.most)))
