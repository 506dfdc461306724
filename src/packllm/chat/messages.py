"""What a prompt may be: text, or messages in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from packllm.errors import PromptError

ROLES = ("system", "user", "assistant", "tool")
Message = Mapping[str, Any]
Prompt = str | Sequence[Message]


def check(prompt: Prompt, chat_template: bool) -> Prompt:
    """The prompt as encode() takes it: text, or messages with text contents.

    Raises:
        PromptError: empty, an unknown role, content that is not text, text that is not Unicode, calls that are
            no calls, a tool's result without a call before it.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise PromptError("prompt is empty; give at least one character")
        check_unicode(prompt)
        return [{"role": "user", "content": prompt}] if chat_template else prompt
    if not isinstance(prompt, Sequence) or not prompt:
        raise PromptError(f"prompt must be text or a non-empty list of messages, not {prompt!r}")
    messages = [_check_message(message, at) for at, message in enumerate(prompt)]
    called: set[Any] = set()
    for at, message in enumerate(messages):
        if message["role"] == "assistant":
            called |= {call.get("id") for call in message.get("tool_calls", ())}
        elif message["role"] == "tool" and (not called or message.get("tool_call_id") not in {None, *called}):
            raise PromptError(
                f"message {at} is the result of tool call {message.get('tool_call_id')!r}, which no message before it "
                f"makes; keep the assistant's message with its tool_calls, or send the result as a user's message"
            )
    return messages


def _check_message(message: Any, at: int) -> Message:
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise PromptError(f"message {at} must be a mapping with 'role' and 'content', not {message!r}")
    if message["role"] not in ROLES:
        raise PromptError(f"message {at} has role {message['role']!r}; valid roles: {', '.join(ROLES)}")
    content = message["content"]
    if content is None:
        content = ""
    elif isinstance(content, Sequence) and not isinstance(content, str | bytes | bytearray):
        content = "".join(_text_part(part, at) for part in content)
    elif not isinstance(content, str):
        kind = type(content).__name__
        raise PromptError(f"message {at} has content of type {kind!r}; give text or a list of text parts")
    check_unicode(content)
    message = {**message, "content": content}
    if message["role"] == "assistant" and "tool_calls" in message:
        message["tool_calls"] = [_check_call(call, at) for call in message["tool_calls"] or ()]
    return message


def _check_call(call: Any, at: int) -> Mapping[str, Any]:
    """The call with its arguments as a mapping, which is what templates expect, wherever they are JSON."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise PromptError(
            f'message {at} holds the tool call {call!r}; a call is {{"id": ..., "type": "function", "function": '
            f'{{"name": ..., "arguments": ...}}}}'
        )
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def _text_part(part: Any, at: int) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise PromptError(f"message {at} holds content of type {kind!r}; the members read text only")


def check_unicode(text: str) -> None:
    """PromptError if the text holds half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"prompt holds a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, which is not "
            f"Unicode text; decode its source with errors='replace'"
        ) from None
