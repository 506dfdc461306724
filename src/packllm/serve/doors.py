"""Middleware in front of all routes: checks host, API key, size and time limit of requests, and counts them."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import secrets
import time

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from packllm.serve.errors import ServeError, request_id, response_of
from packllm.serve.metrics import Metrics
from packllm.serve.reply import STATUS
from packllm.serve.settings import Settings

logger = logging.getLogger("packllm.serve")

OPEN = frozenset({"/", "/health", "/version"})
"""Paths that need no API key; their answers reveal nothing private."""


DRAINED = 16
"""How much of a body that is too large is read and discarded, as a multiple of the limit. Clients read the error only
after they have sent their body."""


class Doors:
    """ASGI middleware. It answers 403 for an unknown host name, 401 without a valid key, 408 for a body that arrives
    too slowly, 413 for a body that is too large, and 415 for a compressed one. Each response has the request's id in
    X-Request-Id, which the log has too."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        method, path = scope["method"], re.sub("/+", "/", scope["path"]).rstrip("/") or "/"
        # There are no redirects: they lose the scheme behind a proxy. HEAD is GET without a body.
        scope = {**scope, "path": path, "method": "GET" if method == "HEAD" else method}
        sent_id = Request(scope).headers.get("x-request-id", "")
        name = sent_id if re.fullmatch(r"[!-~]{1,128}", sent_id) else f"req_{secrets.token_hex(12)}"
        request_id.set(name)

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
            elif method == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        try:
            _check_framing(scope)
            self._check_host(scope)
            self._check_key(scope)
            receive = await self._read_body(scope, receive)
            await self._app(scope, receive, counted)
        except Exception as error:
            if status:  # the response has started: only closing the connection signals an error
                raise
            await response_of(error)(scope, receive, counted)
        finally:
            status = scope.get(STATUS) or status or 499  # the client disconnected before the response
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self._metrics.request(path, status)
            seconds = time.perf_counter() - started
            logger.info("%s %s %d %.3fs %s", method, path, status, seconds, name)

    def _check_host(self, scope: Scope) -> None:
        name = Request(scope).headers.get("host", "").lower()
        name = name if name.endswith("]") else name.rpartition(":")[0] or name
        if self._settings.hosts and name not in self._settings.hosts:
            raise ServeError(
                403, f"host name {name!r} is not allowed; start the server with --allow-host {name}", "forbidden_host"
            )

    def _check_key(self, scope: Scope) -> None:
        if not self._settings.keys or scope["path"] in OPEN:
            return
        header = Request(scope).headers.get("authorization", "")
        kind, _, key = header.partition(" ")
        client_key = key.strip().encode(errors="replace") if kind.lower() == "bearer" else b""
        # All keys are compared, in constant time each, so that the duration reveals nothing.
        if not sum([hmac.compare_digest(client_key, own.encode()) for own in self._settings.keys]):
            raise ServeError(
                401,
                "send an API key of this server in the header 'Authorization: Bearer KEY'",
                "invalid_api_key",
                www_authenticate="Bearer",
            )

    async def _read_body(self, scope: Scope, receive: Receive) -> Receive:
        """Read the body, and return a `receive` that replays it. Slow clients therefore hold no slot."""
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return receive
        coding = Request(scope).headers.get("content-encoding", "identity").lower()
        if coding != "identity":
            raise ServeError(415, f"content-encoding {coding!r} is not supported; send the body uncompressed")
        most = self._settings.body_bytes
        parts: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                while more and size <= DRAINED * most:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ServeError(400, "the client disconnected")
                    part = message.get("body", b"")
                    size += len(part)
                    if size <= most:
                        parts.append(part)
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ServeError(
                408, f"the request body did not arrive within {self._settings.body_seconds:g} seconds"
            ) from None
        if size > most:
            raise ServeError(
                413, f"the request body is larger than the limit of {most} bytes", "too_large", connection="close"
            )
        body = b"".join(parts)
        replayed = False

        async def again() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        return again


def _check_framing(scope: Scope) -> None:
    """Refuse a body with two lengths. A proxy may take the other one, and then what a client sends after the body for
    another client's request (request smuggling)."""
    names = {name for name, _ in scope["headers"]}
    if {b"content-length", b"transfer-encoding"} <= names:
        raise ServeError(
            400, "send the body either with Content-Length or with Transfer-Encoding, not both", connection="close"
        )
