"""Clients of packllm serve that go away: in the queue, while the prompt is read, in the middle of an answer. Counted in
passes: none begins once the client is gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import CHAT, QUESTION, client, leaving, listening, socket_of, until, until_calm
from test_stress import nothing_is_left

from packllm import Pack
from packllm.serve.app import create_app
from packllm.serve.settings import Settings

LONG = "The court shall order relief under chapter 7 unless the debtor objects. " * 4
DRAFTLESS = {"packllm": {"draft_tokens": 1}}
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": QUESTION, "max_tokens": 60, **DRAFTLESS}),
    "answers": (CHAT, {"messages": QUESTION, "max_tokens": 60, "n": 3, "temperature": 1, **DRAFTLESS}),
    "segments": (CHAT, {"messages": QUESTION, "max_tokens": 60, "packllm": {"decoding": "cool"}}),
    "responses": ("/v1/responses", {"input": LONG, "max_output_tokens": 60, **DRAFTLESS}),
    "prompts": ("/v1/completions", {"prompt": [LONG[at:] for at in range(12)], "max_tokens": 60, **DRAFTLESS}),
    "echo": ("/v1/completions", {"prompt": [LONG, LONG[3:]], "echo": True, "logprobs": 2, "max_tokens": 0}),
    "prompt_logprobs": ("/v1/completions", {"prompt": LONG, "prompt_logprobs": 1, "max_tokens": 60, **DRAFTLESS}),
    "score": ("/v1/score", {"text_1": [LONG, LONG[1:], LONG[2:]], "text_2": " by law"}),
    "rerank": ("/v1/rerank", {"query": LONG, "documents": [" by law", " in court"]}),
    "decisions": ("/v1/decisions", {"prompt": LONG, "choices": ["unless", "under"], "calibrated": True}),
}
STREAMED = ("chat", "answers", "responses", "prompts")


@pytest.fixture
def pack(make_member) -> Pack:
    return Pack([make_member("llama", 0, name="general"), make_member("gpt2", 1, name="law")], max_tokens=6)


class Passes:
    """Counts the members' passes as they begin.

    Attributes:
        begun: how many.
        hold: the pass that waits until `go`, counted from 0; None: all run.
    """

    def __init__(self) -> None:
        self.begun, self.hold = 0, None
        self.held, self.go = threading.Event(), threading.Event()

    def __call__(self, *_: Any) -> None:
        at, self.begun = self.begun, self.begun + 1
        if at == self.hold:
            self.held.set()
            assert self.go.wait(30)


@pytest.fixture
def passes(pack) -> Iterator[Passes]:
    count = Passes()
    hooks = [member.model.base_model.register_forward_pre_hook(count) for member in pack.members]
    yield count
    count.go.set()
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("kind", ASKED)
async def test_while_the_members_run_none_begins_another_pass(pack, passes, kind, at):
    app, passes.hold = create_app(pack), at
    path, body = ASKED[kind]

    async def leave(sent: list[Any]) -> None:
        await until(passes.held.is_set)

    sent = await leaving(app, path, body, leave)
    passes.go.set()
    await until_calm(app)
    assert passes.begun == at + 1
    assert not any(message.get("more_body") is False for message in sent)
    nothing_is_left(pack)
    async with client(app) as http:
        assert f'status="499"}} {1.0}' in (await http.get("/metrics")).text


@pytest.mark.parametrize("kind", STREAMED)
async def test_in_the_middle_of_a_stream_one_step_is_all_that_follows(pack, passes, kind):
    app = create_app(pack)
    path, body = ASKED[kind]
    seen = 0

    async def leave(sent: list[Any]) -> None:
        nonlocal seen
        await until(lambda: len(sent) > 6)
        seen = passes.begun

    sent = await leaving(app, path, {**body, "stream": True}, leave)
    await until_calm(app)
    assert 0 < seen < 80
    assert passes.begun <= seen + 2 * len(pack.members)  # the step under way, and the one that was begun ahead
    assert sent[0]["status"] == 200
    nothing_is_left(pack)


@pytest.mark.parametrize("kind", [*ASKED, "tokenize"])
async def test_in_the_queue_nothing_is_done_for_it(pack, passes, kind):
    """Those behind it move up."""
    app = create_app(pack, Settings(running=1, queue=2))
    server, passes.hold = app.state.server, 0
    path, body = ASKED.get(kind, ("/tokenize", {"prompt": LONG}))
    places = server.desk if kind == "tokenize" else server.places
    async with client(app) as http, contextlib.AsyncExitStack() as full:
        if kind == "tokenize":
            for _ in range(places.most):
                await full.enter_async_context(places.place())
        first = asyncio.create_task(http.post(CHAT, json={"messages": QUESTION, "max_tokens": 1}))
        await until(passes.held.is_set)
        gone = asyncio.create_task(leaving(app, path, body, lambda sent: until(lambda: places.waiting)))
        assert await gone == []
        assert places.waiting == 0
        passes.go.set()
        assert (await first).status_code == 200
    await until_calm(app)
    assert passes.begun == len(pack.members)  # of the first request
    nothing_is_left(pack)


async def test_over_a_socket(pack, passes, tmp_path):
    """A connection that is closed or reset in the prefill; the next request has the only place."""
    app = create_app(pack, Settings(running=1))
    for reset in (False, True):
        passes.hold, passes.begun = 0, 0
        passes.held.clear()
        passes.go.clear()
        raw = json.dumps({"messages": QUESTION, "max_tokens": 60}).encode()
        with listening(app, uds=socket_of(tmp_path)):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(socket_of(tmp_path))
                connection.sendall(b"POST %s HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n" % CHAT.encode())
                connection.sendall(b"content-length: %d\r\n\r\n%b" % (len(raw), raw))
                await until(passes.held.is_set)
                if reset:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            await until(lambda: not app.state.server.places.running)
            passes.go.set()
            await until_calm(app)
        assert passes.begun == 1
        Path(socket_of(tmp_path)).unlink(missing_ok=True)
    nothing_is_left(pack)
