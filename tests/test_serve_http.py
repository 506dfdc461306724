"""packllm serve below the fields: bodies of every kind, paths, methods, headers, and work that stays linear."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from served import CHAT, QUESTION, ask, send

from packllm import Pack, PackError
from packllm.chat import traced
from packllm.serve.app import create_app
from packllm.serve.settings import Settings


@pytest.fixture(scope="module")
def pack(make_member) -> Pack:
    members = [make_member("llama", 0, name="general"), make_member("gpt2", 1, name="law")]
    return Pack(members, max_tokens=2, min_weight=0)


@pytest.fixture(scope="module")
def app(pack) -> Any:
    return create_app(pack)


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


BODY = json.dumps({"messages": QUESTION, "max_tokens": 1}).encode()
BODIES = [
    (b"\xef\xbb\xbf" + BODY, 200, {}),
    (BODY[:-1] + b', "metadata": ' + nested(50) + b"}", 200, {}),
    (BODY, 200, {"content-type": "application/json; charset=utf-8"}),
    (BODY, 400, {"content-type": "text/plain"}),
    (BODY, 415, {"content-encoding": "gzip"}),
    (BODY + b"x", 400, {}),
    (BODY.replace(b"France", b"\xe9"), 400, {}),
    (BODY[:-1] + b', "seed": ' + b"9" * 5000 + b"}", 400, {}),
    (BODY[:-1] + b', "\\ud800": 1}', 400, {}),
    *((BODY[:-1] + b', "temperature": %s}' % number, 400, {}) for number in (b"NaN", b"Infinity", b"1e999")),
    *(
        (BODY[:-1] + b', "%s": %s}' % (name, template % nested(depth)), 400, {})
        for depth in (200, 20_000)
        for name, template in (
            (b"chat_template_kwargs", b"%s"),
            (b"tools", b'[{"type": "function", "function": {"name": "f", "parameters": %s}}]'),
            (b"response_format", b'{"type": "json_schema", "json_schema": {"name": "f", "schema": %s}}'),
            (b"unknown", b"%s"),
        )
    ),
]


@pytest.mark.parametrize(("body", "status", "headers"), BODIES)
async def test_bodies_of_every_kind(app, caplog, body, status, headers):
    answer = await send(app, CHAT, body, **headers)
    assert answer.status_code == status, answer.text
    if status != 200:
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert not (error["param"] or "").isdigit()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *(("POST", path, 200) for path in (f"{CHAT}/", f"/{CHAT}", "/chat/completions", "/v1//chat/completions")),
        *(("GET", path, 200) for path in ("/models", "/v1/models/", "/models/law", "/v1/models/law/")),
        *(("HEAD", path, 200) for path in ("/", "/health", "/v1/models")),
        *((method, CHAT, 405) for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS")),
        *(("POST", path, 404) for path in ("/v1/embeddings", "/v1", "/V1/models")),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/responses/resp_1", 404),
    ],
)
async def test_paths_and_methods(app, method, path, status):
    answer = await send(app, path, BODY, method)
    assert answer.status_code == status, answer.text
    if method == "HEAD":
        assert answer.content == b""
    elif status != 200:
        assert f"{method} {path}" in answer.json()["error"]["message"]
    if status == 405:
        assert answer.headers["allow"] in ("POST", "GET")


async def test_requests_have_an_id_in_their_answer_and_in_the_log(app, caplog):
    caplog.set_level("INFO", logger="packllm.serve")
    seen = set()
    for path, body, own in (
        (CHAT, BODY, "client-1"),
        (CHAT, BODY[:-1] + b', "stream": true}', "a/b:c"),
        (CHAT, BODY, ""),
        (CHAT, b"{", "x y"),
        ("/v1/nothing", b"{}", "n" * 200),
    ):
        answer = await send(app, path, body, **({"x-request-id": own} if own else {}))
        name = answer.headers["x-request-id"]
        assert (name == own) is (own in ("client-1", "a/b:c"))
        assert sum(name in record.getMessage() for record in caplog.records) == 1
        seen.add(name)
    assert len(seen) == 5


async def test_pages_of_allowed_origins_may_ask_with_keys(pack):
    app = create_app(pack, Settings(keys=("secret",), origins=("https://a.example",)))
    origin = {"origin": "https://a.example"}
    wanted = "authorization,content-type,x-stainless-os"
    asks = {"access-control-request-method": "POST", "access-control-request-headers": wanted}
    before = await send(app, CHAT, b"", "OPTIONS", **origin, **asks)
    assert before.status_code == 200
    assert before.headers["access-control-allow-headers"] == wanted
    for key, status in (("wrong", 401), ("secret", 200)):
        answer = await send(app, CHAT, BODY, authorization=f"Bearer {key}", **origin)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert "x-request-id" in answer.headers["access-control-expose-headers"]


async def test_arguments_and_options_that_are_nested_deeply_are_refused_not_failed(app, pack, caplog):
    """JSON in a text, too, which no check of the body sees; and what the library itself is given."""
    for depth in (600, 900, 5_000):
        deep = "[" * depth + "]" * depth
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": deep}}
        messages = [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]}, *QUESTION]
        error = (await ask(app, CHAT, {"messages": messages}, 400))["error"]
        assert error["param"] == "messages"
        items = [*QUESTION, {"type": "function_call", "call_id": "1", "name": "f", "arguments": deep}, *QUESTION]
        await ask(app, "/v1/responses", {"input": items}, 400)
        assert (await send(app, "/tokenize", {"messages": messages})).status_code in (200, 400)
        with pytest.raises(PackError):
            pack.generate(QUESTION, chat_template_kwargs={"a": json.loads(nested(min(depth, 900)))})
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_work_for_many_calls_messages_and_tools_is_linear(make_member, monkeypatch):
    """Runs of traced text are what joining costs."""
    member = make_member("llama", 0, name="general")
    app, work = create_app(Pack([member], max_tokens=1)), 0
    merged = traced._merged

    def counted(runs: Any) -> Any:
        nonlocal work
        listed = list(runs)
        work += len(listed)
        return merged(listed)

    monkeypatch.setattr(traced, "_merged", counted)
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}

    def bodies(n: int) -> list[dict[str, Any]]:
        calls = [{**call, "id": str(i)} for i in range(n)]
        said = {"role": "assistant", "content": "", "tool_calls": calls}
        results = [{"role": "tool", "tool_call_id": str(i), "content": "y"} for i in range(n)]
        tools = [{"type": "function", "function": {"name": f"f{i}"}} for i in range(n)]
        return [
            {"messages": [*QUESTION, said, *results]},
            {"messages": [{"role": "system", "content": "a"}] * n + QUESTION},
            {"messages": QUESTION * n},
            {"messages": QUESTION, "tools": tools},
        ]

    for few, many in zip(bodies(40), bodies(160), strict=True):
        counts = []
        for body in (few, many):
            work = 0
            await send(app, "/tokenize", body)
            counts.append(work)
        assert 0 < counts[1] < 6 * counts[0]
