"""Segment by segment (Cool-Fusion): members with any vocabularies write and rate segments; the best one is kept."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace

from packllm.decode.failures import without
from packllm.decode.reasoned import thoughts_of
from packllm.decode.remote import ServerLine, ServerWriter
from packllm.decode.request import Request
from packllm.decode.rerank import best_answer
from packllm.decode.segments import AnyWriter, Writers
from packllm.decode.text import TextStream
from packllm.decode.tokens import Row
from packllm.decode.writer import Writer
from packllm.errors import OptionError
from packllm.results import Chunk, FinishReason, TokenLogprob


def check_segments(request: Request) -> None:
    """Raise OptionError where the answer must have a form, penalties apply to tokens, or weights adapt although the
    scoring uses no mixture."""
    _check_scoring(request)
    if request.grammar is not None:
        raise OptionError(
            f"decoding={request.options.decoding!r} cannot guarantee the form that json_schema or tool_choice "
            f"demands; use decoding='tokens' or 'mined'"
        )
    if request.options.logprob_token_ids:
        raise OptionError(
            f"decoding={request.options.decoding!r} has no tokens in common that logprob_token_ids could name; use "
            f"decoding='tokens' or 'mined'"
        )
    if request.options.penalises:
        raise OptionError(
            f"decoding={request.options.decoding!r} has no common tokens that a penalty or logit_bias could apply to; "
            f"use decoding='tokens' or 'mined'"
        )


def check_reranked(request: Request) -> None:
    """As check_segments; also raise OptionError where log-probabilities are requested."""
    check_segments(request)
    if request.options.tells_logprobs:
        raise OptionError(
            "decoding='cool+rerank' compares whole answers of different groups of members, so there is no single "
            "distribution for logprobs; use decoding='cool', or Pack.score"
        )


def _check_scoring(request: Request) -> None:
    if request.options.adapt and request.options.scoring != "mixture":
        raise OptionError(
            f"adapt=True adapts the weights of a mixture, but scoring={request.options.scoring!r} uses no mixture; "
            f"use scoring='mixture' or adapt=False"
        )


def by_segments(request: Request, rows: Sequence[Row]) -> Generator[tuple[int, Chunk], None, None]:
    """Decode the unfinished rows one after the other; yield (row, Chunk)."""
    for r, row in enumerate(rows):
        if not row.done:
            yield from _segments(_Team(request, r, row))
            row.done = True


def reranked(request: Request, rows: Sequence[Row]) -> Generator[tuple[int, Chunk], None, None]:
    """As by_segments, but choose the best among the fused answer and each member's own; one chunk a row."""
    for r, row in enumerate(rows):
        if not row.done:
            yield from _best(_Team(request, r, row))
            row.done = True


class _Team:
    """The running members of one prompt.

    Raises:
        OptionError: the mixture has negative weights; see check_segments.
    """

    def __init__(self, request: Request, index: int, row: Row) -> None:
        self.request, self.index, self.row = request, index, row
        self.running = request.running(index)
        _check_scoring(request)
        if request.options.scoring != "mixture":
            row.moving = None
        self._top = max(self.running, key=lambda k: row.weights.values[k])
        if request.options.scoring == "mixture" and min(row.weights.values) < 0:
            raise OptionError("scoring='mixture' cannot carry negative weights; use 'log' or 'perplexity'")

    def writers(self, which: Sequence[int], row: Row) -> Writers:
        """Writers of the members `which`, at the end of the prompt."""
        request, options = self.request, self.request.options

        def open_at(k: int) -> AnyWriter:
            line = request.lines[k, self.index]
            return ServerWriter(line.fork()) if isinstance(line, ServerLine) else Writer(line.fork(), options.stop)

        writers = request.failures.each(open_at, which, row)
        top = (options.top_logprobs or 0) if options.records else None
        return Writers(writers, row, options.scoring, options.align, request.failures, top)

    def stream(self) -> TextStream:
        vocabulary, thoughts = self.request.members[self._top].vocabulary, thoughts_of(self.request, self.index)
        return TextStream(vocabulary, self.request.options.stop, thoughts=thoughts)

    def last(
        self,
        text: str,
        reason: FinishReason,
        count: int,
        thought: int,
        logprobs: tuple[TokenLogprob, ...] | None = None,
    ) -> Chunk:
        usage = self.request.usage(self.index, self._top)
        usage = replace(usage, completion_tokens=count, reasoning_tokens=thought)
        return Chunk(text, self.row.weights, reason, usage, self.request.elapsed(), logprobs=logprobs)


def _segments(team: _Team) -> Generator[tuple[int, Chunk], None, None]:
    row, stream = team.row, team.stream()
    with closing(team.writers(team.running, row)) as writers:
        for text, reason, count in writers.answer(row.limit, stream):
            team.request.first_token()
            if reason is not None:
                yield team.index, team.last(text, reason, count, stream.reasoning_tokens, writers.take_logprobs())
            elif text:
                yield team.index, Chunk(text, row.weights, logprobs=writers.take_logprobs())


def _best(team: _Team) -> Generator[tuple[int, Chunk], None, None]:
    row, failures = team.row, team.request.failures
    if len(team.running) == 1:
        yield from _segments(team)
        return
    teams = [team.running, *([k] for k in team.running if row.weights.values[k] > 0)]
    best = best_answer(teams, lambda which: team.writers(which, row.fork()), row.limit, team.stream, failures)
    row.weights = without(row.weights, failures.members) or row.weights
    team.request.first_token()
    yield team.index, team.last(*best)
