"""Blocking generators for asyncio: each runs in a thread of its own, so that the loop never waits and all run at
once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


async def iterate(start: Callable[[], Generator[T, None, None]]) -> AsyncGenerator[T, None]:
    """The items of a generator that is made and run in a thread.

    Args:
        start: makes the generator; any thread may close it, also while another one waits for its next item.
    """
    loop, end = asyncio.get_running_loop(), object()
    # asyncio's own pool has a few more threads than there are cores: more answers than that would wait for each other.
    thread = ThreadPoolExecutor(1, "packllm")
    items: Generator[T, None, None] | None = None
    try:
        items = await loop.run_in_executor(thread, start)
        while (item := await loop.run_in_executor(thread, next, items, end)) is not end:
            yield item  # type: ignore[misc]
    finally:
        if items is not None:
            with suppress(ValueError):  # a plain generator that is executing
                items.close()
            thread.submit(items.close)  # that one is closed right after its step, without waiting for it here
        thread.shutdown(wait=False)
