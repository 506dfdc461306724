"""A server of tiny members for tests: the app itself, and one that listens on a unix socket."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
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


def socket_of(folder: Path) -> str:
    return str(folder / "s")


def events(text: str) -> list[dict[str, Any]]:
    """What a stream of server-sent events says, which ends as it should."""
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(line) for line in data[:-1]]
