"""Blocking work for asyncio. Each call runs in its own thread, so the event loop never blocks and all run
concurrently."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Event
from typing import TypeVar

T = TypeVar("T")


async def iterate(start: Callable[[], Generator[T, None, None]]) -> AsyncGenerator[T, None]:
    """Make a generator and iterate over it in a thread.

    Args:
        start: makes the generator; any thread may close it, even while another thread waits for its next item.
    """
    loop, end = asyncio.get_running_loop(), object()
    # asyncio's own pool has only a few more threads than cores: further answers would wait for each other.
    thread = ThreadPoolExecutor(1, "packllm")
    items: Generator[T, None, None] | None = None
    try:
        items = await loop.run_in_executor(thread, start)
        while (item := await loop.run_in_executor(thread, next, items, end)) is not end:
            yield item  # type: ignore[misc]
    finally:
        if items is not None:
            with suppress(ValueError):  # a plain generator that is running
                items.close()
            thread.submit(items.close)  # closes such a generator after its step, without waiting here
        thread.shutdown(wait=False)


async def in_thread(work: Callable[[Event], T], cancel: Event | None = None) -> T:
    """What work gives, in a thread of its own.

    Args:
        work: is told of the event, at which it is to stop.
        cancel: the event, where the caller has one; it is set where nobody waits any more.
    """
    told, thread = cancel or Event(), ThreadPoolExecutor(1, "packllm")
    try:
        return await asyncio.get_running_loop().run_in_executor(thread, work, told)
    except asyncio.CancelledError:
        told.set()
        raise
    finally:
        thread.shutdown(wait=False)
