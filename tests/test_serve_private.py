"""What packllm serve tells of one client to others, or to logs and metrics: nothing that is the client's own."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from served import CHAT, QUESTION, client, events, failing, leaving, until, until_calm
from serving import Served, english
from test_stress import nothing_is_left

from packllm import Pack
from packllm.engines.server import http
from packllm.serve.app import create_app
from packllm.serve.settings import Settings

SECRET = "xylophone quagmire 4711"
LONG = f"The court shall order relief under chapter 7 unless the debtor objects, {SECRET}. " * 3


@pytest.fixture
def pack(make_member) -> Pack:
    return Pack([make_member("llama", 0, name="general"), make_member("gpt2", 1, name="law")], max_tokens=6)


def asked(text: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """A request to each endpoint that reads a text."""
    messages = [{"role": "user", "content": text}]
    return {
        "chat": (CHAT, {"messages": messages}),
        "stream": (CHAT, {"messages": messages, "stream": True}),
        "completion": ("/v1/completions", {"prompt": text}),
        "echo": ("/v1/completions", {"prompt": text, "echo": True, "logprobs": 1, "max_tokens": 0}),
        "responses": ("/v1/responses", {"input": text}),
        "score": ("/v1/score", {"text_1": text, "text_2": "a"}),
        "rerank": ("/v1/rerank", {"query": text, "documents": ["a"]}),
        "decisions": ("/v1/decisions", {"messages": messages, "choices": ["a", "b"]}),
        "tokenize": ("/tokenize", {"prompt": text}),
    }


# Logs


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """All that any logger writes, with tracebacks."""
    text, root = io.StringIO(), logging.getLogger()
    handler, level = logging.StreamHandler(text), root.level
    handler.addFilter(lambda record: record.name != "httpx")  # the client's own
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield text
    root.removeHandler(handler)
    root.setLevel(level)


@pytest.mark.parametrize("policy", ["raise", "drop"])
async def test_no_text_of_a_prompt_is_logged_when_members_fail(pack, logged, policy):
    """At every pass of each endpoint in turn."""
    app, at, passes = create_app(pack), 0, 0

    def fail(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == at + 1:
            raise RuntimeError("out of everything")

    hooks = [member.model.base_model.register_forward_pre_hook(fail) for member in pack.members]
    try:
        async with client(app) as http_:
            for path, body in asked(LONG).values():
                for first in range(4):
                    at, passes = first, 0
                    answer = await http_.post(path, json={**body, "packllm": {"on_member_error": policy}})
                    assert answer.status_code in (200, 500)
            wrong = {"messages": [{"role": SECRET, "content": LONG}], "temperature": SECRET, SECRET: SECRET}
            assert (await http_.post(CHAT, json=wrong)).status_code == 400
            assert (await http_.post(CHAT, content=SECRET.encode())).status_code == 400
            assert (await http_.post(f"/{SECRET}", json={SECRET: 1}, headers={"x-request-id": "a"})).status_code == 404
            assert (await http_.get(f"/v1/models/{SECRET}?{SECRET}")).status_code == 404
    finally:
        for hook in hooks:
            hook.remove()
    assert "out of everything" in logged.getvalue()
    assert "xylophone" not in logged.getvalue()
    assert "quagmire" not in logged.getvalue()


@pytest.mark.enable_socket
@pytest.mark.parametrize("status", [400, 422, 500, 200])
async def test_what_a_member_s_server_quotes_is_told_but_not_logged(byte_tokenizer, monkeypatch, logged, status):
    monkeypatch.setattr(http, "BACKOFF", 0.0)
    server = Served(english(byte_tokenizer, "far"))
    try:
        pack = Pack.load([server.spec()], max_tokens=6)

        def fault(path: str, body: Any) -> Any:
            said = f"the field stream_options of your request {json.dumps(body)[:200]} is unknown"
            return status, {}, json.dumps({"error": {"message": said, "code": 400}}) if body else None

        server.fault = fault
        async with client(create_app(pack)) as http_:
            for stream in (False, True):
                message = [{"role": "user", "content": f"{SECRET} what is the capital of France?"}]
                answer = await http_.post(CHAT, json={"messages": message, "stream": stream})
                assert answer.json()["error"]["code"] == "member_failed"
                assert "xylophone" in answer.text
    finally:
        server.close()
    assert "far" in logged.getvalue()
    assert "xylophone" not in logged.getvalue()


# Caches


@pytest.mark.parametrize("kind", [kind for kind in asked("") if kind not in ("stream", "tokenize")])
async def test_salts_keep_prompts_apart_at_each_endpoint(pack, kind):
    """Counted in tokens that were not read again, which the response time would tell."""
    app, (path, body) = create_app(pack), asked(LONG)[kind]

    async def reused(**more: Any) -> int:
        before = pack.prefixes.stats.tokens
        async with client(app) as http_:
            answer = await http_.post(path, json={**body, **more})
        assert answer.status_code == 200, answer.text
        usage = answer.json().get("usage", {})
        details = usage.get("prompt_tokens_details", usage.get("input_tokens_details", {}))
        tokens = pack.prefixes.stats.tokens - before
        assert bool(details.get("cached_tokens", tokens)) == bool(tokens) or kind == "echo"
        return tokens

    assert await reused(cache_salt="a") == 0
    assert await reused(cache_salt="a") > 0
    assert await reused(packllm={"cache_salt": "a"}) > 0
    for other in ({"cache_salt": "b"}, {}, {"cache_salt": "A" * 10**6}, {"cache_salt": "\u00e4"}):
        assert await reused(**other) == 0
        assert await reused(model="law", **other) > 0  # its own part of the same tenant's
        assert await reused(**other) > 0
    for at, model in enumerate(("general", "law")):
        assert await reused(model=model, cache_salt=f"c{at}") == 0
    assert sum(len(entry.salt or "") for entry in pack.prefixes._entries) < 10**4
    async with client(app) as http_:
        for wrong in ({"cache_salt": ""}, {"packllm": {"cache_salt": ""}}, {"cache_salt": 1}):
            assert (await http_.post(path, json={**body, **wrong})).status_code == 400


async def test_requests_in_flight_share_nothing_across_salts(pack):
    app = create_app(pack)
    async with client(app) as http_:
        bodies = [{**asked(LONG)["chat"][1], "cache_salt": str(at)} for at in range(6)]
        answers = await asyncio.gather(*(http_.post(CHAT, json=body) for body in bodies))
    told = [answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert told == [0] * 6
    assert pack.prefixes.stats.tokens == 0
    nothing_is_left(pack)


# Metrics


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Values by name and labels; fails where Prometheus' own parser does."""
    found: dict[tuple[str, ...], float] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            key = (sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items())))
            assert key not in found
            found[key] = sample.value
    return found


