"""Blocking generators for asyncio. Each runs in its own thread, so the event loop never blocks and all run
concurrently."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
