"""A server of tiny members for tests: the app itself, and one that listens on a unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("prometheus_client", reason="the extra `serve` is not installed")

CHAT = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "What is the capital of France? A query planner chooses"}]


def client(app: Any) -> httpx.AsyncClient:
    """Asks an app without a server."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://packllm", timeout=60)


async def send(app: Any, path: str, body: Any, method: str = "POST", **headers: str) -> Any:
    """Sends JSON, or bytes as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with client(app) as http:
        return await http.request(
            method, path, content=content, headers={"content-type": "application/json", **headers}
        )


async def ask(app: Any, path: str, body: Any, status: int = 200) -> Any:
    """What an app answers to JSON, with the status that it must have."""
    answer = await send(app, path, body)
    assert answer.status_code == status, answer.text
    return answer.json()


@contextlib.contextmanager
def listening(app: Any, **where: Any) -> Iterator[Any]:
    """A uvicorn server of an app, in a thread, at uds=PATH or host= and port=."""
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", **where)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


@contextlib.contextmanager
def failing(member: Any, after: int) -> Iterator[None]:
    """Each pass of a member fails, but for the first `after`."""
    passes = 0

    def fail(*args: Any) -> None:
        nonlocal passes
        passes += 1
        if passes > after:
            raise RuntimeError("out of everything")

    handle = member.model.base_model.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def socket_of(folder: Path) -> str:
    return str(folder / "s")


def events(text: str) -> list[dict[str, Any]]:
    """What a stream of server-sent events says, which ends as it should."""
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(line) for line in data[:-1]]


async def until(true: Callable[[], Any]) -> None:
    while not true():
        await asyncio.sleep(0.005)


async def until_calm(app: Any) -> None:
    """Until no request runs, nor any thread of one."""
    places = app.state.server.places
    await until(lambda: not places.running and not places.waiting)
    await until(lambda: not any(thread.name.startswith("packllm_") for thread in threading.enumerate()))


async def leaving(app: Any, path: str, body: dict[str, Any], leave: Callable[[list[Any]], Awaitable[Any]]) -> list[Any]:
    """Ask an app, and go away when leave(what was sent so far) returns; gives the messages that were sent."""
    sent: list[Any] = []
    asked = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

    async def receive() -> dict[str, Any]:
        if (first := next(asked, None)) is not None:
            return first
        await leave(sent)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"host", b"packllm")]
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": headers, "http_version": "1.1", "scheme": "http", "server": ("packllm", 80), "root_path": ""}
    await app({**scope, "asgi": {"version": "3.0", "spec_version": "2.3"}, "client": None, "state": {}}, receive, send)
    return sent
