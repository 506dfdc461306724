"""packllm serve: what the endpoints answer is what the pack answers."""

from __future__ import annotations

import importlib.util
import json
import random
from typing import Any

import naive
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import CHAT, QUESTION, ask, client, events

from packllm import Pack
from packllm.serve.app import create_app
from packllm.serve.settings import Settings

TEXT = "The court shall order relief under chapter 7 unless the debtor objects"
JSON = {"content-type": "application/json"}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look something up",
        "parameters": {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"]},
    },
}


@pytest.fixture
def pack(make_member) -> Pack:
    members = [make_member("llama", 0, name="general"), make_member("gpt2", 1, name="law")]
    return Pack(members, max_tokens=8, min_weight=0)


@pytest.fixture
def app(pack):
    return create_app(pack)


async def streamed(app: Any, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with client(app) as http:
        answer = await http.post(path, json={**body, "stream": True, "stream_options": {"include_usage": True}})
    assert answer.headers["content-type"] == "text/event-stream"
    return events(answer.text)


# Chat


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({}, {}),
        ({"temperature": 1, "seed": 3, "top_p": 0.9, "top_k": 20, "min_p": 0.01}, None),
        ({"max_completion_tokens": 3, "max_tokens": 7}, {"max_tokens": 3}),
        ({"frequency_penalty": 1.5, "logit_bias": {"70": 5}}, None),
        ({"temperature": 1, "seed": -1, "top_k": -1}, {"temperature": 1, "seed": 2**64 - 1}),
        ({"packllm": {"weighting": {"general": 0.9, "law": 0.1}, "pool": "log"}}, None),
        ({"stop": "a"}, None),
    ],
)
async def test_chat_is_the_packs_answer_whole_and_streamed(app, pack, asked, options):
    if options is None:
        options = {**{k: v for k, v in asked.items() if k != "packllm"}, **asked.get("packllm", {})}
    expected = pack.generate(QUESTION, **options)
    body = {"model": "pack", "messages": QUESTION, **asked}
    answer = await ask(app, CHAT, body)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None, "annotations": []}
    assert choice["finish_reason"] == expected.finish_reason
    assert answer["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    assert answer["usage"]["completion_tokens"] == expected.usage.completion_tokens
    first = next(pack.stream(QUESTION, **options)).weights
    assert answer["packllm"]["weights"] == {"start": first.as_dict(), "end": expected.weights.as_dict()}

    chunks = await streamed(app, CHAT, body)
    *parts, usage = chunks
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in parts) == expected.text
    assert parts[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [one["choices"][0]["finish_reason"] for one in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1]["choices"][0]["finish_reason"] == expected.finish_reason
    assert parts[-1]["packllm"]["weights"]["end"] == expected.weights.as_dict()
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == expected.usage.completion_tokens
    assert len({one["id"] for one in chunks}) == 1


async def test_a_member_answers_alone_by_its_name_and_shares_its_engine(app, pack):
    listed = [served.name for served in app.state.server.models]
    assert listed == ["pack", "general", "law"]
    for k, name in enumerate(listed[1:]):
        member = pack.members[k]
        before = member.engine.forwards
        answer = await ask(app, CHAT, {"model": name, "messages": QUESTION})
        assert member.engine.forwards > before
        assert answer["choices"][0]["message"]["content"] == Pack([member], max_tokens=8).generate(QUESTION).text
        assert answer["model"] == name
        assert answer["packllm"]["weights"]["end"]["names"] == [name]


async def test_several_answers_and_log_probabilities(app, pack):
    asked = {"n": 2, "temperature": 1, "seed": 5, "logprobs": True, "top_logprobs": 2}
    expected = pack.generate(QUESTION, **asked)
    body = {"messages": QUESTION, **asked}
    answer = await ask(app, CHAT, body)
    assert [one["message"]["content"] for one in answer["choices"]] == [one.text for one in expected]
    assert answer["usage"]["completion_tokens"] == sum(one.usage.completion_tokens for one in expected)
    assert answer["usage"]["prompt_tokens"] == expected[0].usage.prompt_tokens
    told = [[token.as_dict() for token in one.logprobs] for one in expected]
    assert [one["logprobs"]["content"] for one in answer["choices"]] == told
    assert all(len(token["top_logprobs"]) == 2 and set(token["members"]) == {"general", "law"} for token in told[0])
    pieces: dict[int, list] = {0: [], 1: []}
    for one in (await streamed(app, CHAT, body))[:-1]:
        for choice in one["choices"]:
            pieces[choice["index"]] += (choice["logprobs"] or {"content": []})["content"]
    assert list(pieces.values()) == told


@pytest.mark.parametrize("pool", ["linear", "log"])
async def test_tokens_that_are_named_are_told_at_each_place(app, pack, pool):
    """As vLLM has them, instead of the likeliest: what the whole distribution gives them."""
    named = [7, 70, 311]
    asked = {"packllm": {"pool": pool, "weighting": {"general": 0.4, "law": 0.6}}, "max_tokens": 3}
    body = {"prompt": TEXT, "logprobs": 2, "logprob_token_ids": named, "return_tokens_as_token_ids": True, **asked}
    told = (await ask(app, "/v1/completions", body))["choices"][0]["logprobs"]
    ids = pack.tokenize(TEXT)
    for token, logprob, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        rows = [naive.next_logprobs(member, ids) for member in pack.members]
        row = naive.fused(rows, [0.4, 0.6], pool).log()
        assert top == {f"token_id:{i}": pytest.approx(float(row[i]), abs=1e-4) for i in named} | {token: logprob}
        ids.append(int(token.removeprefix("token_id:")))
    chat = {"messages": QUESTION, "logprobs": True, "top_logprobs": 1, "logprob_token_ids": named, **asked}
    (choice,) = (await ask(app, CHAT, chat))["choices"]
    assert [[one["id"] for one in place["top_logprobs"]] for place in choice["logprobs"]["content"]] == [named] * 3
    for wrong in ({"logprobs": None}, {"logprob_token_ids": [10**6]}, {"logprob_token_ids": list(range(129))}):
        error = (await ask(app, "/v1/completions", {**body, **wrong}, 400))["error"]
        assert "logprob_token_ids" in error["message"]


async def test_forms_are_guaranteed(app):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"]}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    body = {"messages": QUESTION, "max_tokens": 60}
    answer = await ask(app, CHAT, {**body, "response_format": form})
    assert isinstance(json.loads(answer["choices"][0]["message"]["content"])["sure"], bool)
    for choice in ("required", {"type": "function", "function": {"name": "look_up"}}):
        asked = {**body, "tools": [TOOL], "tool_choice": choice}
        answer = await ask(app, CHAT, asked)
        (call,) = answer["choices"][0]["message"]["tool_calls"]
        assert answer["choices"][0]["finish_reason"] == "tool_calls"
        assert answer["choices"][0]["message"]["content"] is None
        assert call["type"] == "function"
        assert call["function"]["name"] == "look_up"
        assert isinstance(json.loads(call["function"]["arguments"])["sure"], bool)
        deltas = [one["choices"][0]["delta"] for one in (await streamed(app, CHAT, asked))[:-1]]
        parts = [part for delta in deltas for part in delta.get("tool_calls", ())]
        assert "".join(part["function"]["arguments"] for part in parts) == call["function"]["arguments"]
        assert [part.get("id") is not None for part in parts] == [True, *[False] * (len(parts) - 1)]
        result = {"role": "tool", "tool_call_id": call["id"], "content": "yes"}
        said = {"role": "assistant", "content": None, "tool_calls": [call]}
        await ask(app, CHAT, {**body, "tools": [TOOL], "messages": [*QUESTION, said, result]})


# Texts


async def test_completions_continue_texts_and_token_ids(app, pack):
    ids = pack.tokenize(TEXT)
    expected = pack.generate(TEXT, chat_template=False)
    for prompt in (TEXT, ids):
        answer = await ask(app, "/v1/completions", {"prompt": prompt, "logprobs": 1})
        assert answer["choices"][0]["text"] == expected.text
        assert answer["usage"]["prompt_tokens"] == len(ids)
    several = await ask(
        app, "/v1/completions", {"prompt": [TEXT, "Once upon a time"], "n": 2, "temperature": 1, "seed": 1}
    )
    found = pack.generate_batch([TEXT, "Once upon a time"], n=2, temperature=1, seed=1, chat_template=False)
    assert [one["text"] for one in several["choices"]] == [one.text for row in found for one in row]
    assert [one["index"] for one in several["choices"]] == [0, 1, 2, 3]
    chunks = await streamed(app, "/v1/completions", {"prompt": ids, "echo": True})
    assert "".join(one["choices"][0]["text"] for one in chunks[:-1]) == TEXT + expected.text


@pytest.mark.parametrize("pool", ["linear", "log"])
async def test_echo_tells_what_score_tells(app, pack, pool):
    """Of ids that a continuation begins with, in either pool; the prompt's weights are the same by being fixed."""
    fixed = {"weighting": {"general": 0.3, "law": 0.7}, "pool": pool}
    context, continuation = TEXT, " within 30 days é"
    before, after = pack.tokenize(context), pack.members[0].encoder.continuation(continuation)
    body = {"prompt": [*before, *after], "max_tokens": 1, "echo": True, "logprobs": 1, "packllm": fixed}
    told = (await ask(app, "/v1/completions", body))["choices"][0]
    given = told["logprobs"]
    assert given["token_logprobs"][0] is None
    assert len(given["tokens"]) == len(before) + len(after) + 1
    (expected,) = pack.score(context, [continuation], **fixed)
    assert sum(given["token_logprobs"][len(before) : -1]) == pytest.approx(expected, abs=1e-4)
    pairs = list(zip(given["token_logprobs"], given["top_logprobs"], strict=True))[1:]
    assert all(max(top.values()) >= one for one, top in pairs)
    assert given["text_offset"][len(before)] == len(context)
    assert given["text_offset"][-1] == len(context + continuation)
    read = {"prompt": body["prompt"], "max_tokens": 0, "prompt_logprobs": 2, "packllm": fixed}
    listed = (await ask(app, "/v1/completions", read))["choices"][0]["prompt_logprobs"]
    firsts = [next(iter(one.values()))["logprob"] for one in listed[1:]]
    assert firsts == given["token_logprobs"][1:-1]
    assert [next(iter(one)) for one in listed[1:]] == [str(i) for i in body["prompt"][1:]]
    assert all(one["rank"] == 1 for entry in listed[1:] for one in [max(entry.values(), key=lambda e: e["logprob"])])


async def test_the_token_that_ends_an_answer_is_told(make_member):
    """Clients that judge count on one more token than the prompt has, also where the answer ends at once."""
    pack = Pack([make_member("llama", 0)], logit_bias={"<|im_end|>": 100}, max_tokens=4)
    answer = await ask(create_app(pack), "/v1/completions", {"prompt": TEXT, "echo": True, "logprobs": 0})
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (TEXT, "stop")
    assert choice["logprobs"]["tokens"][-1] == "<|im_end|>"
    assert len(choice["logprobs"]["tokens"]) == len(pack.tokenize(TEXT)) + 1


async def test_scores_and_tokens(app, pack):
    texts = [" within 30 days", " is Paris", " a + b"]
    answer = await ask(app, "/v1/score", {"text_1": TEXT, "text_2": texts})
    assert [one["score"] for one in answer["data"]] == pack.score(TEXT, texts)
    answer = await ask(app, "/v1/score", {"text_1": [TEXT, "a b"], "text_2": texts[:2], "model": "law"})
    alone = Pack([pack.members[1]])
    assert [one["score"] for one in answer["data"]] == [*alone.score(TEXT, texts[:1]), *alone.score("a b", texts[1:2])]
    answer = await ask(app, "/v1/rerank", {"query": TEXT, "documents": [texts[0], {"text": texts[1]}, texts[2]]})
    assert [(one["document"]["text"], one["relevance_score"]) for one in answer["results"]] == pack.rerank(TEXT, texts)
    assert [texts[one["index"]] for one in answer["results"]] == [text for text, _ in pack.rerank(TEXT, texts)]
    told = await ask(app, "/tokenize", {"prompt": TEXT, "return_token_strs": True})
    assert (told["tokens"], told["count"]) == (pack.tokenize(TEXT), len(pack.tokenize(TEXT)))
    assert "".join(told["token_strs"]) == TEXT
    assert (await ask(app, "/detokenize", {"tokens": told["tokens"]}))["prompt"] == TEXT
    messages = (await ask(app, "/tokenize", {"messages": QUESTION}))["count"]
    assert messages == pack.count_tokens(QUESTION)


async def test_decisions(app, pack):
    choices = ["yes", "no, never", "perhaps"]
    expected = json.loads(json.dumps(pack.decide(QUESTION, choices, calibrated=True).as_dict()))
    answer = await ask(app, "/v1/decisions", {"messages": QUESTION, "choices": choices, "calibrated": True})
    assert {name: answer[name] for name in expected} == expected
    await ask(app, "/v1/decisions", {"prompt": "a", "choices": ["yes", "yes"]}, 400)


# What goes wrong

WRONG = [
    (CHAT, {"messages": QUESTION, "model": "nobody"}, 404, "model_not_found", None),
    (CHAT, {"messages": []}, 400, None, "messages"),
    (CHAT, {}, 400, None, "messages"),
    (CHAT, {"messages": [{"role": "poet", "content": "a"}]}, 400, None, None),
    (CHAT, {"messages": QUESTION, "temperature": -1}, 400, None, "temperature"),
    (CHAT, {"messages": QUESTION, "top_logprobs": 2}, 400, None, "top_logprobs"),
    (CHAT, {"messages": QUESTION, "functions": [TOOL["function"]]}, 400, None, "functions"),
    (CHAT, {"messages": QUESTION, "packllm": {"fitted": "somewhere"}}, 400, None, "packllm"),
    (CHAT, {"messages": QUESTION, "packllm": {"wieghting": "em"}}, 400, None, "packllm"),
    (CHAT, {"messages": QUESTION, "max_tokens": 10**6}, 400, "context_length_exceeded", None),
    (CHAT, {"messages": QUESTION, "response_format": {"type": "json_schema"}}, 400, None, "response_format"),
    (CHAT, {"messages": QUESTION, "n": 10**6}, 400, "too_many", None),
    (CHAT, {"messages": QUESTION, "tool_choice": "required"}, 400, None, "tool_choice"),
    ("/v1/completions", {"prompt": "a b", "best_of": 3}, 400, None, "best_of"),
    ("/v1/completions", {"prompt": [7, 10**9]}, 400, None, None),
    ("/v1/completions", {"prompt": []}, 400, None, "prompt"),
    ("/v1/completions", {"prompt": "\ud800 lone"}, 400, None, None),
    ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, 400, None, None),
    ("/v1/nothing", {}, 404, None, None),
]


