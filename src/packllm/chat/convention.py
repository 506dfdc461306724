"""Tools, calls, results and schemas as plain text, for chat templates that do not support them.

The system message lists the tools, one JSON object a line, and asks for a call as JSON alone:
``{"name": "<tool>", "arguments": {...}}``. Earlier calls of the assistant are written in that form. A tool's result is
a user message, "Result of <tool>: ...". A JSON schema for the answer is also part of the system message.

Texts are joined by + and joined() only: these keep their trace, that is, which message each character is from (see
traced.py). What is joined repeatedly is collected first: a + for each message takes quadratic time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from packllm.chat.messages import Message
from packllm.chat.traced import Traced, joined, leaves, own, placed

_SYSTEM, _USER, _ASSISTANT = (own(role) for role in ("system", "user", "assistant"))
_BEFORE_USER = ("system", "developer")


def tools_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """The part of the system message about the tools."""
    lines = "\n".join(_json(tool.get("function", tool)) for tool in tools)
    call = _json({"name": "<tool>", "arguments": {"<argument>": "<value>"}})
    return (
        f"You can call these tools:\n{lines}\n"
        f"To call one, answer with JSON alone, in this form: {call}\n"
        f"You are then given its result. Answer in plain text when no tool is needed."
    )


def schema_text(schema: Mapping[str, Any]) -> str:
    """The part of the system message about the form of the answer."""
    if schema == {"type": "object"}:  # OpenAI's json_object: the messages say which object. Small models copy a schema
        return "Answer with a JSON object alone."
    return f"Answer with JSON alone, in the form of this JSON schema:\n{_json(schema)}"


def documents_text(documents: Sequence[Any]) -> str:
    """The part of the system message about documents."""
    return "Documents:\n" + "\n".join(map(_json, documents))


def with_system(messages: Sequence[Message], text: str) -> list[Message]:
    """The messages with `text` appended to the system message, or as a new one."""
    if not text:
        return list(messages)
    if messages[0]["role"] == "system":
        first = {**messages[0], "content": _join([messages[0]["content"], text])}
        return [first, *messages[1:]]
    return [{"role": _SYSTEM, "content": text}, *messages]


def written_arguments(messages: Sequence[Message]) -> list[Message]:
    """The messages with the arguments of calls as JSON text, which older templates expect."""
    return [
        {**message, "tool_calls": [_with_text(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def system_for_developer(messages: Sequence[Message]) -> list[Message]:
    """The messages with developer messages as system messages."""
    return [{**m, "role": _SYSTEM} if m["role"] == "developer" else m for m in messages]


def folded(messages: Sequence[Message]) -> list[Message]:
    """The messages with each system message moved to the start of the next user message, or made a user message."""
    turns: list[Message] = []
    pending: list[str] = []
    for message in messages:
        if message["role"] in _BEFORE_USER:
            pending += filter(None, [message.get("content")])
        elif pending and message["role"] == "user":
            turns.append({**message, "content": _join([*pending, message["content"]])})
            pending = []
        else:
            turns.append(message)
    return [*turns, {"role": _USER, "content": _join(pending)}] if pending else turns


def written_calls(messages: Sequence[Message]) -> list[Message]:
    """The messages with calls written as text; results are not changed."""
    results: list[Message] = []
    for message in messages:
        calls = message.get("tool_calls") if message["role"] == "assistant" else None
        if calls:
            texts = [message.get("content") or "", *(_json(call["function"]) for call in calls)]
            message = {"role": _ASSISTANT, "content": _join(texts, "\n")}
        results.append(message)
    return results


def written_out(messages: Sequence[Message]) -> list[Message]:
    """The messages with calls written as text and results as user messages."""
    names: dict[str, str] = {}  # tool name by call id; some clients use the same ids again in each turn
    results: list[Message] = []
    for message, result in zip(messages, written_calls(messages), strict=True):
        if message["role"] == "assistant":
            names |= {call.get("id"): call["function"]["name"] for call in message.get("tool_calls") or ()}
        if message["role"] == "tool":
            name = message.get("name") or names.get(message.get("tool_call_id", ""))
            origin = " of " + name if name else ""
            result = {"role": _USER, "content": "Result" + origin + ": " + message["content"]}
        results.append(result)
    return results


def alternating(messages: Sequence[Message]) -> list[Message]:
    """The messages in plain text for a template that needs user and assistant to alternate: system messages become part
    of user messages, and successive messages of one role are joined."""
    turns: list[tuple[Message, list[str]]] = []
    for message in written_out(messages):
        role = _USER if message["role"] in _BEFORE_USER else message["role"]
        if not turns or turns[-1][0]["role"] != role:
            turns.append(({**message, "role": role}, []))
        turns[-1][1].append(message["content"])
    return [{**message, "content": _join(contents)} for message, contents in turns]


def _with_text(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call["function"]
    arguments = function.get("arguments")
    arguments = arguments if isinstance(arguments, str) else _json(arguments)
    return {**call, "function": {**function, "arguments": arguments}}


def _join(texts: Iterable[str], between: str = "\n\n") -> str:
    parts = [part for text in texts if text for part in (between, text)]
    return parts[1] if len(parts) == 2 else joined(parts[1:])


def _json(value: Any) -> Traced:
    text = json.dumps(value, ensure_ascii=False)
    return placed(text, ((leaf, json.dumps(leaf, ensure_ascii=False)[1:-1]) for leaf in leaves(value)))
