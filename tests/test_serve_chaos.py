"""packllm serve where things go wrong: processes are killed, clients are slow or half gone, bodies are large."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import httpx
import pytest
from conftest import _config, byte_level_tokenizer
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError
from served import CHAT, QUESTION, client, events, leaving, listening, socket_of, until, until_calm
from serving import CORPUS, Broken, Served, english
from test_stress import nothing_is_left
from transformers import AutoModelForCausalLM

from packllm import Member, Pack
from packllm.engines.load import Loader
from packllm.engines.server import http
from packllm.options import Options
from packllm.serve import protocol, reply
from packllm.serve.app import create_app
from packllm.serve.errors import dumps
from packllm.serve.settings import Settings

JSON = {"content-type": "application/json"}
MB = 2**20


@pytest.fixture
def pack(make_member) -> Pack:
    return Pack([make_member("llama", 0, name="general"), make_member("gpt2", 1, name="law")], max_tokens=6)


def over(where: str, **options: Any) -> httpx.AsyncClient:
    transport = httpx.AsyncHTTPTransport(uds=where)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", **{"timeout": 60, **options})


async def test_a_server_that_is_killed_and_started_again_under_load_loses_no_answer(tmp_path):
    """Clients that ask again, as OpenAI's does, where the connection breaks or models are being loaded."""
    tokenizer, folder, where = byte_level_tokenizer(), tmp_path / "tiny", socket_of(tmp_path)
    model = AutoModelForCausalLM.from_config(_config("llama", len(tokenizer) + 24))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    prompts = [[{"role": "user", "content": f"A query planner chooses an index scan {at}"}] for at in range(8)]
    pack = Pack([Member(model.eval(), tokenizer)], max_tokens=8)
    expected = [pack.generate(prompt).text for prompt in prompts]
    command = [sys.executable, "-c", "from packllm.cli import app; app()", "serve", "-m", str(folder), "--uds", where]

    def started() -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, "-o", "max_tokens=8"], stderr=subprocess.DEVNULL)

    found: list[str] = []
    broken, stop = 0, False

    async def ask(prompt: list[dict[str, str]]) -> str:
        nonlocal broken
        while True:
            try:
                async with over(where) as http:
                    answer = await http.post(CHAT, json={"messages": prompt, "stream": True})
                if answer.status_code == 200:
                    return "".join(one["choices"][0]["delta"].get("content", "") for one in events(answer.text))
                assert answer.status_code == 503
            except (httpx.TransportError, AssertionError):
                broken += 1
            assert server.poll() is None
            await asyncio.sleep(0.05)

    async def ask_on(at: int) -> None:
        while not stop:
            assert await ask(prompts[at]) == expected[at]
            found.append(expected[at])

    server = started()
    try:
        tasks = [asyncio.create_task(ask_on(at)) for at in range(8)]
        await until(lambda: len(found) > 8 or any(task.done() for task in tasks))
        killed, server, before = server, started(), broken
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        count = len(found)
        await until(lambda: len(found) > count + 16 or any(task.done() for task in tasks))
        stop = True
        await asyncio.gather(*tasks)
        assert broken > before
    finally:
        server.kill()
        server.wait()


