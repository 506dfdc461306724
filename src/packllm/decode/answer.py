"""Answers: a request that is read and weighed, decoded into pieces of text."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace

from packllm.align.shared import Shared
from packllm.chat.marks import CALL_MARKS
from packllm.chat.reasoning import ReasoningStream, marks_in, opened_by
from packllm.decode.failures import without
from packllm.decode.lazy import lazy_ids
from packllm.decode.line import Line
from packllm.decode.request import Request
from packllm.decode.rerank import best_answer
from packllm.decode.sampling import make_sampler
from packllm.decode.segments import Writers
from packllm.decode.speculate import speculative_ids
from packllm.decode.structured import Constraint
from packllm.decode.text import TextStream
from packllm.decode.tokens import Ensemble, Row, in_one_vocabulary
from packllm.decode.writer import Writer
from packllm.errors import OptionError, VocabularyError
from packllm.results import Chunk, FinishReason, Usage

_LONGEST_OPENING = 48
"""Tokens at the end of a prompt that may spell the opening of reasoning."""


def chunks(request: Request) -> Generator[tuple[int, Chunk], None, None]:
    """Prefill, then decode: pieces of text as (index of the prompt, Chunk), until all are finished. What is reasoned
    before the answer of a conversation comes apart from its text.

    Closing the iterator frees the caches; at most the step under way is finished.

    Raises:
        AnswerTimeout: see Request.check_time.
    """
    thoughts: dict[int, ReasoningStream] = {}
    with closing(_pieces(request)) as pieces:
        for r, chunk in pieces:
            if _reasons(request, r):
                if r not in thoughts:
                    thoughts[r] = ReasoningStream(_opened(request, r))
                last = chunk.finish_reason is not None
                reasoning, text = thoughts[r].feed(chunk.text, last)
                if not (reasoning or text or last):
                    continue
                chunk = replace(chunk, text=text, reasoning=reasoning)
            yield r, chunk


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


def _shown(request: Request, index: int) -> frozenset[str]:
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


def _pieces(request: Request) -> Generator[tuple[int, Chunk], None, None]:
    """As chunks(), with all that is written as text."""
    try:
        with request.admission.admitted(request.cache_bytes(), request.check):
            yield from _written(request)
    finally:
        request.close()


def _written(request: Request) -> Generator[tuple[int, Chunk], None, None]:
    started, options = time.perf_counter(), request.options
    request.prefill()
    limits = request.limits(options.max_tokens)
    rows = [
        Row(weights, make_sampler(options.temperature, options.top_p, options.top_k, options.seed), limit)
        for weights, limit in zip(request.weights, limits, strict=True)
    ]
    for r, row in enumerate(rows):
        if _by_segments(request, r):
            for chunk in _segments(request, r, row, started):
                yield r, chunk
            row.done = True
    lines: dict[tuple[int, int], Line] = {}
    shared: dict[int, Shared | None] = {}
    for r in (r for r, row in enumerate(rows) if not row.done):
        own, shared[r] = in_one_vocabulary({k: request.lines[k, r] for k in request.running(r)})
        lines |= {(k, r): line for k, line in own.items()}
    ensemble = Ensemble(lines, rows, request.failures)
    answers = {}
    for r, row in enumerate(rows):
        if not row.done:
            try:
                answers[r] = _answer(request, r, row, ensemble.running(r), shared[r])
            except OptionError:  # no answer of the form fits: what was read is told, nothing is decoded
                yield r, Chunk("", row.weights, usage=request.usage(r, _top(row, ensemble.running(r))))
                raise
    for r, token in _tokens(request, ensemble, rows):
        request.check_time()
        request.timings.setdefault("first_token", time.perf_counter() - started)
        text, reason = answers[r].push(token)
        rows[r].done = reason is not None
        if reason is not None:
            timings = {**request.timings, "total": time.perf_counter() - started}
            usage = replace(answers[r].usage, drafted_tokens=rows[r].drafted, accepted_tokens=rows[r].accepted)
            yield r, Chunk(text, rows[r].weights, reason, usage, timings)
        elif text:
            yield r, Chunk(text, rows[r].weights)


def _tokens(request: Request, ensemble: Ensemble, rows: Sequence[Row]) -> Iterator[tuple[int, int]]:
    """(row, token id), token by token, in the way asked for."""
    options = request.options
    if options.decoding == "lazy":
        return lazy_ids(ensemble, rows)
    places = options.draft_tokens
    if places is None and options.seed is not None and options.temperature > 0:
        places = 1  # what is drafted uses up random numbers: a seeded text would depend on its batch
    return speculative_ids(ensemble, rows, places)


def _answer(request: Request, index: int, row: Row, running: Sequence[int], shared: Shared | None) -> Answer:
    shown = _shown(request, index)
    vocabulary, prompt = request.members[running[0]].vocabulary, request.usage(index, _top(row, running))
    ends = request.members[running[0]].end_ids if shared is None else frozenset([shared.end])
    if request.grammar is None:
        return Answer(TextStream(vocabulary, request.options.stop, shown), ends, row.limit, prompt)
    constraint = Constraint(request.grammar, vocabulary, ends, row.limit)
    row.sample = constraint.wrap(row.sample)
    return Answer(TextStream(vocabulary), ends, row.limit, prompt, constraint)


def _top(row: Row, running: Sequence[int]) -> int:
    return max(running, key=lambda k: row.weights.values[k])


def _by_segments(request: Request, index: int) -> bool:
    decoding = request.options.decoding
    mixed = decoding == "auto" and not request.one_vocabulary(request.running(index))
    if mixed and request.grammar is not None:
        raise VocabularyError(
            "the members that run have different vocabularies, and the form that json_schema or tool_choice demands "
            "is guaranteed in one only; use decoding='mined' or weighting='top1'"
        )
    return mixed or decoding in ("cool", "cool+rerank")


def _segments(request: Request, index: int, row: Row, started: float) -> Generator[Chunk, None, None]:
    """One prompt's answer by Cool-Fusion; `row` as in Ensemble."""
    options, running = request.options, request.running(index)
    if options.scoring == "mixture" and min(row.weights.values) < 0:
        raise OptionError("scoring='mixture' cannot carry negative weights; use 'log' or 'perplexity'")
    top = _top(row, running)

    def writers(which: Sequence[int], row: Row) -> Writers:
        def open_at(k: int) -> Writer:
            return Writer(request.lines[k, index].fork(), options.stop)

        made = request.failures.each(open_at, which, row)
        return Writers(made, row, options.scoring, options.align, request.failures)

    def stream() -> TextStream:
        return TextStream(request.members[top].vocabulary, options.stop)

    def last(text: str, reason: FinishReason, count: int) -> Chunk:
        timings = {**request.timings, "total": time.perf_counter() - started}
        usage = replace(request.usage(index, top), completion_tokens=count)
        return Chunk(text, row.weights, reason, usage, timings)

    if options.decoding == "cool+rerank" and len(running) > 1:
        teams = [running, *([k] for k in running if row.weights.values[k] > 0)]
        best = best_answer(teams, lambda which: writers(which, replace(row)), row.limit, stream, request.failures)
        row.weights = without(row.weights, request.failures.members) or row.weights
        request.timings.setdefault("first_token", time.perf_counter() - started)
        yield last(*best)
        return
    with closing(writers(running, row)) as together:
        for text, reason, count in together.answer(row.limit, stream()):
            request.timings.setdefault("first_token", time.perf_counter() - started)
            if reason is not None:
                yield last(text, reason, count)
            elif text:
                yield Chunk(text, row.weights)


