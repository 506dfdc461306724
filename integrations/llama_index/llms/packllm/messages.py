"""LlamaIndex's messages as the pack's, and the pack's answers as LlamaIndex's responses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    ContentBlock,
    LogProb,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)

from packllm import ParsedAnswer, PromptError, ReasoningPart, TokenLogprob, ToolStream

SAME_ROLE = {"developer": "system", "chatbot": "assistant", "model": "assistant", "function": "tool"}


def from_message(message: ChatMessage) -> dict[str, Any]:
    """The pack's message: role and text, the calls and the reasoning of an assistant, the call that a tool answers.
    Marks for the cache of a provider (CachePoint) say nothing.

    Raises:
        PromptError: no message, or content that is not text.
    """
    if not isinstance(message, ChatMessage):
        raise PromptError(f"a conversation is a list of ChatMessage, not of {type(message).__name__}")
    texts, calls, thoughts = [], [], []
    for block in message.blocks:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.content or "")
        elif isinstance(block, ToolCallBlock):
            calls.append(_call(block.tool_call_id, block.tool_name, block.tool_kwargs))
        elif not isinstance(block, CachePoint):
            raise PromptError(
                f"{type(block).__name__} in a message of role {message.role.value!r}: the models read text only; "
                "send TextBlock or a string"
            )
    known = message.additional_kwargs
    told = known.get("tool_calls")
    if not calls and told is not None:
        if not isinstance(told, list | tuple):
            raise PromptError(f"tool_calls in a message of role {message.role.value!r} must be a list of calls")
        calls = [_openai_call(call) for call in told]
    role = SAME_ROLE.get(message.role.value, message.role.value)
    translated: dict[str, Any] = {"role": role, "content": "\n".join(texts)}
    if calls:
        translated["tool_calls"] = calls
    if role == "assistant" and (thought := "\n".join(filter(None, thoughts))):
        translated["reasoning_content"] = thought
    if role == "tool":
        translated |= {name: known[name] for name in ("tool_call_id", "name") if known.get(name) is not None}
    return translated


def _call(identity: str | None, name: str, arguments: Any) -> dict[str, Any]:
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def _openai_call(call: Any) -> Any:
    """A call in additional_kwargs, where integrations of OpenAI's kind keep mappings or objects; the pack checks it."""
    return call.model_dump() if hasattr(call, "model_dump") else call


def log_probs(tokens: Sequence[TokenLogprob] | None) -> list[list[LogProb]] | None:
    """For each token itself, then the others that were likely there. What members gave them is in `raw`."""
    if tokens is None:
        return None

    def told(one: TokenLogprob) -> LogProb:
        known = one.as_dict()
        return LogProb(token=known["token"], logprob=known["logprob"], bytes=known["bytes"])

    def differs(one: TokenLogprob, other: TokenLogprob) -> bool:
        return (one.id, one.token) != (other.id, other.token)

    return [[told(one), *(told(other) for other in one.top_logprobs if differs(one, other))] for one in tokens]


class CompletionReply:
    """Completion responses from a growing text."""

    def __init__(self) -> None:
        self._text = ""

    def __call__(self, piece: str, raw: dict[str, Any], last: bool, reasoning: str = "") -> CompletionResponse:
        self._text += piece
        return CompletionResponse(text=self._text, raw=raw, delta=piece)


class ChatReply:
    """Chat responses from a growing text: the content without calls of tools, and the calls as far as they are whole.
    Reasoning is a ThinkingBlock before the content, and while it streams additional_kwargs["thinking_delta"].

    Args:
        tools: tools whose calls to look for; without any, no text is a call.
        parallel: whether an answer may hold several calls; else the first counts.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]], parallel: bool) -> None:
        self._stream = ToolStream(tools, parallel=parallel)
        self._reasoning = ""

    def __call__(self, piece: str, raw: dict[str, Any], last: bool, reasoning: str = "") -> ChatResponse:
        parts = self._stream.feed(piece)
        if last:
            parts = [*parts, *self._stream.finish()]
        delta = "".join(part for part in parts if isinstance(part, str))
        thought = reasoning + "".join(part.text for part in parts if isinstance(part, ReasoningPart))
        self._reasoning += thought
        message = _message(self._stream.answer, self._reasoning)
        extra = {"thinking_delta": thought} if thought else {}
        return ChatResponse(message=message, raw=raw, delta=delta, additional_kwargs=extra)


def _message(answer: ParsedAnswer, reasoning: str) -> ChatMessage:
    """Calls are blocks, which memories keep, and OpenAI-like dictionaries, which older parts of the core read."""
    calls = answer.calls
    blocks: list[ContentBlock] = [ThinkingBlock(content=reasoning)] if reasoning else []
    blocks += [TextBlock(text=answer.content)] if answer.content or not calls else []
    blocks += [ToolCallBlock(tool_call_id=c.id, tool_name=c.name, tool_kwargs=c.arguments) for c in calls]
    extra: dict[str, Any] = {}
    if calls:
        extra["tool_calls"] = [_call(c.id, c.name, json.dumps(c.arguments, ensure_ascii=False)) for c in calls]
    if answer.invalid:
        extra["invalid_tool_calls"] = [
            {"id": c.id, "name": c.name, "arguments": c.arguments, "error": c.error} for c in answer.invalid
        ]
    return ChatMessage(role=MessageRole.ASSISTANT, blocks=blocks, additional_kwargs=extra)
