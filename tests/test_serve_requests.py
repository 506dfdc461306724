"""Requests of clients as they send them, and what these read in the answer; without the clients."""

from __future__ import annotations

import json

import pytest
from served import CHAT, QUESTION, client, events

from packllm import Pack
from packllm.serve.app import create_app

pytest.importorskip("llguidance", reason="the extra `structured` is not installed")

SCHEMA = {
    "properties": {"sure": {"title": "Sure", "type": "boolean"}},
    "required": ["sure"],
    "title": "Answer",
    "type": "object",
    "additionalProperties": False,
}
FORMAT = {"name": "Answer", "strict": True, "schema": SCHEMA}
NAMED = {"name": "Answer", "description": "An answer.", "parameters": SCHEMA}


@pytest.fixture
def app(make_member):
    return create_app(Pack([make_member("llama", 0, name="general")], max_tokens=100))


async def test_demanded_call_wins_over_a_response_format(app):
    """instructor (RESPONSES_TOOLS) sends both; OpenAI calls the tool, for the format is one of texts."""
    asked = {
        "model": "general",
        "input": QUESTION,
        "tools": [{"type": "function", **NAMED}],
        "tool_choice": {"type": "function", "name": "Answer"},
        "text": {"format": {"type": "json_schema", **FORMAT}},
    }
    chat = {
        "model": "general",
        "messages": QUESTION,
        "tools": [{"type": "function", "function": NAMED}],
        "response_format": {"type": "json_schema", "json_schema": FORMAT},
    }
    async with client(app) as http:
        (item,) = (await http.post("/v1/responses", json=asked)).json()["output"]
        assert (item["type"], item["name"]) == ("function_call", "Answer")
        assert isinstance(json.loads(item["arguments"])["sure"], bool)
        for choice in ("required", {"type": "function", "function": {"name": "Answer"}}):
            whole = (await http.post(CHAT, json={**chat, "tool_choice": choice})).json()["choices"][0]
            assert whole["finish_reason"] == "tool_calls"
            assert whole["message"]["content"] is None
            (call,) = whole["message"]["tool_calls"]
            assert isinstance(json.loads(call["function"]["arguments"])["sure"], bool)
            streamed = events((await http.post(CHAT, json={**chat, "tool_choice": choice, "stream": True})).text)
            assert streamed[-1]["choices"][0]["finish_reason"] == "tool_calls"
        plain = (await http.post(CHAT, json={**chat, "tool_choice": "none"})).json()["choices"][0]["message"]
        assert isinstance(json.loads(plain["content"])["sure"], bool)
