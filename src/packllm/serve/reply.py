"""HTTP responses: a response waits for a slot, and ends when its time is up or its client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextlib import aclosing, closing, suppress
from itertools import count
from threading import Event
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from packllm.asynchronous import ahead
from packllm.serve.admission import Places
from packllm.serve.errors import dumps, field_of, response_of, told

Events = Generator[dict[str, Any], None, None]

STATUS = "packllm.status"
"""Key of the ASGI scope for the status that the metrics count, where it is not that of the response."""

DONE = b"data: [DONE]\n\n"
LAST_WORDS = 5
"""Seconds within which a client must read the error that ends its stream; then the connection is closed."""


def data_only(event: dict[str, Any]) -> bytes:
    """A server-sent event in the format of OpenAI's chats."""
    return b"data: " + dumps(event) + b"\n\n"


class Named:
    """Server-sent events in the format of /v1/responses: numbered, with the type before the data.

    An error becomes two events. `error` is the one that clients made with OpenAI's packages raise; its fields are in
    the event, as in OpenAI's format, and in its field `error`, as in OpenResponses'. `response.failed` is the one that
    ends a stream for clients that read the events themselves.
    """

    def __init__(self) -> None:
        self._numbers = count()
        self._response: dict[str, Any] = {}
        self._items: list[dict[str, Any]] = []

    def __call__(self, event: dict[str, Any]) -> bytes:
        if "type" in event:
            self._response = event.get("response", self._response)
            self._items += [event["item"]] if event["type"] == "response.output_item.done" else []
            return self._event(event["type"], event)
        error = event["error"]
        failed = {**self._response, "status": "failed", "output": self._items}
        failed["error"] = {"code": "server_error", "message": error["message"]}
        return self._event("error", {**error, **event}) + self._event("response.failed", {"response": failed})

    def _event(self, kind: str, fields: dict[str, Any]) -> bytes:
        return f"event: {kind}\n".encode() + data_only({**fields, "type": kind, "sequence_number": next(self._numbers)})


class Reply(Response):
    """A response made from events: either a JSON body, the only event, or a stream of server-sent events.

    The first event is computed before anything is sent, so that errors until then can have their own status. If the
    client disconnects, the work stops before the next forward pass.

    Args:
        places: the slots of running requests.
        work: makes the events, in a thread of its own; its argument is set once the work is to end.
        stream: whether the events are sent as a stream.
        seconds: time limit, including the wait for a slot.
        frame: encodes an event of a stream.
        end: bytes that end a stream.
        named: names of fields in errors, see Body.named.
    """

    def __init__(
        self,
        places: Places,
        work: Callable[[Event], Events],
        stream: bool = False,
        seconds: float | None = None,
        frame: Callable[[dict[str, Any]], bytes] = data_only,
        end: bytes = DONE,
        named: Callable[[str], str | None] = field_of,
    ) -> None:
        super().__init__(media_type="text/event-stream" if stream else "application/json")
        self._places, self._work, self._stream, self._seconds = places, work, stream, seconds
        self._frame, self._end, self._named = frame, end, named

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._run(scope, receive, send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
            else:
                scope[STATUS] = 499
        finally:
            for task in (work, gone):
                task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await work

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async with asyncio.timeout(self._seconds):
                body = b""
                async with self._places.place(), aclosing(ahead(self._encoded)) as parts:
                    async for part in parts:
                        if not self._stream:
                            body = part
                            continue
                        if not started:
                            started = True
                            await self._start(send, None)
                        await send(_body(part))
                if self._stream:
                    await send(_body(self._end, last=True))
                else:  # a client that reads slowly holds no slot
                    started = True
                    await self._start(send, body)
        except Exception as error:
            if not started:
                await response_of(error, self._named)(scope, receive, send)
                return
            if not self._stream:
                raise
            scope[STATUS], said, _ = told(error, self._named)
            with suppress(TimeoutError):  # a client that does not read the stream does not read this either
                async with asyncio.timeout(LAST_WORDS):
                    await send(_body(self._frame(said) + self._end, last=True))

    def _encoded(self, cancel: Event) -> Generator[bytes, None, None]:
        """The work's events, as they are sent. Large ones take their time, which is not the event loop's."""
        with closing(self._work(cancel)) as events:
            for event in events:
                yield self._frame(event) if self._stream else dumps(event)

    async def _start(self, send: Send, body: bytes | None) -> None:
        headers = [(b"content-type", self.media_type.encode())] if self.media_type else []
        headers.append((b"cache-control", b"no-store"))
        if body is None:
            headers.append((b"x-accel-buffering", b"no"))  # tell proxies not to buffer the stream
        else:
            headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        if body is not None:
            await send(_body(body, last=True))


def _body(body: bytes, last: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": not last}


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
