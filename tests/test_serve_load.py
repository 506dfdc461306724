"""packllm serve under load: who waits, who is sent away, who goes away, and that nothing is left of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from served import CHAT, QUESTION, client, events, listening, socket_of
from test_stress import nothing_is_left

from packllm import Pack
from packllm.serve.app import create_app
from packllm.serve.settings import Settings

LONG = [{"role": "user", "content": "The court shall order relief under chapter 7 unless the debtor objects. " * 6}]


@pytest.fixture
def pack(make_member) -> Pack:
    return Pack([make_member("llama", 0, name="general"), make_member("gpt2", 1, name="law")], max_tokens=6)


@contextlib.contextmanager
def held(pack: Pack) -> Iterator[threading.Event]:
    """The members read nothing until the event is set."""
    go = threading.Event()
    handle = pack.members[0].model.base_model.register_forward_pre_hook(lambda *args: go.wait(30) and None)
    try:
        yield go
    finally:
        go.set()
        handle.remove()


async def until(true: Any) -> None:
    while not true():
        await asyncio.sleep(0.005)


async def test_beyond_the_queue_clients_are_sent_away_and_told_when_to_come(pack):
    app = create_app(pack, Settings(running=1, queue=1))
    places = app.state.server.places
    with held(pack) as go:
        async with client(app) as http:
            tasks = [asyncio.create_task(http.post(CHAT, json={"messages": QUESTION})) for _ in range(2)]
            await until(lambda: places.running + places.waiting == 2)
            refused = await http.post(CHAT, json={"messages": QUESTION})
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
            go.set()
            assert [one.status_code for one in await asyncio.gather(*tasks)] == [200, 200]
            assert (await http.post(CHAT, json={"messages": QUESTION})).status_code == 200
    assert (places.running, places.waiting) == (0, 0)


async def test_a_request_that_takes_too_long_ends_and_says_so(pack):
    app = create_app(pack, Settings(timeout=0.2, running=1, queue=4))
    with held(pack) as go:
        async with client(app) as http:  # the second runs out of time where it waits
            answers = await asyncio.gather(*(http.post(CHAT, json={"messages": QUESTION}) for _ in range(2)))
        go.set()
    assert [one.status_code for one in answers] == [504, 504]
    assert answers[0].json()["error"]["code"] == "timeout"
    assert answers[0].headers["x-should-retry"] == "false"
    await until(lambda: not app.state.server.places.running)


async def test_a_client_that_goes_away_ends_the_work_within_one_step(pack):
    """Counted in passes: of 400 tokens asked for, none is read once the one under way is done."""
    app = create_app(pack)
    gone, told = asyncio.Event(), 0
    body = json.dumps(
        {"messages": QUESTION, "max_tokens": 400, "stream": True, "packllm": {"draft_tokens": 1}}
    ).encode()
    requests = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> dict[str, Any]:
        if (first := next(requests, None)) is not None:
            return first
        await gone.wait()
        return {"type": "http.disconnect"}

    passes = 0

    async def send(message: dict[str, Any]) -> None:
        nonlocal told, passes
        if message["type"] == "http.response.body":
            told += 1
            if told == 5:
                passes = pack.members[0].engine.forwards
                gone.set()
                await asyncio.sleep(0)

    headers = [(b"content-type", b"application/json"), (b"host", b"packllm")]
    scope = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b""}
    scope |= {"headers": headers, "http_version": "1.1", "scheme": "http", "server": ("packllm", 80), "root_path": ""}
    await app({**scope, "asgi": {"version": "3.0", "spec_version": "2.3"}, "client": None, "state": {}}, receive, send)
    await until(lambda: pack.members[0].engine.forwards <= passes + 2 and not app.state.server.places.running)
    await until(lambda: not any(thread.name.startswith("packllm_") for thread in threading.enumerate()))
    assert passes < 30
    assert pack.members[0].engine.forwards <= passes + 2  # the one under way, and one that was asked for before
    nothing_is_left(pack)


async def test_keys_sizes_and_slow_bodies(pack):
    app = create_app(pack, Settings(keys=("secret", "other"), body_bytes=2000, body_seconds=0.1))
    ask = {"url": CHAT, "json": {"messages": QUESTION}}
    async with client(app) as http:
        for headers, status in (
            ({}, 401),
            ({"authorization": "Bearer wrong"}, 401),
            ({"authorization": "Basic secret"}, 401),
            ({"authorization": "Bearer other"}, 200),
            ({"authorization": "bearer secret"}, 200),
        ):
            assert (await http.post(**ask, headers=headers)).status_code == status
        assert (await http.get("/metrics")).status_code == 401
        assert (await http.get("/health")).status_code == 200
        http.headers["authorization"] = "Bearer secret"
        long = await http.post(CHAT, json={"messages": LONG * 9})
        assert (long.status_code, long.json()["error"]["code"]) == (413, "too_large")

        async def endless() -> AsyncIterator[bytes]:
            while True:
                yield b" " * 100

        async def stuck() -> AsyncIterator[bytes]:
            yield b"{"
            await asyncio.Event().wait()

        assert (await http.post(CHAT, content=endless())).status_code == 413
        assert (await http.post(CHAT, content=stuck())).status_code == 408
        text = (await http.get("/metrics")).text
    assert 'packllm_requests_total{path="other",status="401"}' in text
    assert 'packllm_requests_total{path="/v1/chat/completions",status="200"} 2.0' in text
    assert "packllm_time_to_first_token_seconds_count 2.0" in text
    assert 'packllm_member_weight_count{member="law"} 2.0' in text


async def test_only_names_of_this_server_are_answered(pack):
    async with client(create_app(pack, Settings(hosts=("localhost", "[::1]")))) as http:
        for host, status in (("localhost:8000", 200), ("LOCALHOST", 200), ("[::1]:80", 200), ("[::1]", 200)):
            assert (await http.get("/health", headers={"host": host})).status_code == status
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", ""):
            answer = await http.get("/v1/models", headers={"host": host})
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden_host")


async def test_a_member_that_fails_in_a_stream_ends_it_with_an_error(pack, caplog):
    passes = 0

    def fail(*args: Any) -> None:
        nonlocal passes
        passes += 1
        if passes > 4:
            raise RuntimeError("out of everything")

    handle = pack.members[0].model.base_model.register_forward_pre_hook(fail)
    try:
        async with client(create_app(pack)) as http:
            body = {"messages": QUESTION, "stream": True, "max_tokens": 60, "packllm": {"draft_tokens": 1}}
            answer = await http.post(CHAT, json=body)
    finally:
        handle.remove()
    assert answer.status_code == 200
    *parts, last = events(answer.text)
    assert len(parts) > 1
    assert last["error"]["code"] == "member_failed"
    assert "out of everything" in caplog.text
    nothing_is_left(pack)


async def test_a_salt_keeps_what_was_read_to_itself(pack):
    app = create_app(pack)

    async def cached(**asked: Any) -> int:
        async with client(app) as http:
            answer = await http.post(CHAT, json={"messages": LONG, "max_tokens": 2, **asked})
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert await cached() == 0
    assert await cached() > 64
    assert await cached(cache_salt="a") == 0
    assert await cached(cache_salt="b") == 0
    assert await cached(cache_salt="a") > 64
    assert await cached(model="law") > 64  # its part of the pack's
    assert await cached(model="law", cache_salt="c") == 0
    nothing_is_left(pack)


async def test_prompts_are_not_logged_unless_asked(pack, caplog):
    caplog.set_level("INFO", logger="packllm.serve")
    for log_prompts in (False, True):
        caplog.clear()
        async with client(create_app(pack, Settings(log_prompts=log_prompts))) as http:
            await http.post(CHAT, json={"messages": QUESTION})
            await http.post(CHAT, json={"messages": QUESTION, "temperature": -1})
        assert any("/v1/chat/completions 200" in record.getMessage() for record in caplog.records)
        assert ("capital of France" in caplog.text) is log_prompts


async def test_many_clients_at_once_have_the_answers_of_one_after_another(pack, tmp_path):
    """Streams, calls, cancels and nonsense, mixed over a socket; afterwards nothing is left of any."""
    app = create_app(pack, Settings(running=8, queue=64))
    prompts = [[{"role": "user", "content": f"A query planner chooses an index scan {at}"}] for at in range(6)]
    expected = [pack.generate(prompt).text for prompt in prompts]
    draw = random.Random(3)
    counts = dict.fromkeys(("whole", "streamed", "cancelled", "wrong"), 0)

    async def one(at: int) -> None:
        kind = ("whole", "streamed", "cancelled", "wrong")[(at + draw.randrange(2)) % 4]
        which = draw.randrange(len(prompts))
        body: dict[str, Any] = {"messages": prompts[which]}
        transport = httpx.AsyncHTTPTransport(uds=socket_of(tmp_path))
        async with httpx.AsyncClient(transport=transport, base_url="http://packllm", timeout=60) as http:
            if kind == "whole":
                answer = (await http.post(CHAT, json=body)).json()
                assert answer["choices"][0]["message"]["content"] == expected[which]
            elif kind == "streamed":
                parts = events((await http.post(CHAT, json={**body, "stream": True})).text)
                text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
                assert text == expected[which]
            elif kind == "cancelled":
                asked = {**body, "stream": True, "max_tokens": 300}
                async with http.stream("POST", CHAT, json=asked) as answer:
                    async for _ in answer.aiter_lines():
                        break
            else:
                assert (await http.post(CHAT, json={**body, "top_p": 7})).status_code == 400
        counts[kind] += 1

    with listening(app, uds=socket_of(tmp_path)):
        await asyncio.gather(*(one(at) for at in range(32)))
        places = app.state.server.places
        await until(lambda: not places.running and not places.waiting)
    await until(lambda: not any(thread.name.startswith("packllm_") for thread in threading.enumerate()))
    assert sum(counts.values()) == 32
    assert min(counts.values()) >= 4
    nothing_is_left(pack)


async def test_a_server_told_to_end_lets_answers_finish(pack, tmp_path):
    app = create_app(pack)
    transport = httpx.AsyncHTTPTransport(uds=socket_of(tmp_path))
    with listening(app, uds=socket_of(tmp_path)) as server:
        async with httpx.AsyncClient(transport=transport, base_url="http://packllm", timeout=60) as http:
            with held(pack) as go:
                task = asyncio.create_task(http.post(CHAT, json={"messages": QUESTION}))
                await until(lambda: app.state.server.places.running)
                server.should_exit = True  # as SIGTERM does
                go.set()
                answer = await task
    assert answer.json()["choices"][0]["message"]["content"] == pack.generate(QUESTION).text
