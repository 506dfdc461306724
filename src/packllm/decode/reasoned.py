"""Separates the reasoning before an answer from its text, by the control tokens that mark it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from packllm.chat.marks import CALL_MARKS
from packllm.chat.reasoning import ReasoningStream, marks_in, opened_by
from packllm.decode.request import Request
from packllm.results import Chunk, TokenLogprob

_LONGEST_OPENING = 48
"""How many tokens at a prompt's end may contain the mark that opens reasoning."""


def apart(request: Request, pieces: Iterator[tuple[int, Chunk]]) -> Iterator[tuple[int, Chunk]]:
    """Chunks with the reasoning moved from `text` to `reasoning`."""
    streams: dict[int, ReasoningStream | None] = {}
    pending: dict[int, tuple[TokenLogprob, ...]] = {}  # of tokens whose text may still change
    for r, chunk in pieces:
        if r not in streams:
            streams[r] = thoughts_of(request, r)
        if (stream := streams[r]) is not None:
            last = chunk.finish_reason is not None
            reasoning, text = stream.feed(chunk.text, last)
            if chunk.logprobs is not None:
                pending[r] = pending.get(r, ()) + chunk.logprobs
            if not (reasoning or text or last):
                continue
            chunk = replace(chunk, text=text, reasoning=reasoning, logprobs=pending.pop(r, None))
        yield r, chunk


def thoughts_of(request: Request, index: int) -> ReasoningStream | None:
    """A parser of the reasoning before an answer; None if the answer has none."""
    return ReasoningStream(_closing_mark(request, index)) if _reasons(request, index) else None


def shown(request: Request, index: int) -> frozenset[str]:
    """Control tokens to keep as text in an answer until they are parsed: the marks of reasoning and of tool calls in
    the top member's chat template."""
    if not _reasons(request, index):
        return frozenset()
    member = request.members[_speaker(request, index)]
    template = member.encoder.template or ""
    marks = set(marks_in(template))
    if request.options.offered_tools:
        marks |= {mark for mark in CALL_MARKS if mark in template}
    vocabulary = member.vocabulary
    spellings = {vocabulary.tokens[i].decode(errors="replace") for i in vocabulary.control} if marks else set()
    return frozenset(spelling for spelling in spellings if spelling and any(spelling in mark for mark in marks))


def _reasons(request: Request, index: int) -> bool:
    """Whether an answer may begin with reasoning: in a conversation without a grammar."""
    return request.conversations[index] and request.grammar is None


def _closing_mark(request: Request, index: int) -> str | None:
    """The mark that closes the reasoning if the top member's prompt ends inside an open one; else None."""
    top = _speaker(request, index)
    tokens = request.members[top].encoder.vocabulary.tokens
    end = b"".join(tokens[i] for i in request.encoded[index][top].ids[-_LONGEST_OPENING:])
    return opened_by(end.decode(errors="replace"))


def _speaker(request: Request, index: int) -> int:
    """The member with the largest weight, whose tokens and template are used."""
    return max(request.running(index), key=lambda k: request.weights[index].values[k])
