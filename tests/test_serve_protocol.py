"""packllm serve as OpenAI's package describes the protocol: fields, forms of requests, statuses, headers."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from conftest import TEMPLATE
from pydantic import TypeAdapter
from saying import saying
from served import CHAT, QUESTION, ask, events, failing, send

from packllm import Pack
from packllm.serve.app import create_app

RESPONSES, COMPLETIONS = "/v1/responses", "/v1/completions"
PARAMETERS = {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"]}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": PARAMETERS}}
OTHER = {"type": "function", "function": {"name": "look_away", "parameters": PARAMETERS}}
CALL = '<tool_call>\n{"name": "look_up", "arguments": {"sure": true}}\n</tool_call>'
THINKS = "<think>\nhm, hé\n</think>\n\nLet me see.\n"


@pytest.fixture(scope="module")
def pack(make_member) -> Pack:
    members = [make_member("llama", 0, name="general"), make_member("gpt2", 1, name="law")]
    return Pack(members, max_tokens=6, min_weight=0)


@pytest.fixture(scope="module")
def app(pack) -> Any:
    return create_app(pack)


@pytest.fixture(scope="module")
def thinker() -> Any:
    """Thinks, speaks, and calls a tool; one token a byte."""
    return create_app(saying(THINKS + CALL))


async def streamed(app: Any, path: str, body: Any) -> list[dict[str, Any]]:
    answer = await send(app, path, {**body, "stream": True})
    assert answer.status_code == 200, answer.text
    if path == RESPONSES:
        return [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line[:5] == "data:"]
    return events(answer.text)


# What OpenAI's package knows


@pytest.mark.parametrize(
    "asked", [{}, {"logprobs": True, "top_logprobs": 2, "n": 2, "temperature": 1}, {"tools": [TOOL]}]
)
@pytest.mark.parametrize("speaker", ["app", "thinker"])
async def test_chats_have_the_types_of_openais_package(request, speaker, asked):
    chat = pytest.importorskip("openai.types.chat", reason="openai is not installed")
    app = request.getfixturevalue(speaker)
    body = {"messages": QUESTION, **asked}
    answer = await send(app, CHAT, body)
    chat.ChatCompletion.model_validate_json(answer.text, strict=True)
    parts = await streamed(app, CHAT, {**body, "stream_options": {"include_usage": True}})
    for part in parts:
        chat.ChatCompletionChunk.model_validate_json(json.dumps(part), strict=True)
    assert [part["usage"] is not None for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1]["usage"]["total_tokens"] == answer.json()["usage"]["total_tokens"]
    reasoned = len("<think>\nhm, hé\n</think>".encode()) if speaker == "thinker" else 0
    for usage in (parts[-1]["usage"], answer.json()["usage"]):
        assert usage["completion_tokens_details"]["reasoning_tokens"] == reasoned * asked.get("n", 1)


async def test_responses_have_the_types_of_openais_package(app, thinker):
    types = pytest.importorskip("openai.types.responses", reason="openai is not installed")
    event_type = TypeAdapter(types.ResponseStreamEvent)
    flat = {"type": "function", **TOOL["function"]}
    told = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    seen = set()
    for asked in (
        {"input": "a", **told, "instructions": "b", "metadata": {"c": "d"}, "reasoning": {"effort": "low"}},
        {"input": "a", "tools": [flat], **told},
        {"input": [{"role": "user", "content": "a"}], "tools": [flat], "max_output_tokens": 30},
    ):
        speaker = app if "instructions" in asked else thinker
        answer = await send(speaker, RESPONSES, asked)
        types.Response.model_validate_json(answer.text, strict=True)
        made = await streamed(speaker, RESPONSES, asked)
        for number, event in enumerate(made):
            event_type.validate_json(json.dumps(event), strict=True)
            assert event["sequence_number"] == number
        seen |= {event["type"] for event in made}
        last = made[-1]["response"]
        assert last["usage"]["output_tokens"] == answer.json()["usage"]["output_tokens"]
        pieces = [event for event in made if event["type"] == "response.output_text.delta"]
        for item in last["output"]:
            if item["type"] != "message":
                continue
            (part,) = item["content"]
            assert "".join(event["delta"] for event in pieces) == part["text"]
            assert [one for event in pieces for one in event["logprobs"]] == part["logprobs"]
            if "include" in asked:
                assert bytes(byte for one in part["logprobs"] for byte in one["bytes"]).decode() == part["text"]
    kinds = {"reasoning_summary_text.delta", "function_call_arguments.delta", "output_text.delta", "incomplete"}
    assert {f"response.{kind}" for kind in (*kinds, "completed", "function_call_arguments.done")} <= seen
    assert last["usage"]["output_tokens_details"]["reasoning_tokens"] == len("<think>\nhm, hé\n</think>".encode())


async def test_a_response_that_fails_ends_as_an_error_for_every_client(pack, caplog):
    """OpenAI's packages, and what is built on them, raise at `error`; others wait for response.failed."""
    types = pytest.importorskip("openai.types.responses", reason="openai is not installed")
    with failing(pack.members[0], 6):
        body = {"input": "Why?", "max_output_tokens": 60, "packllm": {"draft_tokens": 1}}
        made = await streamed(create_app(pack), RESPONSES, body)
    for event in made:
        TypeAdapter(types.ResponseStreamEvent).validate_json(json.dumps(event), strict=True)
    *_, error, failed = made
    assert (error["type"], failed["type"]) == ("error", "response.failed")
    assert error["error"]["code"] == error["code"] == "member_failed"
    assert "out of everything" in error["message"]
    assert "out of everything" in failed["response"]["error"]["message"]
    assert (failed["response"]["status"], failed["response"]["id"]) == ("failed", made[0]["response"]["id"])
    assert "out of everything" in caplog.text


