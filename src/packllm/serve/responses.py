"""POST /v1/responses: OpenAI's newer API for chats, with text and tools. Responses are not stored."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any

from packllm.errors import PromptError, shown
from packllm.options import Options
from packllm.results import TokenLogprob, Usage
from packllm.serve.answers import answers, new_id
from packllm.serve.chat import Message
from packllm.serve.metrics import Call
from packllm.serve.models import Served
from packllm.serve.protocol import Responses, nested
from packllm.serve.reply import Events

Event = dict[str, Any]


def messages_of(body: Responses) -> list[dict[str, Any]]:
    """The messages of a request.

    Raises:
        PromptError: an item has an unsupported type.
    """
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    thought: list[Any] = []
    for at, item in enumerate(body.input):
        kind = item.get("type") or "message"
        if kind == "reasoning":
            thought.append(item)
        elif kind == "function_call":
            call = {"name": item.get("name"), "arguments": item.get("arguments")}
            _assistant(messages, thought)["tool_calls"].append(
                {"id": item.get("call_id"), "type": "function", "function": call}
            )
        elif kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        elif kind == "message" and item.get("role") == "assistant":
            message, content = _assistant(messages, thought, new=True), item.get("content")
            parts = content if isinstance(content, list) else [] if content is None else [content]
            message["content"] = [*message["content"], *parts]
        elif kind == "message":
            messages.append({"role": item.get("role"), "content": item.get("content")})
        else:
            raise PromptError(
                f"input[{at}] has type {shown(kind)}; only messages, reasoning and function calls are supported"
            )
    for message in messages:
        if message.get("tool_calls") == []:
            del message["tool_calls"]
    return messages


def _assistant(messages: list[dict[str, Any]], thought: list[Any], new: bool = False) -> dict[str, Any]:
    """The assistant message to which an item belongs; a new one if `new`."""
    if new or not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": list(thought) or "", "tool_calls": []})
        thought.clear()
    return messages[-1]


class Output:
    """The items of an answer while it is generated, and the events that report them."""

    def __init__(self, head: dict[str, Any]) -> None:
        self.items: list[dict[str, Any]] = []
        self._head, self._open = head, False
        self._tokens: list[TokenLogprob] = []  # whose text was not sent yet

    @staticmethod
    def event(kind: str, **fields: Any) -> Event:
        return {"type": kind, **fields}

    def note(self, tokens: Iterable[TokenLogprob]) -> None:
        """Add the log-probabilities of the tokens of the next deltas."""
        self._tokens += tokens

    def _logprobs(self, text: str) -> list[dict[str, Any]]:
        """Log-probabilities of the tokens of a piece of the answer's text."""
        joined, piece = b"".join(bytes(token.bytes) for token in self._tokens), text.encode()
        start, at = max(joined.rfind(piece), 0), 0
        found: list[dict[str, Any]] = []
        rest: list[TokenLogprob] = []
        for token in self._tokens:
            if at >= start + len(piece):
                rest.append(token)
            elif at + len(token.bytes) > start:
                found.append(token.as_dict())
            at += len(token.bytes)
        self._tokens = rest
        return found

    def feed(self, delta: Mapping[str, Any]) -> Iterator[Event]:
        """The events of a chat delta."""
        if delta.get("reasoning_content"):
            yield from self._grow("reasoning", delta["reasoning_content"])
        if delta.get("content"):
            yield from self._grow("message", delta["content"])
        for call in delta.get("tool_calls", ()):
            function = call["function"]
            if "id" in call:
                yield from self._add(
                    {"type": "function_call", "id": new_id("fc_"), "call_id": call["id"], "name": function["name"]}
                    | {"arguments": "", "status": "in_progress"}
                )
            yield from self._grow("function_call", function["arguments"])

    def _add(self, item: dict[str, Any]) -> Iterator[Event]:
        yield from self.end()
        self.items.append(item)
        self._open = True
        yield self.event("response.output_item.added", output_index=self._index, item=_copy(item))
        if item["type"] == "message":
            item["content"].append({"type": "output_text", "text": "", "annotations": [], "logprobs": []})
            yield self.event("response.content_part.added", **self._place(0), part=_copy(item["content"][0]))
        elif item["type"] == "reasoning":
            item["summary"].append({"type": "summary_text", "text": ""})
            where = {**self._place(), "summary_index": 0}
            yield self.event("response.reasoning_summary_part.added", **where, part=_copy(item["summary"][0]))

    def _grow(self, kind: str, text: str) -> Iterator[Event]:
        if kind != "function_call" and (not self._open or self.items[-1]["type"] != kind):
            item: dict[str, Any] = {"type": kind, "id": new_id("msg_" if kind == "message" else "rs_")}
            if kind == "message":
                item |= {"role": "assistant", "status": "in_progress", "content": []}
            yield from self._add(item if kind == "message" else {**item, "summary": []})
        item = self.items[-1]
        if not text:
            return
        if kind == "function_call":
            item["arguments"] += text
            yield self.event("response.function_call_arguments.delta", **self._place(), delta=text)
        elif kind == "message":
            logprobs, part = self._logprobs(text), item["content"][0]
            part["text"] += text
            part["logprobs"] += logprobs
            yield self.event("response.output_text.delta", **self._place(0), delta=text, logprobs=logprobs)
        else:
            item["summary"][0]["text"] += text
            where = {**self._place(), "summary_index": 0}
            yield self.event("response.reasoning_summary_text.delta", **where, delta=text)

    def end(self, status: str = "completed") -> Iterator[Event]:
        """The events that complete the current item, if there is one."""
        if not self._open:
            return
        self._open, item = False, self.items[-1]
        if item["type"] == "message":
            part = item["content"][0]
            told = {"text": part["text"], "logprobs": part["logprobs"]}
            yield self.event("response.output_text.done", **self._place(0), **told)
            yield self.event("response.content_part.done", **self._place(0), part=_copy(part))
        elif item["type"] == "function_call":
            fields = {"arguments": item["arguments"], "name": item["name"]}
            yield self.event("response.function_call_arguments.done", **self._place(), **fields)
        else:
            where, part = {**self._place(), "summary_index": 0}, item["summary"][0]
            yield self.event("response.reasoning_summary_text.done", **where, text=part["text"])
            yield self.event("response.reasoning_summary_part.done", **where, part=_copy(part))
        if "status" in item:
            item["status"] = status
        yield self.event("response.output_item.done", output_index=self._index, item=_copy(item))

    def whole(self, status: str, **fields: Any) -> dict[str, Any]:
        """The response object with the items so far."""
        return {**self._head, "status": status, "output": [_copy(item) for item in self.items], **fields}

    @property
    def _index(self) -> int:
        return len(self.items) - 1

    def _place(self, content: int | None = None) -> dict[str, Any]:
        where = {"item_id": self.items[-1]["id"], "output_index": self._index}
        return where if content is None else {**where, "content_index": content}


