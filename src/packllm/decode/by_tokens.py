"""Token by token: the members that run fuse their next-token distributions, in one vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace

from packllm.align.shared import Shared, overlap
from packllm.decode.certified import Certified
from packllm.decode.lazy import check_lazy, lazy_ids
from packllm.decode.line import Line
from packllm.decode.logprobs import Recorder
from packllm.decode.penalties import Penalties, bias_ids
from packllm.decode.reasoned import shown
from packllm.decode.request import Request
from packllm.decode.speculate import speculative_ids
from packllm.decode.structured import Constraint
from packllm.decode.text import TextStream
from packllm.decode.tokens import Ensemble, Row, in_one_vocabulary, shared_by
from packllm.engines.member import Author
from packllm.errors import OptionError, VocabularyError
from packllm.results import Chunk, FinishReason, Usage

Ids = Callable[[Ensemble, Sequence[Row]], Iterator[tuple[int, int]]]
"""Chooses the tokens of rows: (row, token id), each as soon as it is chosen."""


def check_models(request: Request) -> None:
    """VocabularyError where a member that may run gives no distribution of the next token."""
    if told := difference([request.members[k] for k in request.candidates], vocabularies=False):
        raise VocabularyError(f"{told}, which decoding={request.options.decoding!r} cannot use; use 'cool' or 'auto'")


def check_tokens(request: Request) -> None:
    """VocabularyError where members that may run have different vocabularies, or are on servers that do not tell
    enough."""
    if request.provable(request.candidates):
        return
    check_models(request)
    options, which = request.options, request.candidates
    if options.weighting == "top1":  # one member runs
        return
    if told := difference([request.members[k] for k in which]):
        raise VocabularyError(
            f"{told}, which decoding={options.decoding!r} cannot fuse; use decoding='cool', 'mined' or 'auto'"
        )


def difference(members: Sequence[Author], vocabularies: bool = True) -> str:
    """Which of the members is no token model, or (with vocabularies) which have different ones, and how much of them is
    the same; "" where none."""
    far = next((member for member in members if member.kind != "token model"), None)
    if far is not None:
        return f"member {far.name!r} is no token model but {'an' if far.kind == 'author' else 'a'} {far.kind}"
    first = members[0]
    other = next((member for member in members[1:] if not member.vocabulary.akin(first.vocabulary)), None)
    if other is None or not vocabularies:
        return ""
    share = overlap(first.vocabulary, other.vocabulary)
    return (
        f"members {first.name!r} and {other.name!r} have different vocabularies ({share:.0%} of their tokens are in "
        f"both)"
    )


def check_drawn(request: Request) -> None:
    """As check_tokens; OptionError too where a token is more than a draw from the plain mixture."""
    check_lazy(request.options)
    check_tokens(request)


def by_tokens(request: Request, rows: Sequence[Row]) -> Generator[tuple[int, Chunk], None, None]:
    """(row, Chunk) of the rows that are not done, with drafts where they pay."""
    options = request.options
    for row in rows:
        if row.moving is not None and not row.done:
            row.moving.sleep(row.weights, options.sleep)
    places = options.draft_tokens
    if places is None and options.seed is not None and options.temperature > 0:
        places = 1  # what is drafted uses up random numbers: a seeded text would depend on its batch
    return _written(request, rows, lambda ensemble, rows: speculative_ids(ensemble, rows, places))


def drawn(request: Request, rows: Sequence[Row]) -> Generator[tuple[int, Chunk], None, None]:
    """As by_tokens, each token of one member that is drawn by its weight."""
    return _written(request, rows, lazy_ids)


def proved(request: Request, rows: Sequence[Row]) -> Generator[tuple[int, Chunk], None, None]:
    """As by_tokens, greedy, with members on servers that tell their likeliest next tokens alone; row by row."""
    for r, row in enumerate(rows):
        if row.done:
            continue
        lines = {k: request.lines[k, r] for k in request.running(r)}
        shared = shared_by([line.member for line in lines.values()])
        answer = _answer(request, r, row, list(lines), shared)
        with closing(Certified(lines, shared, row, request.failures)) as members:
            for token in members.ids():
                request.check_time()
                request.first_token()
                text, reason = answer.push(token)
                row.done = reason is not None
                if row.done:
                    told = replace(request.usage(r, members.top), completion_tokens=answer.count)
                    told = replace(told, rounds=members.rounds, proved_at_once=members.at_once)
                    yield r, Chunk(text, row.weights, reason, told, request.spent())
                    break
                if text:
                    yield r, Chunk(text, row.weights)


def _written(request: Request, rows: Sequence[Row], ids: Ids) -> Generator[tuple[int, Chunk], None, None]:
    lines: dict[tuple[int, int], Line] = {}
    shared: dict[int, Shared | None] = {}
    for r in (r for r, row in enumerate(rows) if not row.done):
        own, shared[r] = in_one_vocabulary(request.token_lines(r))
        lines |= {(k, r): line for k, line in own.items()}
    ensemble = Ensemble(lines, rows, request.failures)
    answers = {}
    for r in shared:
        try:
            answers[r] = _answer(request, r, rows[r], ensemble.running(r), shared[r])
        except OptionError:  # no answer of the form fits: what was read is told, nothing is decoded
            yield r, Chunk("", rows[r].weights, usage=request.usage(r, ensemble.top(r)))
            raise
    for r, token in ids(ensemble, rows):
        request.check_time()
        request.first_token()
        text, reason = answers[r].push(token)
        rows[r].done = reason is not None
        if reason is not None:
            usage = replace(answers[r].usage, drafted_tokens=rows[r].drafted, accepted_tokens=rows[r].accepted)
            logprobs, recorder = rows[r].told(), rows[r].recorder
            end = None if recorder is None else recorder.end
            yield r, Chunk(text, rows[r].weights, reason, usage, request.spent(), logprobs=logprobs, end=end)
        elif text:
            yield r, Chunk(text, rows[r].weights, logprobs=rows[r].told())


def _answer(request: Request, index: int, row: Row, running: Sequence[int], shared: Shared | None) -> Answer:
    options, reference = request.options, request.members[running[0]]
    top = max(running, key=lambda k: row.weights.values[k])
    vocabulary, prompt = reference.vocabulary, request.usage(index, top)
    ends = reference.end_ids if shared is None else frozenset([shared.end])
    if options.records:
        row.recorder = Recorder(vocabulary, ends, row.weights.names, options.top_logprobs or 0)
        if request.grammar is not None or options.penalises:
            row.sample = row.recorder.watching(row.sample)
    text, constraint = TextStream(vocabulary, options.stop, shown(request, index)), None
    if request.grammar is not None:
        text, constraint = TextStream(vocabulary), Constraint(request.grammar, vocabulary, ends, row.limit)
        row.sample = constraint.wrap(row.sample)
    if options.penalises:
        biases = bias_ids(request.biases, reference, None if shared is None else shared.end)
        row.sample = Penalties(options, request.encoded[index][running[0]].ids, biases).wrap(row.sample)
    return Answer(text, ends, row.limit, prompt, constraint)


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