@pytest.mark.parametrize(("path", "body", "status", "code", "param"), WRONG)
async def test_what_goes_wrong_has_its_status_and_openais_form(app, path, body, status, code, param):
    error = (await ask(app, path, body, status))["error"]
    assert error["message"]
    assert error["code"] == code
    if param is not None:
        assert error["param"] == param
    if body.get("messages") and status != 404:  # the same before a stream begins
        assert (await ask(app, path, {**body, "stream": True}, status))["error"] == error


async def test_what_fails_in_a_member_is_logged_and_told(app, pack, caplog):
    def fail(*args: Any) -> None:
        raise RuntimeError("out of everything")

    handle = pack.members[0].model.base_model.register_forward_pre_hook(fail)
    try:
        error = (await ask(app, CHAT, {"messages": QUESTION}, 500))["error"]
    finally:
        handle.remove()
    assert error["code"] == "member_failed"
    assert "out of everything" in error["message"]
    assert any("out of everything" in record.getMessage() for record in caplog.records)
    assert (await ask(app, CHAT, {"messages": QUESTION}))["choices"]


async def test_while_models_are_loaded_nothing_but_health_answers(pack):
    app = create_app()
    async with client(app) as http:
        for path in ("/health", "/v1/models"):
            answer = await http.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
            assert "retry-after" in answer.headers
        app.state.server.ready(pack)
        assert (await http.get("/health")).json()["models"] == ["pack", "general", "law"]
        assert (await http.get("/version")).status_code == 200


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = """
model messages prompt max_tokens temperature top_p top_k min_p stop seed n stream stream_options tools tool_choice
response_format logprobs top_logprobs logit_bias presence_penalty chat_template_kwargs packllm echo prompt_logprobs
query documents text_1 text_2 tokens cache_salt timeout best_of input instructions choices
"""
RIGHT: dict[str, dict[str, Any]] = {
    CHAT: {"messages": QUESTION, "max_tokens": 2},
    "/v1/completions": {"prompt": "a b c", "max_tokens": 2},
    "/v1/responses": {"input": "a b c", "max_output_tokens": 2},
    "/v1/score": {"text_1": "a b", "text_2": "c"},
    "/v1/rerank": {"query": "a b", "documents": ["c", {"text": "d"}]},
    "/v1/decisions": {"prompt": "a b", "choices": ["yes", "no"]},
    "/tokenize": {"prompt": "a b"},
    "/detokenize": {"tokens": [70]},
}


