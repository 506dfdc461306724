"""Prompts: text, or messages in OpenAI's format.

In packllm's normal form a message has a role and its content as text. An assistant message may have "tool_calls", with
arguments as a mapping if they are JSON, and "reasoning_content". A tool message has the "tool_call_id" that it answers.
Other keys are not changed: some templates know them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any
from unicodedata import category

from packllm.errors import PromptError, shown

ROLES = ("system", "user", "assistant", "tool")
SAME_ROLE = {"developer": "system"}
Message = Mapping[str, Any]
Prompt = str | Sequence[Message]

TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "text-plain": "text", "refusal": "refusal"}
"""Which key of a part has its text, by the part's type."""
REASONING_PARTS = {"thinking": "thinking", "reasoning": "reasoning", "redacted_thinking": ""}
"""The same for earlier reasoning, which is no content; the last type is encrypted by its provider."""
SILENT_PARTS = (
    *("server_tool_call", "server_tool_call_chunk", "server_tool_result"),
    *("server_tool_use", "web_search_tool_result", "web_fetch_tool_result", "code_execution_tool_result"),
    *("mcp_tool_use", "mcp_tool_result", "web_search_call", "file_search_call", "code_interpreter_call", "mcp_call"),
    *("cache_point", "cachePoint"),
)
"""Parts about another provider's own actions, and marks for its cache. They have no text of the conversation."""


INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")
"""Unicode's categories of controls, formatting characters and white space."""

CONTEXT = "Use the context to answer the question.\n\nContext:\n{context}\n\nQuestion: {question}"


def with_context(question: str, passages: Sequence[str]) -> str:
    """A question with passages before it; the question alone if there are none."""
    return CONTEXT.format(context="\n\n".join(p.strip() for p in passages), question=question) if passages else question


def says_nothing(text: str) -> bool:
    """Whether a text has only white space and invisible characters, such as the byte order mark of an empty file."""
    return all(category(character) in INVISIBLE for character in text)