def response(served: Served, body: Responses, call: Call) -> Events:
    """The events of an answer: a single one with the complete answer, or those of a stream."""
    last: dict[str, Any] = {}
    with closing(_events(served, body, call)) as made:
        for event in made:
            if body.stream:
                yield event
            last = event
    if not body.stream:
        yield last["response"]


def _events(served: Served, body: Responses, call: Call) -> Generator[Event, None, None]:
    options, conversation = body.options(), messages_of(body)
    checked = served.pack.check(**options)
    message = Message(checked.offered_tools, body.parallel_tool_calls is not False)
    output = Output(_head(served, body, checked))
    begun = False
    with closing(answers(served.pack, [conversation], options, None, call)) as chunks:
        for _, chunk in chunks:
            if not begun:
                begun = True
                yield output.event("response.created", response=output.whole("in_progress"))
                yield output.event("response.in_progress", response=output.whole("in_progress"))
            extra = message.told.feed(chunk)
            output.note(chunk.logprobs or ())
            for delta in message.feed(chunk):
                for event in output.feed(delta):
                    yield event
            if chunk.finish_reason is None:
                continue
            status = "completed" if chunk.finish_reason == "stop" else "incomplete"
            for event in output.end(status):
                yield event
            why = None if status == "completed" else {"reason": "max_output_tokens"}
            fields: dict[str, Any] = {"incomplete_details": why, "usage": _usage(chunk.usage), "packllm": extra}
            fields["completed_at"] = int(time.time()) if why is None else None
            yield output.event(f"response.{status}", response=output.whole(status, **fields))


def _head(served: Served, body: Responses, checked: Options) -> dict[str, Any]:
    return {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "model": served.name,
        "error": None,
        "incomplete_details": None,
        "previous_response_id": None,
        "instructions": body.instructions,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "temperature": checked.temperature,
        "top_p": checked.top_p,
        "top_logprobs": body.top_logprobs or 0,
        "presence_penalty": checked.presence_penalty,
        "frequency_penalty": checked.frequency_penalty,
        "tool_choice": _flat_choice(body.tool_choice),
        "tools": [_flat(nested(tool)) for tool in body.tools or ()],
        "text": {"format": {"type": "text"}, **(body.text or {})},
        "reasoning": {"effort": None, "summary": None, **(body.reasoning or {})},
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "truncation": "disabled",
        "background": False,
        "store": False,
        "service_tier": "default",
        "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key,
        "usage": None,
    }


def _flat(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A chat's tool as /v1/responses has it."""
    return {"type": "function", "description": None, "parameters": None, "strict": None, **tool["function"]}


def _flat_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any]:
    """A tool_choice as /v1/responses has it."""
    if not isinstance(choice, dict):
        return choice or "auto"
    if choice.get("type") != "allowed_tools":
        return {"type": "function", **choice.get("function", choice)}
    return {"type": "allowed_tools", **choice.get("allowed_tools", choice)}


def _usage(usage: Usage | None) -> dict[str, Any] | None:
    if usage is None:
        return None
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }


def _copy(item: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of an item that later changes do not affect."""
    return {key: [dict(one) for one in value] if isinstance(value, list) else value for key, value in item.items()}
