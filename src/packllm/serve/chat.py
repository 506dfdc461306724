"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import closing
from typing import Any

from packllm.chat.calls import AnswerPart, ToolStream
from packllm.chat.reasoning import ReasoningPart
from packllm.chat.tools import CallPart
from packllm.results import Chunk, TokenLogprob
from packllm.serve.answers import Told, answers, chat_logprobs, new_id, usage_of
from packllm.serve.metrics import Call
from packllm.serve.models import Served
from packllm.serve.protocol import Chat
from packllm.serve.reading import as_vllm, readings
from packllm.serve.reply import Events


class Message:
    """One answer, parsed while it is generated.

    Args:
        tools: the tools that were offered.
        parallel: whether the answer may have several tool calls.
        reasons: whether the answer has its reasoning.
    """

    def __init__(self, tools: Iterable[dict[str, Any]], parallel: bool, reasons: bool = True) -> None:
        self._parts, self._reasons = ToolStream(tuple(tools), parallel=parallel), reasons
        self.told = Told()
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.logprobs: list[TokenLogprob] | None = None

    def feed(self, chunk: Chunk) -> list[dict[str, Any]]:
        """The deltas of a chunk, in OpenAI's format."""
        parts: list[AnswerPart] = [ReasoningPart(chunk.reasoning)] if chunk.reasoning else []
        parts += self._parts.feed(chunk.text)
        if chunk.finish_reason is not None:
            parts += self._parts.finish()
        if chunk.logprobs is not None:
            self.logprobs = [*(self.logprobs or ()), *chunk.logprobs]
        return [self._delta(part) for part in parts if self._reasons or not isinstance(part, ReasoningPart)]

    def _delta(self, part: AnswerPart) -> dict[str, Any]:
        if isinstance(part, str):
            self.content.append(part)
            return {"content": part}
        if isinstance(part, ReasoningPart):
            self.reasoning.append(part.text)
            return {"reasoning_content": part.text}
        assert isinstance(part, CallPart)
        function: dict[str, Any] = {"arguments": part.arguments}
        call: dict[str, Any] = {"index": part.index, "function": function}
        if part.id is not None:
            function["name"] = part.name or ""
            call |= {"id": part.id, "type": "function"}
            self.calls.append({"id": part.id, "type": "function", "function": dict(function)})
        else:
            self.calls[part.index]["function"]["arguments"] += part.arguments
        return {"tool_calls": [call]}

    def reason(self, chunk: Chunk) -> str | None:
        """The finish reason, in OpenAI's terms."""
        return "tool_calls" if self.calls and chunk.finish_reason == "stop" else chunk.finish_reason

    def as_dict(self) -> dict[str, Any]:
        content = "".join(self.content)
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if self.calls else "")}
        message |= {"refusal": None, "annotations": []}
        if self.reasoning:
            message["reasoning_content"] = "".join(self.reasoning)
        if self.calls:
            message["tool_calls"] = self.calls
        return message


def completion(served: Served, body: Chat, call: Call) -> Events:
    """The events of an answer: a single one with the complete answer, or those of a stream."""
    options = body.options()
    tools = served.pack.check(**options).offered_tools
    n = body.n or 1
    messages = [Message(tools, body.parallel_tool_calls is not False, body.include_reasoning) for _ in range(n)]
    head = {"id": new_id("chatcmpl-"), "created": int(time.time()), "model": served.name}
    head["system_fingerprint"] = served.fingerprint
    read = {}
    if body.prompt_logprobs is not None:
        (reading,) = readings(served.pack, [body.messages], options, body.prompt_logprobs, call.cancel)
        read = {"prompt_logprobs": as_vllm(reading, body.prompt_logprobs)}
    whole: list[dict[str, Any]] = [{} for _ in range(n)]
    part = {**head, "object": "chat.completion.chunk"} | ({"usage": None} if body.usage_at_end else {})
    begun: set[int] = set()
    with closing(answers(served.pack, [body.messages], options, None if n == 1 else n, call)) as chunks:
        for index, chunk in chunks:
            message = messages[index]
            deltas, extra = message.feed(chunk), message.told.feed(chunk)
            logprobs, reason = chat_logprobs(chunk.logprobs, body.spelled), message.reason(chunk)
            if reason is not None:
                logged = chat_logprobs(message.logprobs, body.spelled)
                choice = {"index": index, "message": message.as_dict(), "logprobs": logged}
                whole[index] = {**choice, "finish_reason": reason, "packllm": extra}
            if not body.stream:
                continue
            if index not in begun:
                begun.add(index)
                deltas.insert(0, {"role": "assistant", "content": ""})
            if reason is not None or (not deltas and (extra or logprobs)):
                deltas.append({})
            carrying = max((at for at, delta in enumerate(deltas) if delta), default=len(deltas) - 1)
            for at, delta in enumerate(deltas):
                last = at == len(deltas) - 1
                choice = {"index": index, "delta": delta, "logprobs": logprobs if at == carrying else None}
                choice["finish_reason"] = reason if last else None
                event = {**part, "choices": [choice]}
                yield event | {"packllm": extra} if last and extra else event
    usage = usage_of((message.told.usage for message in messages), n)
    if not body.stream:
        ended = whole[0]["packllm"]
        yield {**head, "object": "chat.completion", "choices": whole, "usage": usage, "packllm": ended, **read}
    elif body.usage_at_end:
        yield {**part, "choices": [], "usage": usage}