def check(prompt: Prompt, chat_template: bool) -> Prompt:
    """Check a prompt and return it as encode() takes it: text, or messages in the normal form.

    Raises:
        PromptError: an empty prompt, an unknown role, content that is no text, text that is no valid Unicode, an
            invalid tool call, or a tool result without a call before it.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise PromptError("prompt is empty; give at least one character")
        check_unicode(prompt)
        return [{"role": "user", "content": prompt}] if chat_template else prompt
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray | memoryview) or not len(prompt):
        raise PromptError(f"prompt must be text or a non-empty list of messages, not {shown(prompt)}")
    messages = [_check_message(message, at) for at, message in enumerate(prompt)]
    called: set[Any] = set()
    for at, message in enumerate(messages):
        if message["role"] == "assistant":
            called |= {call.get("id") for call in message.get("tool_calls", ())}
        elif message["role"] == "tool" and (not called or message.get("tool_call_id") not in {None, *called}):
            raise PromptError(
                f"message {at} is the result of tool call {message.get('tool_call_id')!r}, which no message before it "
                f"makes; keep the assistant message with its tool_calls, or send the result as a user message"
            )
    return messages


def _check_message(message: Any, at: int) -> Message:
    if not isinstance(message, Mapping) or "role" not in message:
        raise PromptError(f"message {at} must be a mapping with 'role' and 'content', not {shown(message)}")
    role = message["role"]
    role = SAME_ROLE.get(role, role) if isinstance(role, str) else role
    if not isinstance(role, str) or role not in ROLES:
        raise PromptError(f"message {at} has role {shown(role)}; valid roles: {', '.join(ROLES)}")
    if role != "assistant" and "content" not in message:
        raise PromptError(f"message {at} must be a mapping with 'role' and 'content', not {shown(message)}")
    content, reasoning = _check_content(message.get("content"), at)
    result = {**message, "role": role, "content": content}
    if role == "tool" and not isinstance(message.get("tool_call_id"), str | None):
        raise PromptError(f"message {at} has tool_call_id={shown(message['tool_call_id'])}; an id is text")
    if role == "assistant":
        result |= _check_assistant(message, content, reasoning, at)
        if result["reasoning_content"] is None:
            del result["reasoning_content"]
    return result


def _check_assistant(message: Message, content: str, reasoning: str, at: int) -> dict[str, Any]:
    """Check the fields that only an assistant message has."""
    reasoning_content = message.get("reasoning_content")
    if not isinstance(reasoning_content, str | None):
        raise PromptError(f"message {at} has reasoning_content={shown(reasoning_content)}; reasoning is text")
    check_unicode(reasoning_content or "")
    refusal = message.get("refusal")
    if not isinstance(refusal, str | None):
        raise PromptError(f"message {at} has refusal={shown(refusal)}; a refusal is text")
    for name, instead in {"function_call": "tool_calls", "audio": "content, with its transcript"}.items():
        if message.get(name):
            raise PromptError(f"message {at} has {name}={shown(message[name])}, which is not supported; use {instead}")
    result: dict[str, Any] = {
        "content": content or refusal or "",
        "reasoning_content": reasoning_content or reasoning or None,
    }
    check_unicode(result["content"])
    if "tool_calls" in message:
        calls = message["tool_calls"]
        if not isinstance(calls, list | tuple | None):
            raise PromptError(f"message {at} has tool_calls={shown(calls)}; give a list of calls")
        result["tool_calls"] = [_check_call(call, at) for call in calls or ()]
    return result


def _check_content(content: Any, at: int) -> tuple[str, str]:
    """The text of a content, and the reasoning in its parts."""
    if content is None:
        return "", ""
    texts: list[str] = []
    thoughts: list[str] = []
    if isinstance(content, str):
        texts.append(content)
    elif isinstance(content, Sequence) and not isinstance(content, bytes | bytearray | memoryview):
        for part in content:
            thinking = isinstance(part, Mapping) and str(part.get("type")) in REASONING_PARTS
            (thoughts if thinking else texts).append(_part_text(part, at))
    else:
        kind = type(content).__name__
        raise PromptError(f"message {at} has content of type {kind!r}; give text or a list of text parts")
    text, thought = "".join(texts), "\n".join(filter(None, thoughts))
    check_unicode(text)
    check_unicode(thought)
    return text, thought


def _part_text(part: Any, at: int) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if isinstance(part, Mapping) and (kind is None or isinstance(kind, str)):
        if kind in SILENT_PARTS or (kind is None and "cachePoint" in part):
            return ""
        if kind in REASONING_PARTS:
            return _thought(part, kind)
        words = part.get(TEXT_PARTS[kind]) if kind in TEXT_PARTS else None
        if isinstance(words, str):
            return words
        if kind in TEXT_PARTS:
            raise PromptError(f"message {at} holds a part of type {kind!r} without its words: {shown(part)}")
    raise PromptError(f"message {at} holds content of type {shown(kind)}; the members read text only")


def _thought(part: Mapping[str, Any], kind: str) -> str:
    """The reasoning in a part. OpenAI gives none, or summaries of it; other servers give it as content."""
    reasoning = part.get(REASONING_PARTS[kind])
    if isinstance(reasoning, str):
        return reasoning
    listed = part.get("content") or part.get("summary")
    listed = listed if isinstance(listed, list | tuple) else ()
    texts = [one.get("text") for one in listed if isinstance(one, Mapping)]
    return "\n".join(line for line in texts if isinstance(line, str))


def _check_call(call: Any, at: int) -> Mapping[str, Any]:
    """A tool call with its arguments as a mapping if they are JSON, as templates expect."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise PromptError(
            f'message {at} holds the tool call {shown(call)}; a call is {{"id": ..., "type": "function", "function": '
            f'{{"name": ..., "arguments": ...}}}}'
        )
    if not isinstance(call.get("id"), str | None):
        raise PromptError(f"message {at} holds a tool call with the id {shown(call['id'])}; an id is text")
    arguments = function.get("arguments")
    if arguments is None or (isinstance(arguments, str | list | tuple) and not arguments):
        arguments = {}
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    result = {"type": "function", **call, "function": {**function, "arguments": arguments}}
    try:
        json.dumps(result, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"message {at} holds a tool call that is not JSON: {error}") from None
    return result


def check_unicode(text: str, what: str = "prompt") -> None:
    """Raise PromptError if the text contains half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{what} holds a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, which is not "
            f"Unicode text; decode its source with errors='replace'"
        ) from None
