"""Translates messages between LangChain and a pack."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.tool import (
    InvalidToolCall,
    ToolCall,
    ToolCallChunk,
    invalid_tool_call,
    tool_call,
    tool_call_chunk,
)

import packllm

_ROLES: dict[type[BaseMessage], str] = {
    SystemMessage: "system",
    HumanMessage: "user",
    AIMessage: "assistant",
    ToolMessage: "tool",
    FunctionMessage: "tool",
}
# These parts of a content are also in AIMessage.tool_calls.
_SAID_ELSEWHERE = ("tool_use", "tool_call", "tool_call_chunk", "invalid_tool_call", "function_call")


def pack_messages(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """LangChain's messages in the pack's format, with earlier reasoning, for templates that use it.

    Raises:
        PromptError: a message that is not part of a conversation.
    """
    return [_pack_message(message) for message in messages]


def _pack_message(message: BaseMessage) -> dict[str, Any]:
    if isinstance(message, ChatMessage):
        role = message.role
    else:
        known_role = next((role for kind, role in _ROLES.items() if isinstance(message, kind)), None)
        if known_role is None:
            raise packllm.PromptError(f"{type(message).__name__} cannot be sent to a model; leave it out")
        role = known_role
    result: dict[str, Any] = {"role": role, "content": _content(message.content)}
    if message.name:
        result["name"] = message.name
    if isinstance(message, ToolMessage):
        result["tool_call_id"] = message.tool_call_id
    if isinstance(message, AIMessage) and "reasoning_content" in message.additional_kwargs:
        result["reasoning_content"] = message.additional_kwargs["reasoning_content"]
    if isinstance(message, AIMessage) and (message.tool_calls or message.invalid_tool_calls):
        calls = [(call["id"], call["name"], call["args"]) for call in message.tool_calls]
        invalid = [(call["id"], call["name"] or "", call["args"] or "") for call in message.invalid_tool_calls]
        result["tool_calls"] = [
            {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}
            for id_, name, arguments in [*calls, *invalid]
        ]
    return result


def _content(content: str | Iterable[Any]) -> Any:
    if isinstance(content, str):
        return content
    return [part for part in content if not (isinstance(part, dict) and part.get("type") in _SAID_ELSEWHERE)]


def tool_calls(answer: packllm.ParsedAnswer) -> tuple[list[ToolCall], list[InvalidToolCall]]:
    """The calls of an answer in LangChain's format, and the invalid ones."""
    calls = [tool_call(name=call.name, args=call.arguments, id=call.id) for call in answer.calls]
    invalid = [
        invalid_tool_call(name=call.name, args=call.arguments, id=call.id, error=call.error) for call in answer.invalid
    ]
    return calls, invalid


def call_chunk(part: packllm.CallPart) -> ToolCallChunk:
    """A piece of a call in LangChain's format."""
    return tool_call_chunk(name=part.name, args=part.arguments, id=part.id, index=part.index)