async def test_a_client_that_does_not_read_is_in_nobodys_way_and_lets_go_of_its_place(pack, tmp_path, monkeypatch):
    """Half a megabyte of log-probabilities is more than the socket holds. Its time ends when the socket is full."""
    monkeypatch.setattr(reply, "LAST_WORDS", 0.1)
    ends: list[tuple[asyncio.AbstractEventLoop, asyncio.Timeout]] = []
    timeout = asyncio.timeout

    def recorded(seconds: float | None) -> asyncio.Timeout:
        made = timeout(seconds)
        if seconds == 333:
            ends.append((asyncio.get_running_loop(), made))
        return made

    monkeypatch.setattr(asyncio, "timeout", recorded)
    app = create_app(pack, Settings(running=1))
    asked = {"messages": QUESTION, "stream": True, "logprobs": True, "top_logprobs": 20, "max_tokens": 400}
    raw = json.dumps({**asked, "timeout": 333, "logit_bias": {"<|im_end|>": -100}}).encode()
    with listening(app, uds=socket_of(tmp_path)) as server, socket.socket(socket.AF_UNIX) as slow:
        slow.connect(socket_of(tmp_path))
        slow.sendall(b"POST %s HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n" % CHAT.encode())
        slow.sendall(b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(raw), raw))
        await until(lambda: any(one.flow.write_paused for one in list(server.server_state.connections)))
        async with over(socket_of(tmp_path)) as http:  # it waits for the only place
            task = asyncio.create_task(http.post(CHAT, json={"messages": QUESTION}))
            await until(lambda: app.state.server.places.waiting)
            [(loop, end)] = ends
            loop.call_soon_threadsafe(lambda: end.reschedule(loop.time()))
            answer = await task
        assert answer.json()["choices"][0]["message"]["content"] == pack.generate(QUESTION).text
        await until_calm(app)
        await until(lambda: not server.server_state.tasks)
        slow.settimeout(30)
        read = b"".join(iter(partial(slow.recv, MB), b""))
    assert read.count(b"data: ") > 20
    assert b"[DONE]" not in read  # closed in the middle
    assert b'"finish_reason":"' not in read
    nothing_is_left(pack)


async def test_connections_that_are_half_open_are_in_nobodys_way(pack, tmp_path):
    """Some stop within the headers, some within the body, some close their side once they have asked."""
    app = create_app(pack, Settings(body_seconds=1))
    raw = json.dumps({"messages": QUESTION}).encode()
    head = b"POST %s HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n" % CHAT.encode()
    full = head + b"content-length: %d\r\n\r\n%b" % (len(raw), raw)
    with listening(app, uds=socket_of(tmp_path)), contextlib.ExitStack() as stack:
        connections = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(60)]
        for at, connection in enumerate(connections):
            connection.connect(socket_of(tmp_path))
            connection.sendall((head, full[:-1], full)[at % 3])
            if at % 3 == 2:
                connection.shutdown(socket.SHUT_WR)
        async with over(socket_of(tmp_path)) as http:
            answer = await http.post(CHAT, json={"messages": QUESTION})
        assert answer.json()["choices"][0]["message"]["content"] == pack.generate(QUESTION).text
        for connection in connections[1::3]:
            connection.settimeout(30)
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
        await until_calm(app)
    nothing_is_left(pack)