# Requests


async def test_fields_that_are_null_are_missing(app):
    """Many clients send every field that they know."""
    pytest.importorskip("openai", reason="openai is not installed")
    from openai.types import completion_create_params
    from openai.types.chat import completion_create_params as chat_params
    from openai.types.responses import response_create_params

    message = {"role": "user", "content": "a", "name": None}
    said = {
        "role": "assistant",
        "content": "b",
        "tool_calls": None,
        "function_call": None,
        "refusal": None,
        "audio": None,
    }
    function = {"name": "look_up", "description": None, "parameters": None, "strict": None}
    whole = {
        CHAT: {"messages": [message, said, message], "tools": [{"type": "function", "function": function}]},
        COMPLETIONS: {"prompt": "a b"},
        RESPONSES: {"input": [{**message, "type": None}], "tools": [{"type": "function", **function}]},
        "/v1/score": {"text_1": "a", "text_2": "b"},
        "/v1/rerank": {"query": "a", "documents": ["b"]},
        "/v1/decisions": {"prompt": "a", "choices": ["yes", "no"]},
        "/tokenize": {"prompt": "a b"},
    }
    known: dict[str, set[str]] = {
        CHAT: {*chat_params.CompletionCreateParamsBase.__annotations__, "top_k", "packllm", "chat_template_kwargs"},
        COMPLETIONS: {*completion_create_params.CompletionCreateParamsBase.__annotations__, "prompt_logprobs", "min_p"},
        RESPONSES: {*response_create_params.ResponseCreateParamsBase.__annotations__, "seed", "stop"},
    }
    others = "model stream stream_options timeout cache_salt packllm return_documents top_n calibrated messages echo"
    for path, body in whole.items():
        nulls = dict.fromkeys((known.get(path, set()) | set(others.split())) - body.keys())
        assert len(nulls) > 9
        both = [await ask(app, path, {**more, **body}) for more in ({}, nulls)]
        first, second = (_said(json.dumps(one)) for one in both)
        assert first == second != []


