"""What is reasoned before the answer of a conversation, and the control tokens that tell of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from packllm.chat.marks import CALL_MARKS
from packllm.chat.reasoning import ReasoningStream, marks_in, opened_by
from packllm.decode.request import Request
from packllm.results import Chunk, TokenLogprob

_LONGEST_OPENING = 48
"""Tokens at the end of a prompt that may spell the opening of reasoning."""


def apart(request: Request, pieces: Iterator[tuple[int, Chunk]]) -> Iterator[tuple[int, Chunk]]:
    """Pieces with what is reasoned before the answer apart from their text."""
    thoughts: dict[int, ReasoningStream] = {}
    told: dict[int, tuple[TokenLogprob, ...]] = {}  # of tokens whose text is not sure yet
    for r, chunk in pieces:
        if _reasons(request, r):
            if r not in thoughts:
                thoughts[r] = ReasoningStream(_opened(request, r))
            last = chunk.finish_reason is not None
            reasoning, text = thoughts[r].feed(chunk.text, last)
            if chunk.logprobs is not None:
                told[r] = told.get(r, ()) + chunk.logprobs
            if not (reasoning or text or last):
                continue
            chunk = replace(chunk, text=text, reasoning=reasoning, logprobs=told.pop(r, None))
        yield r, chunk


def shown(request: Request, index: int) -> frozenset[str]:
    """Control tokens that are text in an answer, to be taken out of it again: the marks of reasoning and of calls that
    the top member's template knows."""
    if not _reasons(request, index):
        return frozenset()
    member = request.members[_speaker(request, index)]
    template = member.encoder.template or ""
    marks = set(marks_in(template))
    if request.options.offered_tools:
        marks |= {mark for mark in CALL_MARKS if mark in template}
    vocabulary = member.vocabulary
    spelled = {vocabulary.tokens[i].decode(errors="replace") for i in vocabulary.control} if marks else set()
    return frozenset(spelling for spelling in spelled if spelling and any(spelling in mark for mark in marks))


def _reasons(request: Request, index: int) -> bool:
    """Whether an answer may begin with reasoning: in a conversation, where no form is guaranteed."""
    return request.conversations[index] and request.grammar is None


def _opened(request: Request, index: int) -> str | None:
    """What closes the reasoning that the top member's prompt has opened."""
    top = _speaker(request, index)
    tokens = request.members[top].encoder.vocabulary.tokens
    end = b"".join(tokens[i] for i in request.encoded[index][top].ids[-_LONGEST_OPENING:])
    return opened_by(end.decode(errors="replace"))


def _speaker(request: Request, index: int) -> int:
    """The member whose tokens and template count: the one of the largest weight."""
    return max(request.running(index), key=lambda k: request.weights[index].values[k])
