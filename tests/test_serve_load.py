"""packllm serve under load: who waits, who is sent away, who goes away, and that nothing is left of it."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import ctypes
import gc
import importlib.util
import json
import math
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch
from conftest import _config, byte_level_tokenizer
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from served import CHAT, QUESTION, client, events, failing, listening, socket_of, until, until_calm
from test_stress import nothing_is_left, open_sequences
from transformers import AutoModelForCausalLM

from packllm import Member, Pack
from packllm.engines.load import Loader
from packllm.serve.admission import Places
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


async def test_of_a_thousand_at_once_exactly_those_with_room_are_taken(pack):
    app = create_app(pack, Settings(running=2, queue=3))
    places = app.state.server.places
    with held(pack) as go:
        async with client(app) as http:
            tasks = [asyncio.create_task(http.post(CHAT, json={"messages": QUESTION})) for _ in range(1000)]
            await until(lambda: sum(task.done() for task in tasks) == 995)
            assert {task.result().status_code for task in tasks if task.done()} == {429}
            assert (places.running, places.waiting) == (2, 3)
            go.set()
            answers = await asyncio.gather(*tasks)
    assert Counter(answer.status_code for answer in answers) == {429: 995, 200: 5}
    assert (places.running, places.waiting) == (0, 0)


@given(
    st.lists(st.tuples(st.sampled_from(["come", "come", "leave", "finish", "tick"]), st.integers(0, 9)), max_size=60)
)
@hypothesis_settings(max_examples=150, derandomize=True, deadline=None)
def test_places_go_to_those_who_came_first_whoever_leaves(steps):
    """Nobody is refused while there is room, and no place is lost, in whatever order tasks come, leave and finish."""

    async def run() -> None:
        places, tasks, inside, entered = Places(2, 3), [], {}, []

        async def one(at: int) -> None:
            async with places.place():
                entered.append(at)
                inside[at] = asyncio.Event()
                try:
                    await inside[at].wait()
                finally:
                    del inside[at]

        for step, which in steps:
            living = [task for task in tasks if not task.done()]
            if step == "come":
                tasks.append(asyncio.create_task(one(len(tasks)), name=str(len(living))))
            elif step == "leave" and living:
                living[which % len(living)].cancel()
            elif step == "finish" and inside:
                list(inside.values())[which % len(inside)].set()
            elif step == "tick":
                await asyncio.sleep(0)
            assert places.running == len(inside) <= 2
            assert places.waiting <= 3 or places.running < 2  # a freed place may be on its way to somebody
            assert places.running + places.waiting <= 5
        for _ in range(20):
            await asyncio.sleep(0)
        assert places.running == 2 or not places.waiting
        while inside:
            for event in inside.values():
                event.set()
            for _ in range(5):
                await asyncio.sleep(0)
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert (places.running, places.waiting) == (0, 0)
        assert entered == sorted(entered)
        assert {getattr(result, "status", None) for result in done if isinstance(result, Exception)} <= {429}

    asyncio.run(run())


async def test_a_stream_whose_time_ends_says_so(pack):
    app = create_app(pack, Settings(running=1))
    body = {"messages": QUESTION, "stream": True, "max_tokens": 60, "packllm": {"draft_tokens": 1}, "timeout": 0.5}
    passes = 0
    go = threading.Event()

    def wait(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 5:
            go.wait(30)

    handle = pack.members[0].model.base_model.register_forward_pre_hook(wait)
    try:
        async with client(app) as http:
            streamed = await http.post(CHAT, json=body)
            go.set()
            for path, more in (
                ("/v1/score", {"text_1": "a b c", "text_2": "a"}),
                ("/v1/responses", {"input": "a", "stream": True}),
            ):
                passes = 4
                go.clear()
                answer = await http.post(path, json={**more, "timeout": 0.2})
                go.set()
                assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
            text = (await http.get("/metrics")).text
    finally:
        handle.remove()
    assert streamed.status_code == 200
    *parts, last = events(streamed.text)
    assert len(parts) > 1
    assert (last["error"]["code"], last["error"]["type"]) == ("timeout", "server_error")
    assert f'path="{CHAT}",status="504"}} 1.0' in text
    await until_calm(app)
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
        both = {"content-length": "2", "transfer-encoding": "chunked", "content-type": "application/json"}
        smuggled = await http.post(CHAT, content=b"{}", headers=both)
        assert (smuggled.status_code, smuggled.headers["connection"]) == (400, "close")
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
    with failing(pack.members[0], 4):
        async with client(create_app(pack)) as http:
            body = {"messages": QUESTION, "stream": True, "max_tokens": 60, "packllm": {"draft_tokens": 1}}
            answer = await http.post(CHAT, json=body)
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


TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look something up",
        "parameters": {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"]},
    },
}
CALLS = importlib.util.find_spec("llguidance") is not None


def requests() -> list[tuple[str, dict[str, Any]]]:
    """What clients ask, whole or streamed."""
    said = [[{"role": "user", "content": f"A query planner chooses an index scan {at}"}] for at in range(4)]
    asked = [(CHAT, {"messages": one}) for one in [*said, LONG]]
    asked += [(CHAT, {"messages": said[0], "temperature": 1, "seed": at, "logprobs": True}) for at in range(2)]
    asked += [(CHAT, {"messages": said[1], "model": "law", "cache_salt": "a"})]
    asked += [("/v1/completions", {"prompt": [f"Once upon {at} time", "a b"], "echo": True}) for at in range(2)]
    if CALLS:
        asked += [
            (CHAT, {"messages": one, "tools": [TOOL], "tool_choice": "required", "max_tokens": 60}) for one in said
        ]
    return asked


WRONG: list[tuple[int, bytes]] = [
    (400, b'{"messages": [], "top_p": 7}'),
    (404, b'{"messages": [{"role": "user", "content": "a"}], "model": "nobody"}'),
    (400, b"{"),
]


def told(answer: Any) -> list[Any]:
    """What a whole answer says, without what differs from time to time."""
    found = []
    for choice in answer["choices"]:
        message = choice.get("message", {"content": choice.get("text")})
        calls = [call["function"] for call in message.get("tool_calls", ())]
        found.append((message["content"] or "", calls, choice["finish_reason"]))
    return found


def told_in_parts(parts: list[dict[str, Any]]) -> list[Any]:
    """The same of a stream."""
    texts: dict[int, str] = defaultdict(str)
    calls: dict[int, list[dict[str, str]]] = defaultdict(list)
    reasons: dict[int, str] = {}
    for part in parts:
        for choice in part["choices"]:
            at, delta = choice["index"], choice.get("delta", {"content": choice.get("text")})
            texts[at] += delta.get("content") or ""
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    calls[at].append({"arguments": "", "name": call["function"]["name"]})
                calls[at][call["index"]]["arguments"] += call["function"]["arguments"]
            reasons[at] = choice["finish_reason"] or reasons.get(at, "")
    return [(texts[at], calls[at], reasons[at]) for at in sorted(reasons)]


class Storm:
    """Clients of a server that ask whole answers, streams and calls, go away in the middle, and talk nonsense.

    Attributes:
        counts: of what was done, by kind.
    """

    KINDS = ("whole", "streamed", "whole", "streamed", "cancelled", "hung up", "wrong")

    def __init__(self, where: str, asked: list[tuple[str, dict[str, Any], list[Any]]]) -> None:
        self.where, self.asked = where, asked
        self.counts: Counter[str] = Counter()

    async def client(self, seed: int, go_on: Callable[[int], bool]) -> None:
        """Asks one thing after another, each on a connection of its own or on an earlier one."""
        draw, done = random.Random(seed), 0
        transport = httpx.AsyncHTTPTransport(uds=self.where)
        async with httpx.AsyncClient(transport=transport, base_url="http://packllm", timeout=300) as http:
            while go_on(done):
                kind = self.KINDS[(seed + done) % len(self.KINDS)]
                await self._one(http, kind, draw)
                self.counts[kind] += 1
                done += 1

    async def over(self, server: Any) -> None:
        """Until the server has heard of all connections, the last of which may still wait to be accepted."""
        transport = httpx.AsyncHTTPTransport(uds=self.where)
        async with httpx.AsyncClient(transport=transport, base_url="http://packllm") as http:
            await http.get("/version")
        await until(lambda: not server.server_state.connections and not server.server_state.tasks)

    async def _one(self, http: httpx.AsyncClient, kind: str, draw: random.Random) -> None:
        path, body, expected = draw.choice(self.asked)
        if kind == "whole":
            assert told((await http.post(path, json=body)).json()) == expected
        elif kind == "streamed":
            parts = events((await http.post(path, json={**body, "stream": True})).text)
            assert told_in_parts(parts) == expected
        elif kind == "cancelled":
            asked = {**body, "stream": True, "max_tokens": 300}
            async with http.stream("POST", path, json=asked) as answer:
                async for _ in answer.aiter_lines():
                    break
        elif kind == "hung up":  # before anything came back, where it is fast
            with contextlib.suppress(httpx.TimeoutException):
                await http.post(path, json={**body, "max_tokens": 300}, timeout=draw.uniform(0.001, 0.3))
        else:
            status, raw = draw.choice(WRONG)
            answer = await http.post(CHAT, content=raw, headers={"content-type": "application/json"})
            assert answer.status_code == status
            assert answer.json()["error"]["message"]


async def one_after_another(app: Any) -> list[tuple[str, dict[str, Any], list[Any]]]:
    """The requests that this pack can answer, with what it answers."""
    found = []
    async with client(app) as http:
        for path, body in requests():
            answer = await http.post(path, json=body)
            assert answer.status_code in (200, 400), answer.text
            if answer.status_code == 200:
                found.append((path, body, told(answer.json())))
    assert len({str(expected) for *_, expected in found}) > 5
    return found


KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "tokens": ({}, 64),
    "drafts in little room": ({"draft_tokens": 3, "pool": "log", "max_cache_mb": 1, "prefix_cache_mb": 1}, 16),
    "lazy without prefixes": ({"decoding": "lazy", "temperature": 1.0, "seed": 1, "prefix_cache_mb": 0}, 16),
    "cool": ({"decoding": "cool"}, 12),
    "mined": ({"decoding": "mined"}, 6),
    "adapters": ({}, 16),
    "gguf": ({}, 16),
}
"""Packs, by what is special: their options, and how many clients they get."""


def members_of(kind: str, make_member: Any, folder: Path) -> list[Member]:
    """Two members, called general and law."""
    general = make_member("llama", 5, name="general")
    if kind == "adapters":
        config = peft.LoraConfig(init_lora_weights=False, r=4, target_modules=["q_proj", "down_proj"])
        peft.get_peft_model(copy.deepcopy(general.model), config).save_pretrained(folder / "law")
        general.model.save_pretrained(folder / "base")
        general.tokenizer.save_pretrained(folder / "base")
        return Loader().members([f"general={folder / 'base'}", f"law={folder / 'base'}+{folder / 'law'}"])
    if kind == "gguf":
        pytest.importorskip("llama_cpp", reason="the extra `gguf` is not installed")
        from test_gguf import write_gguf

        write_gguf(general, folder / "general.gguf")
        return [*Loader().members([f"general={folder / 'general.gguf'}"]), make_member("llama", 1, name="law")]
    return [general, make_member("gpt2", 1, "words" if kind in ("cool", "mined") else "bytes", name="law")]


def living() -> Counter[str]:
    """Objects of this package that have not been freed, by kind, and the bytes of tensors."""
    gc.collect()
    found: Counter[str] = Counter()
    for thing in gc.get_objects():
        kind = type(thing)
        if str(kind.__module__).startswith("packllm."):
            found[f"{kind.__module__}.{kind.__qualname__}"] += 1
        elif isinstance(thing, torch.Tensor):
            found["tensors"] += 1
            found["bytes"] += thing.nbytes
    return found


@pytest.mark.parametrize("kind", KINDS)
async def test_clients_have_the_answers_of_one_after_another_and_leave_nothing(make_member, tmp_path, kind):
    """Streams, calls, cancels and nonsense, mixed over a socket; afterwards nothing is left of any."""
    options, clients = KINDS[kind]
    pack = Pack(members_of(kind, make_member, tmp_path), max_tokens=6, **options)
    app = create_app(pack, Settings(running=16, queue=64))
    storm = Storm(socket_of(tmp_path), await one_after_another(app))
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    left: list[Counter[str]] = []
    grown: dict[str, int] = {"round": 1}
    with listening(app, uds=storm.where) as server:
        while grown and len(left) < 4:  # a leak grows with every round; caches of imported packages do not
            seeds, go_on = range(1000 * len(left), 1000 * len(left) + clients), partial(fewer, 2 - bool(left))
            await asyncio.gather(*(storm.client(seed, go_on) for seed in seeds))
            await storm.over(server)
            await until_calm(app)
            pack.generate("a", max_tokens=1)  # adapters keep the factors of the last pass: let it be the same one
            pack.prefixes.clear()
            left.append(living())
            if len(left) > 1:
                grown = {name: n - left[-2][name] for name, n in left[-1].items() if n > left[-2][name]}
    assert grown == {}
    assert storm.counts.total() >= 3 * clients
    assert min(storm.counts[kind] for kind in Storm.KINDS) >= clients // 4
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/fd")) <= files + 2
    nothing_is_left(pack)


def fewer(most: int, done: int) -> bool:
    return done < most


@pytest.mark.parametrize("drain", [None, 1])
async def test_a_server_told_to_end_lets_answers_finish(pack, tmp_path, drain):
    """Those that wait too; once its time to drain is over, it ends them."""
    app = create_app(pack, Settings(running=1, queue=3))
    places, expected = app.state.server.places, pack.generate(QUESTION).text
    transport = httpx.AsyncHTTPTransport(uds=socket_of(tmp_path))
    with held(pack) as go:
        with listening(app, uds=socket_of(tmp_path), timeout_graceful_shutdown=drain) as server:
            async with httpx.AsyncClient(transport=transport, base_url="http://packllm", timeout=60) as http:
                tasks = [asyncio.create_task(http.post(CHAT, json={"messages": QUESTION})) for _ in range(4)]
                await until(lambda: places.running + places.waiting == 4)
                server.should_exit = True  # as SIGTERM does
                if drain is None:
                    go.set()
                answers = await asyncio.gather(*tasks, return_exceptions=True)
        go.set()
    if drain is None:
        assert [one.json()["choices"][0]["message"]["content"] for one in answers] == [expected] * 4
    else:
        assert all(isinstance(one, httpx.TransportError) or one.status_code == 500 for one in answers)
    await until_calm(app)
    nothing_is_left(pack)


def resident() -> float:
    """MiB of this process."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def before(end: float, done: int) -> bool:
    return time.monotonic() < end


