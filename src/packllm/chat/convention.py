"""How tools, calls and results are put to a member whose chat template has no place for them.

The tools are listed in the system message, one JSON object a line, and a call is answered as JSON alone:
``{"name": "<tool>", "arguments": {...}}``. An assistant's earlier calls are written in that form; a tool's result is
a user's message, "Result of <tool>: ...". A JSON schema that the answer must fit is told in the system message too.

Everything here only joins texts, so a mark that stands for a text goes through unharmed (see prompt.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from packllm.chat.messages import Message


def tools_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """What the system message says of the tools."""
    lines = "\n".join(_json(tool.get("function", tool)) for tool in tools)
    call = _json({"name": "<tool>", "arguments": {"<argument>": "<value>"}})
    return (
        f"You can call these tools:\n{lines}\n"
        f"To call one, answer with JSON alone, in this form: {call}\n"
        f"You are then given its result. Answer in plain text when no tool is needed."
    )


def schema_text(schema: Mapping[str, Any]) -> str:
    """What the system message says of the form of the answer."""
    return f"Answer with JSON alone, in the form of this JSON schema:\n{_json(schema)}"


def with_system(messages: Sequence[Message], text: str) -> list[Message]:
    """The messages with `text` at the end of the system message, or as one."""
    if not text:
        return list(messages)
    if messages[0]["role"] == "system":
        first = {**messages[0], "content": _join(messages[0]["content"], text)}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def written_out(messages: Sequence[Message]) -> list[Message]:
    """The messages with calls written as text and results as the user's messages."""
    names: dict[str, str] = {}
    written: list[Message] = []
    for message in messages:
        calls = message.get("tool_calls") if message["role"] == "assistant" else None
        if calls:
            names |= {call.get("id"): call["function"]["name"] for call in calls}
            content = "\n".join(filter(None, [message["content"], *(_json(call["function"]) for call in calls)]))
            written.append({"role": "assistant", "content": content})
        elif message["role"] == "tool":
            name = message.get("name") or names.get(message.get("tool_call_id", ""))
            of = f" of {name}" if name else ""
            written.append({"role": "user", "content": f"Result{of}: {message['content']}"})
        else:
            written.append(message)
    return written


def alternating(messages: Sequence[Message]) -> list[Message]:
    """The messages, written out, for a template that wants users and assistants to take turns: the system's words
    go before the user's, and messages of one role in a row become one."""
    turns: list[Message] = []
    for message in written_out(messages):
        role = "user" if message["role"] == "system" else message["role"]
        if turns and turns[-1]["role"] == role:
            turns[-1] = {**turns[-1], "content": _join(turns[-1]["content"], message["content"])}
        else:
            turns.append({**message, "role": role})
    return turns


def _join(one: str, other: str) -> str:
    return f"{one}\n\n{other}" if one and other else one + other


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
