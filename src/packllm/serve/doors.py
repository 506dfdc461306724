"""What every request passes before anything is read of it: its key, its size, its time. Afterwards it is counted."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from packllm.serve.errors import ServeError, response_of
from packllm.serve.metrics import Metrics
from packllm.serve.settings import Settings

logger = logging.getLogger("packllm.serve")

OPEN = frozenset({"/", "/health", "/version"})
"""Paths that need no key: they tell nothing of anybody."""


DRAINED = 16
"""Times the size that a body may have that is read on, and dropped: who still sends does not read what it is told."""


class Doors:
    """ASGI middleware: 403 for a name that is not this server's, 401 without a key, 408 and 413 for a body that comes
    too slowly or has too many bytes."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check_host(scope)
            self._check_key(scope)
            receive = await self._whole(scope, receive)
            await self._app(scope, receive, counted)
        except Exception as error:
            if status:  # half of the answer is out: the connection ends with it
                raise
            await response_of(error)(scope, receive, counted)
        finally:
            status = status or 499  # nobody waited for the answer
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self._metrics.request(path, status)
            seconds = time.perf_counter() - started
            logger.info("%s %s %d %.3fs", scope["method"], path, status, seconds)

    def _check_host(self, scope: Scope) -> None:
        name = Request(scope).headers.get("host", "").lower()
        name = name if name.endswith("]") else name.rpartition(":")[0] or name
        if self._settings.hosts and name not in self._settings.hosts:
            raise ServeError(403, f"this server is not called {name!r}; --allow-host lets it be", "forbidden_host")

    def _check_key(self, scope: Scope) -> None:
        if not self._settings.keys or scope["path"] in OPEN:
            return
        said = Request(scope).headers.get("authorization", "")
        kind, _, key = said.partition(" ")
        given = key.strip().encode(errors="replace") if kind.lower() == "bearer" else b""
        # All keys are compared, each in constant time: how long it takes tells nothing.
        if not sum([hmac.compare_digest(given, own.encode()) for own in self._settings.keys]):
            raise ServeError(
                401,
                "give a key of this server as 'Authorization: Bearer KEY'",
                "invalid_api_key",
                www_authenticate="Bearer",
            )

    async def _whole(self, scope: Scope, receive: Receive) -> Receive:
        """Read the body, and give what tells it again; a client that sends slowly holds nothing but this."""
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return receive
        most = self._settings.body_bytes
        parts: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                while more and size <= DRAINED * most:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ServeError(400, "the client went away")
                    part = message.get("body", b"")
                    size += len(part)
                    if size <= most:
                        parts.append(part)
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ServeError(408, f"the request was not whole after {self._settings.body_seconds:g} seconds") from None
        if size > most:
            raise ServeError(413, f"a request may have {most} bytes", "too_large", connection="close")
        body = b"".join(parts)
        told = False

        async def again() -> Message:
            nonlocal told
            if told:
                return await receive()
            told = True
            return {"type": "http.request", "body": body, "more_body": False}

        return again