async def for_minutes(minutes: float, clients: int = 64) -> None:
    """The same for longer: python tests/test_serve_load.py MINUTES. Prints one line of JSON every minute."""
    members = []
    for at, (kind, name) in enumerate((("llama", "general"), ("gpt2", "law"))):
        torch.manual_seed(at)
        tokenizer = byte_level_tokenizer()
        model = AutoModelForCausalLM.from_config(_config(kind, len(tokenizer) + 24), attn_implementation="eager")
        members.append(Member(model.eval(), tokenizer, name))
    pack = Pack(members, max_tokens=6)
    app = create_app(pack, Settings(running=16, queue=64))
    with tempfile.TemporaryDirectory() as folder:
        storm = Storm(socket_of(Path(folder)), await one_after_another(app))
        with listening(app, uds=storm.where):
            for minute in range(math.ceil(minutes) + 1):
                go_on = partial(before, time.monotonic() + 60)
                for seeds in [range(1000 * minute, 1000 * minute + clients)] if minute else []:
                    await asyncio.gather(*(storm.client(seed, go_on) for seed in seeds))
                await until_calm(app)
                stats = pack.prefixes.stats
                told = {
                    "minute": minute,
                    "requests": dict(storm.counts),
                    "MiB": round(resident()),
                    "kept": stats.entries,
                }
                told |= {"kept_bytes": stats.bytes, "threads": threading.active_count()}
                told |= {"sequences": open_sequences(pack.members), "files": len(os.listdir("/proc/self/fd"))}
                print(json.dumps(told), flush=True)
    nothing_is_left(pack)


if __name__ == "__main__":
    asyncio.run(for_minutes(float(sys.argv[1])))
