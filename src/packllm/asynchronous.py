"""Blocking work for asyncio. Each call runs in its own thread, so the event loop never blocks and all run
concurrently."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from threading import Event, Semaphore
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


async def ahead(start: Callable[[Event], Generator[T, None, None]]) -> AsyncGenerator[T, None]:
    """Iterate over a generator that runs in a thread of its own, one item ahead of its reader: the work goes on while
    the event loop is busy with the last item, but not much further than somebody reads.

    Args:
        start: makes the generator, in the thread; its event is set once nobody reads any more. Then the thread closes
            the generator at its next item or error.
    """
    loop, cancel, ready = asyncio.get_running_loop(), Event(), asyncio.Event()
    thread, room, items = ThreadPoolExecutor(1, "packllm"), Semaphore(1), deque[T]()

    def run() -> None:
        with closing(start(cancel)) as made:
            for item in made:
                room.acquire()
                if cancel.is_set():
                    return
                items.append(item)
                with suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(ready.set)

    def ended(work: asyncio.Future[None]) -> None:
        work.cancelled() or work.exception()  # an error that nobody waits for is not reported
        ready.set()

    work = loop.run_in_executor(thread, run)
    work.add_done_callback(ended)
    try:
        while True:
            finished = work.done()
            if items:
                yield items.popleft()
                room.release()
            elif finished:
                await work
                return
            else:
                await ready.wait()
                ready.clear()
    finally:
        cancel.set()
        room.release()
        work.cancel()
        thread.shutdown(wait=False)
