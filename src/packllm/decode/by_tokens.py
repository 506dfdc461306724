"""Token by token: the running members fuse their next-token distributions over one vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace

from packllm.align.shared import Shared, overlap
from packllm.decode.certified import Certified
from packllm.decode.lazy import check_lazy, lazy_ids
from packllm.decode.line import Line
from packllm.decode.logprobs import Recorder
from packllm.decode.penalties import Penalties, bias_ids, named_ids
from packllm.decode.reasoned import shown, thoughts_of
from packllm.decode.request import Request
from packllm.decode.speculate import speculative_ids
from packllm.decode.structured import Constraint
from packllm.decode.text import TextStream
from packllm.decode.tokens import Ensemble, Row, in_one_vocabulary, shared_by
from packllm.engines.member import Author
from packllm.errors import OptionError, VocabularyError
from packllm.results import Chunk, FinishReason, Usage

Ids = Callable[[Ensemble, Sequence[Row]], Iterator[tuple[int, int]]]
"""Chooses the tokens of rows: yields (row, token id) as soon as each is chosen."""


def check_models(request: Request) -> None:
    """Raise VocabularyError where a candidate member gives no next-token distribution."""
    if fault := difference([request.members[k] for k in request.candidates], vocabularies=False):
        raise VocabularyError(f"{fault}, which decoding={request.options.decoding!r} cannot use; use 'cool' or 'auto'")


def check_tokens(request: Request) -> None:
    """Raise VocabularyError where candidate members have different vocabularies, or run on servers that report too few
    log-probabilities."""
    if request.provable(request.candidates):
        return
    check_models(request)
    options, which = request.options, request.candidates
    if options.weighting == "top1":  # one member runs
        return
    if fault := difference([request.members[k] for k in which]):
        raise VocabularyError(
            f"{fault}, which decoding={options.decoding!r} cannot fuse; use decoding='cool', 'mined' or 'auto'"
        )


def difference(members: Sequence[Author], vocabularies: bool = True) -> str:
    """Say which of the members is no token model, or (with vocabularies=True) which two have different vocabularies
    and how much these overlap; "" if neither is the case."""
    remote = next((member for member in members if member.kind != "token model"), None)
    if remote is not None:
        return f"member {remote.name!r} is no token model but {'an' if remote.kind == 'author' else 'a'} {remote.kind}"
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
    """As check_tokens; also raise OptionError where sampling needs more than one draw from the plain mixture."""
    check_lazy(request.options)
    check_tokens(request)


def by_tokens(request: Request, rows: Sequence[Row]) -> Generator[tuple[int, Chunk], None, None]:
    """Decode the unfinished rows, with draft tokens where they save time; yield (row, Chunk)."""
    options = request.options
    for row in rows:
        if row.moving is not None and not row.done:
            row.moving.sleep(row.weights, options.sleep)
    places = options.draft_tokens
    if places is None and options.seed is not None and options.temperature > 0:
        places = 1  # drafts consume random numbers: with them a seeded answer would depend on its batch
    return written(request, rows, lambda ensemble, rows: speculative_ids(ensemble, rows, places))


def drawn(request: Request, rows: Sequence[Row]) -> Generator[tuple[int, Chunk], None, None]:
    """As by_tokens; each token comes from one member, drawn by the weights."""
    return written(request, rows, lazy_ids)


def proved(request: Request, rows: Sequence[Row]) -> Generator[tuple[int, Chunk], None, None]:
    """As by_tokens, greedy and row by row, for members on servers that report only their most likely tokens."""
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
                    usage = answer.usage_after(request.usage(r, members.top))
                    usage = replace(usage, rounds=members.rounds, proved_at_once=members.at_once)
                    yield r, Chunk(text, row.weights, reason, usage, request.elapsed())
                    break
                if text:
                    yield r, Chunk(text, row.weights)


def written(request: Request, rows: Sequence[Row], ids: Ids) -> Generator[tuple[int, Chunk], None, None]:
    """(row, Chunk) of the rows that are not done, whose tokens `ids` chooses. What turns tokens into an answer is here:
    end tokens, stop strings, the limit, guaranteed forms, penalties, usage."""
    lines: dict[tuple[int, int], Line] = {}
    shared: dict[int, Shared | None] = {}
    for r in (r for r, row in enumerate(rows) if not row.done):
        row_lines, shared[r] = in_one_vocabulary(request.token_lines(r))
        lines |= {(k, r): line for k, line in row_lines.items()}
    ensemble = Ensemble(lines, rows, request.failures)
    answers = {}
    for r in shared:
        try:
            answers[r] = _answer(request, r, rows[r], ensemble.running(r), shared[r])
        except OptionError:  # the limit is too short for the form: report the prompt's usage, decode nothing
            yield r, Chunk("", rows[r].weights, usage=request.usage(r, ensemble.top(r)))
            raise
    for r, token in ids(ensemble, rows):
        request.check_time()
        request.first_token()
        text, reason = answers[r].push(token)
        rows[r].done = reason is not None
        if reason is not None:
            usage = replace(answers[r].usage, drafted_tokens=rows[r].drafted, accepted_tokens=rows[r].accepted)
            logprobs, recorder = rows[r].take_logprobs(), rows[r].recorder
            end = None if recorder is None else recorder.end
            yield r, Chunk(text, rows[r].weights, reason, usage, request.elapsed(), logprobs=logprobs, end=end)
        elif text:
            yield r, Chunk(text, rows[r].weights, logprobs=rows[r].take_logprobs())


def _answer(request: Request, index: int, row: Row, running: Sequence[int], shared: Shared | None) -> Answer:
    options, reference = request.options, request.members[running[0]]
    top = max(running, key=lambda k: row.weights.values[k])
    vocabulary, prompt = reference.vocabulary, request.usage(index, top)
    ends = reference.end_ids if shared is None else frozenset([shared.end])
    if options.records:
        end = None if shared is None else shared.end
        named = named_ids(options.logprob_token_ids, request.members[0], reference, end)
        row.recorder = Recorder(vocabulary, ends, row.weights.names, options.top_logprobs or 0, named)
        if request.grammar is not None or options.penalises:
            row.sample = row.recorder.watching(row.sample)
    text = TextStream(vocabulary, options.stop, shown(request, index), thoughts_of(request, index))
    constraint = None
    if request.grammar is not None:
        text, constraint = TextStream(vocabulary), Constraint(request.grammar, vocabulary, ends, row.limit)
        row.sample = constraint.wrap(row.sample)
    if options.penalises:
        biases = bias_ids(request.biases, reference, None if shared is None else shared.end)
        row.sample = Penalties(options, request.encoded[index][running[0]].ids, biases).wrap(row.sample)
    return Answer(text, ends, row.limit, prompt, constraint)


class Answer:
    """Turns a row's tokens into text until an end token, a stop string or the limit.

    Args:
        text: turns tokens into text.
        ends: ids that end an answer.
        limit: maximum number of tokens.
        prompt: the usage of the prompt.
        constraint: the grammar that the answer must follow, if any.

    Attributes:
        count: tokens so far, without the end token.
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
        return self.usage_after(self._prompt)

    def usage_after(self, prompt: Usage) -> Usage:
        """The usage of a prompt with this answer's tokens."""
        return replace(prompt, completion_tokens=self.count, reasoning_tokens=self._text.reasoning_tokens)

    def push(self, token: int) -> tuple[str, FinishReason | None]:
        """Add a token; return the text that is now final, and the finish reason if the answer ends here."""
        end_reason: FinishReason = "length" if self._constraint is not None and self._constraint.cut else "stop"
        if token in self._ends:
            return self._text.finish(), end_reason
        self.count += 1
        text = self._text.push(token)
        if self._text.stopped:
            return text, "stop"
        if self._constraint is not None and self._constraint.complete:
            return text + self._text.finish(), end_reason
        if self.count < self._limit:
            return text, None
        text += self._text.finish()
        return text, "stop" if self._text.stopped else "length"
