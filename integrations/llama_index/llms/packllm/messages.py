"""Translates LlamaIndex's messages for the pack, and the pack's answers to LlamaIndex's responses."""

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
    """A message in the pack's format: role, text, an assistant's calls and reasoning, the call that a tool answers.
    A provider's cache marks (CachePoint) are ignored.

    Raises:
        PromptError: it is no ChatMessage, or its content is no text.
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
    additional = message.additional_kwargs
    extra_calls = additional.get("tool_calls")
    if not calls and extra_calls is not None:
        if not isinstance(extra_calls, list | tuple):
            raise PromptError(f"tool_calls in a message of role {message.role.value!r} must be a list of calls")
        calls = [_openai_call(call) for call in extra_calls]
    role = SAME_ROLE.get(message.role.value, message.role.value)
    result: dict[str, Any] = {"role": role, "content": "\n".join(texts)}
    if calls:
        result["tool_calls"] = calls
    if role == "assistant" and (thought := "\n".join(filter(None, thoughts))):
        result["reasoning_content"] = thought
    if role == "tool":
        result |= {name: additional[name] for name in ("tool_call_id", "name") if additional.get(name) is not None}
    return result


def _call(identity: str | None, name: str, arguments: Any) -> dict[str, Any]:
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def _openai_call(call: Any) -> Any:
    """A call in additional_kwargs, which other integrations store as mappings or objects; the pack checks it."""
    return call.model_dump() if hasattr(call, "model_dump") else call


def log_probs(tokens: Sequence[TokenLogprob] | None) -> list[list[LogProb]] | None:
    """For each token: itself, then the other likely tokens. The members' log-probabilities are in `raw`."""
    if tokens is None:
        return None

    def to_log_prob(one: TokenLogprob) -> LogProb:
        fields = one.as_dict()
        return LogProb(token=fields["token"], logprob=fields["logprob"], bytes=fields["bytes"])

    def differs(one: TokenLogprob, other: TokenLogprob) -> bool:
        return (one.id, one.token) != (other.id, other.token)

    return [
        [to_log_prob(one), *(to_log_prob(other) for other in one.top_logprobs if differs(one, other))] for one in tokens
    ]


class CompletionReply:
    """Makes completion responses from a growing text."""

    def __init__(self) -> None:
        self._text = ""

    def __call__(self, piece: str, raw: dict[str, Any], last: bool, reasoning: str = "") -> CompletionResponse:
        self._text += piece
        return CompletionResponse(text=self._text, raw=raw, delta=piece)


class ChatReply:
    """Makes chat responses from a growing text: its content without tool calls, and the calls that are complete.
    Reasoning is a ThinkingBlock before the content, and in streams also additional_kwargs["thinking_delta"].

    Args:
        tools: the offered tools; without tools no text is a call.
        parallel: whether an answer may have several calls; otherwise only the first one counts.
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
    """The answer as a message. Calls are blocks, which memories keep, and OpenAI-like dicts, which older code reads."""
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