async def test_metrics_count_what_was_done_and_never_go_back(pack):
    app = create_app(pack, Settings(running=1, queue=0, timeout=30))
    places, path = app.state.server.places, f"path={CHAT}"
    counts = [samples(await app_metrics(app))]

    async def grown(*names: str) -> float:
        return counts[-1].get(names, 0) - counts[-2].get(names, 0)

    async with client(app) as http_:

        async def ask(where: str = CHAT, **body: Any) -> Any:
            before = dict.fromkeys(["messages"], QUESTION) if where == CHAT else {}
            answer = await http_.post(where, json={**before, **body})
            counts.append(samples(await app_metrics(app)))
            for key, value in counts[-2].items():
                if key[0].endswith(("_total", "_count", "_sum", "_bucket")):
                    assert counts[-1][key] >= value, key
            return answer

        usage = (await ask(n=3, temperature=1.0)).json()["usage"]
        assert await grown("packllm_requests_total", path, "status=200") == 1
        assert await grown("packllm_prompt_tokens_total") == usage["prompt_tokens"]  # one prompt, three answers
        assert await grown("packllm_completion_tokens_total") == usage["completion_tokens"]
        assert await grown("packllm_time_to_first_token_seconds_count") == 3
        assert await grown("packllm_member_weight_count", "member=law") == 3

        parts = events((await ask(stream=True, stream_options={"include_usage": True})).text)
        assert await grown("packllm_completion_tokens_total") == parts[-1]["usage"]["completion_tokens"]
        assert await grown("packllm_answer_tokens_per_second_count") == 1

        whole = [{"role": "user", "content": LONG}]
        usage = [(await ask(messages=whole)).json()["usage"] for _ in range(2)][1]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert cached > 0
        assert await grown("packllm_cached_prompt_tokens_total") == cached
        assert await grown("packllm_prefix_cache_hits_total") == len(pack.members)

        for where, body in (
            ("/v1/score", {"text_1": "a b", "text_2": ["c", "d"]}),
            ("/v1/rerank", {"query": "a b", "documents": ["c"]}),
            ("/v1/decisions", {"prompt": "a b", "choices": ["c", "d"]}),
            ("/v1/completions", {"prompt": "a b c", "max_tokens": 0, "echo": True}),
        ):
            usage = (await ask(where, **body)).json().get("usage", {})
            assert await grown("packllm_requests_total", f"path={where}", "status=200") == 1
            assert await grown("packllm_prompt_tokens_total") == usage.get("prompt_tokens", len(pack.tokenize("a b")))

        await ask(temperature=-1)
        assert await grown("packllm_requests_total", path, "status=400") == 1
        assert await grown("packllm_prompt_tokens_total") == 0

        async with places.place():
            await ask()
        assert await grown("packllm_requests_total", path, "status=429") == 1

        with failing(pack.members[0], 6):
            assert (await ask(stream=True, max_tokens=60, packllm={"draft_tokens": 1})).status_code == 200
        assert await grown("packllm_requests_total", path, "status=500") == 1  # a stream that ended in an error
        assert await grown("packllm_requests_total", path, "status=200") == 0

        held, go = threading.Event(), threading.Event()
        holds = pack.members[0].model.base_model.register_forward_pre_hook(
            lambda *_: held.set() or (go.wait(30) and None)
        )
        await leaving(app, CHAT, {"messages": QUESTION, "stream": True}, lambda sent: until(held.is_set))
        go.set()
        holds.remove()
        await until_calm(app)
        for at in range(3):
            await http_.request(f"X{at}", CHAT)
            await http_.get(f"/nowhere/{at}")
            await http_.get(f"/v1/models/{at}")
        await ask(model="nobody")
        await ask(packllm={"weighting": {"nobody": 1}})
    assert await grown("packllm_requests_total", path, "status=400") == 1
    last = counts[-1]
    assert last["packllm_requests_total", path, "status=499"] == 1
    assert {key[1] for key in last if key[0] == "packllm_requests_total"} == {
        *(f"path={where}" for where in (CHAT, "/v1/completions", "/v1/score", "/v1/rerank", "/v1/decisions")),
        *("path=/metrics", "path=other", "path=/v1/models/{name:path}"),
    }
    assert {key[1] for key in last if key[0].startswith("packllm_member")} == {"member=general", "member=law"}
    assert last[("packllm_requests_running",)] == last[("packllm_requests_waiting",)] == 0
    assert last["packllm_batch_size", "member=law"] == 1
    nothing_is_left(pack)


async def app_metrics(app: Any) -> str:
    async with client(app) as http_:
        answer = await http_.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return answer.text