LARGE: dict[str, Callable[[str], tuple[str, dict[str, Any]]]] = {
    "text": lambda text: (CHAT, {"messages": [{"role": "user", "content": text}]}),
    "ids": lambda text: ("/v1/completions", {"prompt": [70] * (len(text) // 4)}),
    "tool": lambda text: (
        CHAT,
        {
            "messages": QUESTION,
            "tools": [{"type": "function", "function": {"name": "a", "description": text, "parameters": {}}}],
        },
    ),
    "scored": lambda text: ("/v1/score", {"text_1": "a", "text_2": ["b", text]}),
    "document": lambda text: ("/v1/rerank", {"query": "a", "documents": [text]}),
    "choice": lambda text: ("/v1/decisions", {"prompt": "a", "choices": ["b", text]}),
}


@pytest.mark.parametrize("kind", LARGE)
async def test_bodies_of_10_mb_are_refused_by_size_or_for_the_window(pack, kind):
    """Not before a member reads them, and other requests are answered meanwhile."""
    path, body = LARGE[kind]("The court shall order relief. " * (10 * MB // 30))
    raw = json.dumps(body).encode()
    assert len(raw) > 9 * MB
    passes = pack.members[0].engine.forwards
    for most, status, code in ((4 * MB, 413, "too_large"), (16 * MB, 400, "context_length_exceeded")):
        async with client(create_app(pack, Settings(body_bytes=most))) as http:
            task = asyncio.create_task(http.post(path, content=raw, headers=JSON))
            assert (await http.get("/health")).status_code == 200
            answer = await task
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert pack.members[0].engine.forwards <= passes + 2  # what is before a text that is too long, at most
    nothing_is_left(pack)


@pytest.fixture
def far(byte_tokenizer, monkeypatch) -> Iterator[Served]:
    """The server of a member."""
    monkeypatch.setattr(http, "BACKOFF", 0.0)
    server = Served(english(byte_tokenizer, "far", CORPUS[:3]))
    yield server
    server.close()


@pytest.mark.enable_socket
async def test_the_server_of_a_member_dies_and_comes_back(far, byte_tokenizer):
    """Without it a request fails, or goes on where it may; once it is back, answers are what they were."""
    pack = Pack([english(byte_tokenizer, "near", CORPUS[1:]), *Loader().members([far.spec()])], max_tokens=12)
    app = create_app(pack)
    asked = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}

    async def ask(policy: str, **more: Any) -> httpx.Response:
        async with client(app) as http_:
            return await http_.post(CHAT, json={**asked, **more, "packllm": {"on_member_error": policy}})

    def said(answer: httpx.Response) -> tuple[str, bool]:
        [choice] = answer.json()["choices"]
        return choice["message"]["content"], sum(choice["packllm"]["weights"]["end"]["weights"][1:]) > 0

    def down(path: str, body: Any) -> None:
        raise Broken

    expected, (alone, _) = said(await ask("raise")), said(await ask("raise", model="near"))
    assert expected[1]
    for _ in range(2):
        far.fault = down
        assert (await ask("raise")).json()["error"]["code"] == "member_failed"
        assert (await ask("raise", stream=True)).status_code == 500
        assert (await ask("raise", model="far")).json()["error"]["code"] == "member_failed"
        assert said(await ask("drop")) == (alone, False)
        far.fault = lambda path, body: None
        answers = await asyncio.gather(*(ask("raise") for _ in range(4)))
        assert [said(answer) for answer in answers] == [expected] * 4
    await until_calm(app)


@pytest.mark.enable_socket
async def test_a_client_that_leaves_drops_the_connection_to_a_member_s_server(far):
    app = create_app(Pack.load([far.spec()], max_tokens=400))
    far.endless = True
    body = {"messages": QUESTION, "stream": True, "model": "far"}
    sent = await leaving(app, CHAT, body, lambda sent: until(lambda: len(sent) > 4))
    assert sent[0]["status"] == 200
    await until(far.dropped.is_set)
    await until_calm(app)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (protocol.Chat, {"messages": [None] * 5000}),
        (protocol.Chat, {"messages": QUESTION, "stop": [1] * 5000, "tools": [1] * 5000, "modalities": ["a"] * 5000}),
        (protocol.Completion, {"prompt": [None] * 5000}),
        (protocol.Completion, {"prompt": [1, "a"] * 5000}),
        (protocol.Completion, {"prompt": "a", "logit_bias": {str(at): "a" for at in range(5000)}}),
        (protocol.Responses, {"input": [None] * 5000, "include": [1] * 5000}),
        (protocol.Rerank, {"query": "a", "documents": [None] * 5000}),
        (protocol.Score, {"text_1": [None] * 5000, "text_2": [None] * 5000}),
        (protocol.Decide, {"prompt": "a", "choices": [None] * 5000}),
        (protocol.Detokenize, {"tokens": ["a"] * 5000}),
        (Options, {"stop": [1] * 5000, "passages": [""] * 5000, "logit_bias": {str(at): 1000 for at in range(5000)}}),
    ],
)
def test_wrong_items_are_not_all_reported(kind, body):
    """Reports of a million take minutes."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert 0 < caught.value.error_count() < 16


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=40,
    ),
    st.integers(0, 6),
)
@hypothesis_settings(max_examples=200, derandomize=True, deadline=None)
def test_json_in_parts_is_the_json_of_the_whole(value, depth):
    assert json.loads(dumps(value, depth)) == value
    assert dumps(value, depth) == dumps(value, 0)