SCHEMA = {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"]}
SAMPLED = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 1, "stop": ["a", "b"], "logit_bias": {"70": 1}, "n": 2}
SAMPLED |= {"logprob_token_ids": [7], "cache_salt": "a", "timeout": 9.0}
SAMPLED |= {"packllm": {"weighting": "em", "tau": 1.0}, "model": "pack", "presence_penalty": 1}
CALL = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": '{"sure": true}'}}
SAID = [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
SAID += [{"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "yes"}]}]
FORM = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
FULL: dict[str, dict[str, Any]] = {
    CHAT: {"messages": SAID, "tools": [TOOL], "tool_choice": "auto", "logprobs": True, "top_logprobs": 2, **SAMPLED},
    "/v1/completions": {
        "prompt": [[70, 71], [72]],
        "echo": True,
        "logprobs": 1,
        "max_tokens": 24,
        **SAMPLED,
        "response_format": FORM,
    },
    "/v1/responses": {
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "function_call", "call_id": "1", "name": "look_up", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "yes"},
        ],
        "tools": [{"type": "function", **TOOL["function"]}],
        "text": {"format": {"type": "json_schema", "name": "answer", "schema": SCHEMA}},
        "max_output_tokens": 24,
        "reasoning": {"effort": "low"},
        "instructions": "a",
        "include": ["message.output_text.logprobs"],
    },
    "/v1/score": {"text_1": ["a b"], "text_2": ["c", "d"], "packllm": {"pool": "log"}},
    "/v1/rerank": {"query": "a b", "documents": ["c", {"text": "d"}], "top_n": 1, "return_documents": False},
    "/v1/decisions": {"messages": QUESTION, "choices": ["yes", "no"], "calibrated": True},
    "/tokenize": {"messages": QUESTION, "tools": [TOOL], "chat_template_kwargs": {"a": 1}, "return_token_strs": True},
    "/detokenize": {"tokens": [70, 71]},
}
ODD = [
    None,
    True,
    -1,
    0,
    2**63,
    10**400,
    0.5,
    -1e308,
    "",
    "a",
    "\ud800",
    "\x00",
    "<|im_end|>",
    [],
    {},
    [[]],
    [None],
    {"": 1},
]


def mutated(value: Any, draw: random.Random) -> Any:
    """A value in which something, at any depth, is missing, doubled, odd or nested once more."""
    inside = value if isinstance(value, dict | list) and value else None
    if inside is not None and draw.random() < 0.75:
        inside = dict(value) if isinstance(value, dict) else list(value)
        at = draw.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
        if draw.random() < 0.2:
            del inside[at]
        else:
            inside[at] = mutated(inside[at], draw)
        return inside
    return draw.choice([*ODD, [value], {"a": value}, [value, value], str(value), draw.choice(ODD)])


BODIES = st.one_of(
    st.builds(
        lambda path, fields, whole: (path, {**RIGHT[path], **fields} if whole else fields, whole and not fields),
        st.sampled_from(sorted(RIGHT)),
        st.dictionaries(st.sampled_from(FIELDS.split()), json_values, max_size=4),
        st.booleans(),
    ),
    st.builds(
        lambda path, seed, brief: (path, mutated({**FULL[path], **brief}, random.Random(seed)), False),
        st.sampled_from(sorted(FULL)),
        st.integers(0, 2**32),
        st.sampled_from([{}, {"stream": True, "stream_options": {"include_usage": True}}]),
    ),
)


@settings(max_examples=1000, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(BODIES)
async def test_any_body_has_an_answer(fuzzed, asked):
    """Never a 500, never a hang: bodies of OpenAI's fields with values of any kind, and full ones with a fault."""
    path, body, right = asked
    async with client(fuzzed) as http:
        answer = await http.post(path, content=json.dumps(body).encode(), headers=JSON)
    assert answer.status_code in (200, 400, 404, 501, 504), answer.text
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["message"]
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.text.startswith(("data: ", "event: "))
        assert not any('"server_error"' in line for line in answer.text.splitlines() if "error" in line[:16])
    if right:
        assert answer.status_code == 200, answer.text
    assert fuzzed.state.server.places.running == 0


@pytest.mark.parametrize("path", sorted(FULL))
async def test_the_full_bodies_are_right(fuzzed, path):
    """Or what is made of them would be refused for something else."""
    asked = dict(FULL[path])
    if importlib.util.find_spec("llguidance") is None:
        asked = {name: value for name, value in asked.items() if name not in ("response_format", "text", "tools")}
    await ask(fuzzed, path, asked)


@pytest.fixture(scope="module")
def fuzzed(make_member):
    return create_app(Pack([make_member("llama", 0, name="general")], max_tokens=2), Settings(timeout=20))


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"[1]", b"null", b'{"messages": ' + b"[" * 20000, b"NaN"])
async def test_what_is_no_json_is_refused(app, raw):
    async with client(app) as http:
        answer = await http.post(CHAT, content=raw, headers=JSON)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_a_page_elsewhere_cannot_ask_without_being_allowed(pack):
    """A browser sends other content types to any server without asking it first."""
    for origins, allowed in ((), None), (("https://a.example",), "https://a.example"):
        async with client(create_app(pack, Settings(origins=origins))) as http:
            headers = {"content-type": "text/plain", "origin": "https://a.example"}
            refused = await http.post(CHAT, content=json.dumps({"messages": QUESTION}).encode(), headers=headers)
            assert refused.status_code == 400
            assert "application/json" in refused.json()["error"]["message"]
            asks = {"origin": "https://a.example", "access-control-request-method": "POST"}
            answer = await http.options(CHAT, headers=asks)
            assert answer.headers.get("access-control-allow-origin") == allowed