def _said(answer: str) -> list[str]:
    """What an answer says, without ids and times."""
    return re.findall(r'"(?:text|content|score|relevance_score|count|choice)": ("[^"]*"|[^,}]*)', answer)


ALLOWED = {"mode": "required", "tools": [{"type": "function", "function": {"name": "look_up"}}]}
FLAT = {"mode": "required", "tools": [{"type": "function", "name": "look_up"}]}


async def test_tool_choices_of_every_form(app):
    pytest.importorskip("llguidance")
    chat = {"messages": QUESTION, "tools": [OTHER, TOOL], "max_tokens": 60}
    tools = [{"type": "function", **tool["function"]} for tool in (OTHER, TOOL)]
    for choice in (
        {"type": "allowed_tools", "allowed_tools": ALLOWED},
        {"type": "function", "function": {"name": "look_up"}},
    ):
        (call,) = (await ask(app, CHAT, {**chat, "tool_choice": choice}))["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] == "look_up"
    response = {"input": QUESTION, "tools": tools, "max_output_tokens": 60}
    for choice in ({"type": "allowed_tools", **FLAT}, {"type": "function", "name": "look_up"}):
        answer = await ask(app, RESPONSES, {**response, "tool_choice": choice})
        assert [item["name"] for item in answer["output"]] == ["look_up"]
        assert answer["tool_choice"] == choice
        assert [tool["name"] for tool in answer["tools"]] == ["look_away", "look_up"]
    auto = {"type": "allowed_tools", "allowed_tools": {**ALLOWED, "mode": "auto"}}
    counts = [
        (await ask(app, CHAT, {**chat, "max_tokens": 1, **asked}))["usage"]["prompt_tokens"]
        for asked in ({"tool_choice": auto}, {"tools": [TOOL]}, {})
    ]
    assert counts[0] == counts[1] < counts[2]  # the other tool is not offered
    for wrong in (
        {"type": "allowed_tools", "allowed_tools": {**ALLOWED, "mode": "perhaps"}},
        {"type": "allowed_tools", "allowed_tools": {**ALLOWED, "tools": [{"function": {"name": "nobody"}}]}},
        {"type": "allowed_tools", "allowed_tools": None},
        {"type": "custom", "name": "look_up"},
        {"type": "mcp", "server_label": "a", "name": "look_up"},
        {"type": "auto"},
    ):
        for path, body in ((CHAT, chat), (RESPONSES, response)):
            error = (await ask(app, path, {**body, "tool_choice": wrong}, 400))["error"]
            assert error["param"] == "tool_choice"


async def test_schemas_that_are_malformed_are_refused_and_their_nulls_are_missing(app):
    pytest.importorskip("llguidance")
    nulls = {"required": None, "pattern": None, "items": None, "description": None, "additionalProperties": None}

    def form(schema: Any) -> dict[str, Any]:
        whole = {"type": "json_schema", "json_schema": {"name": "a", "strict": None, "schema": schema}}
        return {"messages": QUESTION, "max_tokens": 60, "response_format": whole}

    sure = {"type": "object", "properties": {"sure": {"type": "boolean", **nulls}}, **nulls, "required": ["sure"]}
    (choice,) = (await ask(app, CHAT, form(sure)))["choices"]
    assert isinstance(json.loads(choice["message"]["content"])["sure"], bool)
    await ask(app, CHAT, form({**PARAMETERS, "required": None}))
    for wrong in (True, 7, [["sure"]]):
        for keyword in ("required", "patternProperties", "allOf"):
            schema = {**PARAMETERS, "anyOf": [{"$ref": "#/properties"}], keyword: wrong}
            error = (await ask(app, CHAT, form(schema), 400))["error"]
            assert error["param"] == "response_format"
            tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
            asked = {"messages": QUESTION, "max_tokens": 60, "tools": [tool], "tool_choice": "required"}
            assert (await ask(app, CHAT, asked, 400))["error"]["param"] == "tools"


async def test_reasoning_that_is_sent_back_reaches_the_template():
    """As an item of /v1/responses, before a message or a call, from OpenAI's server or another."""
    shows = TEMPLATE.replace("{{ message['content'] }}", "{{ message.reasoning_content }}|{{ message['content'] }}")
    app = create_app(saying("x", shows, max_tokens=1))
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "reasoning_content": "hm", "content": "b"}]
    expected = (await ask(app, CHAT, {"messages": [*said, QUESTION[0]]}))["usage"]["prompt_tokens"]
    for thought in (
        {"summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"summary": [{"type": "summary_text", "text": "hm"}]},
    ):
        for content in ("b", [{"type": "output_text", "text": "b", "annotations": []}]):
            items = [said[0], {"type": "reasoning", "id": "rs_1", **thought}]
            items += [{"type": "message", "role": "assistant", "content": content}, QUESTION[0]]
            assert (await ask(app, RESPONSES, {"input": items}))["usage"]["input_tokens"] == expected


async def test_what_was_asked_for_is_in_the_answer(app, thinker):
    alone = {"messages": QUESTION, "model": "law", "max_tokens": 2}
    told = await ask(app, CHAT, {**alone, "prompt_logprobs": 1})
    ids = (await ask(app, "/tokenize", {"messages": QUESTION, "model": "law"}))["tokens"]
    read = {"prompt": ids, "model": "law", "max_tokens": 0, "prompt_logprobs": 1}
    assert told["prompt_logprobs"] == (await ask(app, COMPLETIONS, read))["choices"][0]["prompt_logprobs"]
    assert [next(iter(one)) for one in told["prompt_logprobs"][1:]] == [str(i) for i in ids[1:]]
    both = (await ask(app, CHAT, {**alone, "model": "pack", "prompt_logprobs": 0}))["prompt_logprobs"]
    assert [one and len(one) for one in both] == [None, *[1] * (len(ids) - 1)]

    asked = {**alone, "logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True}
    for place in (await ask(app, CHAT, asked))["choices"][0]["logprobs"]["content"]:
        assert place["token"] == f"token_id:{place['id']}"
        assert [one["token"] for one in place["top_logprobs"]] == [
            f"token_id:{one['id']}" for one in place["top_logprobs"]
        ]
    explained = (await ask(app, CHAT, {**alone, "model": "pack", "packllm": {"explain": True}}))["packllm"]
    assert explained["explanation"]["messages"][0]["text"] == QUESTION[0]["content"]
    for hidden in (False, True):
        body = {"messages": QUESTION, "include_reasoning": not hidden}
        (choice,) = (await ask(thinker, CHAT, body))["choices"]
        assert ("reasoning_content" in choice["message"]) is not hidden
        assert ("reasoning_content" in json.dumps(await streamed(thinker, CHAT, body))) is not hidden
        assert choice["message"]["content"].startswith("Let me see.")


LONG = "a b " * 600
HARMLESS = {"add_generation_prompt": True, "skip_special_tokens": True, "min_tokens": 0, "repeat_penalty": 1.0}
HARMLESS |= {"mirostat": 0, "n_predict": -1, "typical_p": 1, "suffix": "", "functions": [], "top_n_sigma": -1}
WRONG: list[tuple[str, dict[str, Any], str | None]] = [
    *((CHAT, {name: value}, name) for name, value in {"min_tokens": 3, "repeat_penalty": 1.1, "mirostat": 2}.items()),
    *((CHAT, {name: True}, name) for name in ("max_tokens", "temperature", "n", "seed", "timeout", "top_logprobs")),
    (CHAT, {"thinking_token_budget": 0}, "thinking_token_budget"),
    (CHAT, {"add_generation_prompt": False}, "add_generation_prompt"),
    (CHAT, {"skip_special_tokens": False}, "skip_special_tokens"),
    (CHAT, {"add_special_tokens": True}, "add_special_tokens"),
    (COMPLETIONS, {"add_special_tokens": False}, "add_special_tokens"),
    (CHAT, {"return_token_ids": True}, "return_token_ids"),
    (CHAT, {"json_schema": {"type": "object"}}, "json_schema"),
    (CHAT, {"logit_bias": {"70": True}}, "logit_bias"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
    (CHAT, {"max_completion_tokens": 0, "max_tokens": 3}, "max_completion_tokens"),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT, {"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options"),
    (CHAT, {"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    (CHAT, {"packllm": {"tau": -1}}, "packllm"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    (CHAT, {"messages": [{"role": "assistant", "function_call": {"name": "a", "arguments": ""}}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    (CHAT, {"tools": [TOOL, TOOL]}, "tools"),
    (CHAT, {"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools"),
    (CHAT, {"response_format": {"type": "regex"}}, "response_format"),
    (CHAT, {"model": "nobody"}, "model"),
    (COMPLETIONS, {"prompt": LONG}, "prompt"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt"),
    (COMPLETIONS, {"prompt": [[70], []]}, "prompt"),
    (COMPLETIONS, {"logprobs": True}, "logprobs"),
    (RESPONSES, {"input": LONG}, "input"),
    (RESPONSES, {"max_output_tokens": 0}, "max_output_tokens"),
    (RESPONSES, {"text": {"format": {"type": "regex"}}}, "text"),
    (RESPONSES, {"reasoning": {"effort": 5}}, "reasoning"),
    (RESPONSES, {"input": [{"role": "poet", "content": "a"}]}, "input"),
    (RESPONSES, {"metadata": {"a": 1}}, "metadata"),
    *((RESPONSES, {name: value}, name) for name, value in {"max_tokens": 5, "n": 2, "messages": QUESTION}.items()),
    *(("/v1/score", {"text_2": [wrong]}, "text_2") for wrong in ("", "\ud800", LONG)),
    ("/v1/score", {"text_1": LONG}, "text_1"),
    *(("/v1/rerank", {"documents": ["c", wrong]}, "documents") for wrong in ("", "\ud800", LONG)),
    ("/v1/rerank", {"query": LONG}, "query"),
    *(("/v1/decisions", {"choices": ["yes", wrong]}, "choices") for wrong in ("yes", "", LONG)),
    ("/v1/decisions", {"prompt": LONG}, None),
    *(("/detokenize", {"tokens": [wrong]}, None) for wrong in (-1, 10**9)),
    *((RESPONSES, {name: "a"}, name) for name in ("previous_response_id", "conversation", "response_format")),
]


@pytest.mark.parametrize(("path", "wrong", "param"), WRONG)
async def test_what_would_be_wrong_in_silence_is_refused_by_its_name(app, path, wrong, param):
    whole = {
        CHAT: {"messages": QUESTION},
        COMPLETIONS: {"prompt": "a b"},
        RESPONSES: {"input": "a b"},
        "/v1/score": {"text_1": "a b", "text_2": "c"},
        "/v1/rerank": {"query": "a b", "documents": ["c"]},
        "/v1/decisions": {"prompt": "a b", "choices": ["yes", "no"]},
        "/detokenize": {},
    }[path]
    error = (await ask(app, path, {**whole, **wrong}, 404 if "model" in wrong else 400))["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param


async def test_values_that_change_nothing_are_accepted_and_fields_of_chats_hold_in_responses(app):
    await ask(app, CHAT, {"messages": QUESTION, "max_tokens": 1, "logprobs": False, "top_logprobs": 0, **HARMLESS})
    for asked in ({"seed": 4, "temperature": 1}, {"stop": "e"}, {"logit_bias": {"70": 100}}, {"frequency_penalty": 2}):
        chat = (await ask(app, CHAT, {"messages": QUESTION, "max_completion_tokens": 5, **asked}))["choices"][0]
        answer = await ask(app, RESPONSES, {"input": QUESTION, "max_output_tokens": 5, **asked})
        assert answer["output"][0]["content"][0]["text"] == chat["message"]["content"]