class Answer:
    """A row's tokens becoming text, until an end token, a stop string or the limit.

    Args:
        text: turns tokens into text.
        ends: ids that end an answer.
        limit: most tokens.
        prompt: the usage before the first token.
        constraint: the form that the answer has, if one is guaranteed.

    Attributes:
        count: tokens so far, without the one that ended the answer.
    """

    def __init__(
        self,
        text: TextStream,
        ends: frozenset[int],
        limit: int,
        prompt: Usage,
        constraint: Constraint | None = None,
    ) -> None:
        self._text, self._ends, self._limit, self._constraint = text, ends, limit, constraint
        self._prompt, self.count = prompt, 0

    @property
    def usage(self) -> Usage:
        return replace(self._prompt, completion_tokens=self.count)

    def push(self, token: int) -> tuple[str, FinishReason | None]:
        """The text that one more token makes sure, and why the answer ends with it, if it does."""
        cut: FinishReason = "length" if self._constraint is not None and self._constraint.cut else "stop"
        if token in self._ends:
            return self._text.finish(), cut
        self.count += 1
        text = self._text.push(token)
        if self._text.stopped:
            return text, "stop"
        if self._constraint is not None and self._constraint.complete:
            return text + self._text.finish(), cut
        if self.count < self._limit:
            return text, None
        text += self._text.finish()
        return text, "stop" if self._text.stopped else "length"
