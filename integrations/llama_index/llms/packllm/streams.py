"""Streams that LlamaIndex's callbacks know of and that callers can close."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, closing
from typing import Any


def streaming(callback: Callable) -> Callable:
    """Report a stream to LlamaIndex's callbacks, such that closing the stream ends the work.

    The framework's own wrapper only drops the generator inside it. A handler that stores its events (LlamaDebugHandler)
    then keeps the exception, its frames, and so the generator alive.
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
