"""Streams between the pack's threads and LlamaIndex: announced, closable, off the event loop."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing, suppress
from typing import Any, TypeVar

T = TypeVar("T")


def streaming(callback: Callable) -> Callable:
    """Announce a stream to LlamaIndex's callbacks, and let closing it close the work.

    The framework's own wrapper only drops the generator beneath it, and a handler that keeps its events
    (LlamaDebugHandler) keeps the exception, its frames, and so the work alive.
    """

    def wrap(method: Callable) -> Callable:
        @functools.wraps(method)
        def stream(self: Any, *args: Any, **kwargs: Any) -> Generator[Any]:
            opened: list[Generator[Any]] = []

            def remember(*args: Any, **kwargs: Any) -> Generator[Any]:
                opened.append(method(*args, **kwargs))
                return opened[0]

            announced = callback(remember)(self, *args, **kwargs)

            def steps() -> Generator[Any]:
                with closing(opened[0]):
                    yield from announced

            return steps()

        @functools.wraps(method)
        async def astream(self: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any]:
            opened: list[AsyncGenerator[Any]] = []

            async def remember(*args: Any, **kwargs: Any) -> AsyncGenerator[Any]:
                opened.append(await method(*args, **kwargs))
                return opened[0]

            announced = await callback(remember)(self, *args, **kwargs)

            async def steps() -> AsyncGenerator[Any]:
                async with aclosing(opened[0]), aclosing(announced):
                    async for step in announced:
                        yield step

            return steps()

        return astream if inspect.iscoroutinefunction(method) else stream

    return wrap


async def off_the_loop(steps: Generator[T], work: Generator) -> AsyncGenerator[T]:
    """Step a generator in one thread of its own, so that the loop stays free; closing or cancelling closes it, and
    the stream beneath it, which stops before its next forward pass."""
    worker = ThreadPoolExecutor(1, "packllm")
    try:
        while (step := await asyncio.get_running_loop().run_in_executor(worker, next, steps, None)) is not None:
            yield step
    except GeneratorExit:
        steps.close()  # between two steps: done when aclose() returns
        raise
    finally:
        with suppress(ValueError):  # a plain generator that is executing
            work.close()
        worker.submit(steps.close)  # cancelled within a step: closed right after it, without waiting for it here
        worker.shutdown(wait=False)
