"""One request: its prompts are encoded for the members, prefilled, and weighted."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from packllm.carried import places
from packllm.chat.prompt import Encoded, Prompt, TooLong, check_length
from packllm.decode.admission import Admission
from packllm.decode.cancel import Stop
from packllm.decode.failures import Failures
from packllm.decode.grammar import make_grammar
from packllm.decode.line import Line, open_lines
from packllm.decode.mined import translated
from packllm.decode.penalties import spelled_biases, spelling
from packllm.decode.race import Race, Slot
from packllm.decode.remote import ServerLine, reading
from packllm.decode.tokens import drop_small
from packllm.decode.weighing import Reading, over_all, renormalised
from packllm.engines import base
from packllm.engines.base import KeepsHidden, Prefixes, Read
from packllm.engines.member import Author, Member
from packllm.engines.prefix import Beginnings, PrefixCache, common
from packllm.engines.server.judge import Asked
from packllm.engines.server.member import ServerMember
from packllm.errors import (
    AnswerTimeout,
    ContextOverflowError,
    MemberError,
    OptionError,
)
from packllm.options import Options
from packllm.results import Bill, Usage
from packllm.weights import Weights, find
from packllm.weights.common import Common

DEFAULT_MAX_TOKENS = 256

SHARED = 8
"""Shortest common prefix, in tokens, that is worth a forward pass of its own."""

T = TypeVar("T")


class Request:
    """Prompts that are encoded, prefilled and weighted together; answer.py decodes them.

    Args:
        members: the pack's members.
        options: the request's options.
        prompts: checked prompts (see prompt.check), at least one.
        prefixes: the prefix cache, or None.
        mapped: whether members with other vocabularies read the token ids of the member that predicts the prompt best
            (paper §3.4).

    Attributes:
        candidates: indices of the members that may run.
        stop: checked before every forward pass; it raises if the request was cancelled.
        admission: limits the cache memory of all running requests together.
        encoded: for each prompt, {member index: Encoded}.
        lines: by (member index, prompt index), each with the prompt in its KV cache; set by prefill().
        weights: of each prompt, over all members of the pack; set by prefill().
        timings: seconds that prefill, weighting and the first token took, so far.
        evidence: for each prompt, the members that scored it and their scores; set by prefill() with `explain`.
        prompts: the checked prompts.
        failures: handles members that fail.
        conversations: whether each prompt consists of messages.
        biases: logit_bias, by the tokens' spelling.
        grammar: constrains the answers, or None. With a grammar, each row's sampler has a state, and must be given
            every token of the answer once and in order.
    """

    def __init__(
        self,
        members: Sequence[Author],
        options: Options,
        prompts: Sequence[Prompt],
        prefixes: PrefixCache | None = None,
        mapped: bool = False,
    ) -> None:
        self.members, self.options, self.mapped, self.prompts = members, options, mapped, list(prompts)
        self.stop, self.admission = Stop(), Admission(None)
        self.candidates = list(range(len(members)))
        if isinstance(options.weighting, dict):  # members that are given no weight need not even score
            nonzero = {name: value for name, value in options.weighting.items() if value != 0}
            self.candidates = [k for k, member in enumerate(members) if member.name in nonzero]
            self.options = options.model_copy(update={"weighting": nonzero})
        if options.offered_tools and any(isinstance(prompt, str) for prompt in prompts):
            raise OptionError("tools need a conversation; give messages instead of text, or chat_template=True")
        self.conversations = [not isinstance(prompt, str) for prompt in prompts]
        self.grammar = make_grammar(options)
        self.biases = spelled_biases(options.logit_bias, members[0])
        for i in options.logprob_token_ids:
            spelling(i, members[0], f"logprob_token_ids={i}")
        self.encoded: list[dict[int, Encoded]] = [
            {k: self._encode(members[k], prompt) for k in self.candidates} for prompt in prompts
        ]
        for prompt in self.encoded if options.passages else ():
            places(next(iter(prompt.values())).text, options.passages, options.score_on)
        self.lines: dict[tuple[int, int], Line | ServerLine] = {}
        self._scores: dict[tuple[int, int], Tensor | None] = {}
        self._opened: list[base.Sequence] = []
        self._servers: dict[tuple[int, int], ServerLine] = {}
        names = [member.name for member in members]
        self.failures = Failures(names, self.candidates, options.on_member_error == "drop")
        self.weights: list[Weights] = []
        self.evidence: list[tuple[Sequence[int], Common]] = []
        self.timings: dict[str, float] = {}
        self._started = time.perf_counter()
        salted = prefixes.salted(options.cache_salt) if prefixes and options.prefix_cache_mb else None
        self._prefixes: Prefixes | None = salted
        self._cached: dict[tuple[int, int], int] = {}  # tokens of a prompt that were not read again

    def _encode(self, member: Author, prompt: Prompt) -> Encoded:
        options = self.options
        presented = options.offered_tools, options.json_schema, options.chat_template_kwargs
        try:
            return member.encoder.encode(prompt, options.score_on, *presented, window=member.context_window)
        except TooLong as error:
            raise self._overflow(member, error.tokens, options.max_tokens) from None

    def check_continuation(self, text: str, name: str) -> None:
        """Raise ContextOverflowError unless a text fits after the first prompt; `name` is its name in the error."""
        for k, prompt in self.encoded[0].items():
            member, window = self.members[k], self.members[k].context_window
            if window is not None and len(prompt.ids) + (count := _length(member, text)) > window:
                raise ContextOverflowError(member.name, window, len(prompt.ids), count, text=name)

    def check_room(self, lengths: dict[int, int]) -> None:
        """Raise ContextOverflowError unless each prompt and lengths[k] more tokens fit the window of candidate k."""
        for encoded in self.encoded:
            for k, prompt in encoded.items():
                window = self.members[k].context_window
                if window is not None and len(prompt.ids) + lengths[k] > window:
                    raise ContextOverflowError(self.members[k].name, window, len(prompt.ids), lengths[k])

    def limits(self, wanted: int | None) -> list[int]:
        """Most tokens of the answer to each prompt: `wanted`, or by default at most 256, as far as they fit.

        Raises:
            ContextOverflowError: a prompt and the wanted tokens do not fit the window of a candidate.
        """
        return [self._limit(encoded, wanted) for encoded in self.encoded]

    def _limit(self, encoded: dict[int, Encoded], wanted: int | None) -> int:
        limit = DEFAULT_MAX_TOKENS if wanted is None else wanted
        for k, prompt in encoded.items():
            member = self.members[k]
            if member.context_window is None:
                continue
            room = member.context_window - len(prompt.ids)
            if room < (1 if wanted is None else wanted):
                raise self._overflow(member, len(prompt.ids), wanted)
            limit = min(limit, room)
        return limit

    def _overflow(self, member: Author, tokens: int, wanted: int | None) -> ContextOverflowError:
        lengths = [_length(member, text) for text in self.options.passages]
        longest = max(enumerate(lengths), key=lambda pair: pair[1], default=None)
        return ContextOverflowError(member.name, member.context_window or 0, tokens, wanted or 1, longest=longest)

    def prefill(self) -> None:
        """Let every candidate read the prompts once; compute the members' scores and weights.

        Raises:
            MemberError: a member failed, and on_member_error is "raise" or no other member is left.
            AnswerTimeout: see check_time.
        """
        started = self._started = time.perf_counter()
        self._read(self.candidates, self.options.race)
        if self.mapped and not self.one_vocabulary(self._live()):
            self._read(self._translate())
        self.timings["prefill"] = time.perf_counter() - started
        started = time.perf_counter()
        self.weights = self._without_failing(lambda live: [self._weigh(row, live) for row in range(len(self.encoded))])
        if self.options.explains:
            self.evidence = [self._reading(row, self._live()).evidence() for row in range(len(self.encoded))]
        for line in self.lines.values():
            if isinstance(line, Line) and isinstance(engine := line.sequence.engine, KeepsHidden):
                engine.release_hidden(line.sequence)
        self.timings["weighting"] = time.perf_counter() - started
        self.check_time()

    def share_beginning(self) -> None:
        """Before prefill(): read the prefix that all prompts share once per member, and reuse its KV cache."""
        reads = []
        for k in (k for k in self.candidates if not self._remote(k)):
            rows = [prompts[k] for prompts in self.encoded]
            count = min(common(rows[0].ids, row.ids[:-1]) for row in rows)
            if len(rows) < 2 or count < SHARED:
                continue
            member, ids, scored = self._model(k), rows[0].ids[:count], set(rows[0].positions)
            sequence = member.open()
            sequence.gate = self.check
            if isinstance(sequence.engine, KeepsHidden):
                sequence.engine.keep_hidden(sequence)
            targets = [token if at in scored else -1 for at, token in enumerate(ids[1:], 1)]
            reads.append((member.adapter, sequence, Read(sequence, ids, [*targets, -1])))
        self._opened += [sequence for _, sequence, _ in reads]
        answers = base.read_together([read for *_, read in reads])
        outcomes = zip(reads, answers, strict=True)  # a read that fails here fails again, and is reported, in prefill()
        read = [
            (adapter, sequence) for (adapter, sequence, _), outcome in outcomes if not isinstance(outcome, Exception)
        ]
        self._prefixes = Beginnings(read, self._prefixes)

    def fork(self) -> None:
        """After prefill(): make n rows of each prompt, one per answer. From now on indices are rows: row r is answer
        r % n to prompt r // n."""
        n = self.options.n or 1
        lines: dict[tuple[int, int], Line | ServerLine] = {}
        for (k, at), line in self.lines.items():
            lines[k, at * n] = line
            for row in range(at * n + 1, at * n + n):
                lines[k, row] = twin = line.fork()
                if isinstance(twin, ServerLine):
                    twin.bill = Bill()
                else:
                    self._opened.append(twin.sequence)
        self.lines = dict(sorted(lines.items()))
        self._servers = {slot: line for slot, line in self.lines.items() if isinstance(line, ServerLine)}
        self._cached = {(k, at * n + i): count for (k, at), count in self._cached.items() for i in range(n)}
        self.encoded = [one for one in self.encoded for _ in range(n)]
        self.weights = [one for one in self.weights for _ in range(n)]
        self.evidence = [one for one in self.evidence for _ in range(n)]
        self.prompts = [one for one in self.prompts for _ in range(n)]
        self.conversations = [one for one in self.conversations for _ in range(n)]

    def check(self) -> None:
        """Run before every forward pass. Raises CancelledError if the request was cancelled, AnswerTimeout after its
        time limit."""
        self.stop.check()
        self.check_time()

    def check_time(self) -> None:
        """Raise AnswerTimeout if more time has passed since prefill() began than the option timeout allows."""
        timeout = self.options.timeout
        if timeout is not None and time.perf_counter() - self._started > timeout:
            raise AnswerTimeout(timeout)

    def first_token(self) -> None:
        """Record the time of the first token."""
        self.timings.setdefault("first_token", time.perf_counter() - self._started)

    def elapsed(self) -> dict[str, float]:
        """Seconds that prefill, weighting and the first token took, and in total so far; see Chunk.timings."""
        return {**self.timings, "total": time.perf_counter() - self._started}

    def _live(self) -> list[int]:
        """Indices of the members that have read the prompts, ascending."""
        return sorted({k for k, _ in self.lines})

    def _without_failing(self, work: Callable[[Sequence[int]], T]) -> T:
        """The result of `work` for the remaining members; it is called again if a member fails in it."""
        while True:
            live = self._live()
            try:
                return work(live)
            except MemberError as error:
                lost, self.weights = self.failures.lose(error, live, self.weights)
                self._drop(lost)

    def _drop(self, members: Collection[int]) -> None:
        for slot in [slot for slot in self.lines if slot[0] in members]:
            self.lines.pop(slot).close()

    def run_on_lines(self, work: Callable[[dict[tuple[int, int], Line | ServerLine]], T]) -> T:
        """The result of `work` for the running lines, by (member, prompt). If a member fails, `work` starts again
        without it, so the result is always from the same members.

        Raises:
            MemberError: a member failed, and on_member_error is "raise" or no other member is left.
        """
        rows = range(len(self.encoded))
        return self._without_failing(lambda _: work({(k, r): self.lines[k, r] for r in rows for k in self.running(r)}))

    def _reading(self, row: int, live: Sequence[int]) -> Reading:
        """A prompt with the members' lines and scores."""
        lines = {k: self.lines[k, row] for k in live if (k, row) in self.lines}  # without members that left a race
        scores = {k: self._scores[k, row] for k in lines}
        encoded = {k: self.encoded[row][k] for k in lines}
        for k, line in lines.items():
            if isinstance(line, ServerLine) and scores[k] is not None:
                encoded[k] = line.encoded()  # with the tokens that the server reported
        return Reading({k: self.members[k] for k in lines}, lines, encoded, scores)

    def _weigh(self, row: int, live: Sequence[int]) -> Weights:
        reading = self._reading(row, live)
        options = renormalised(self.options, [member.name for member in reading.members.values()])
        weights = over_all(reading.weigh(options), list(reading.members), [member.name for member in self.members])
        return drop_small(weights, self.options.min_weight)

    def provable(self, which: Sequence[int]) -> bool:
        """Whether the pack's most likely token can be proved from the members' most likely tokens alone. This needs one
        vocabulary, a member on a server, servers that report next tokens, and greedy decoding without a grammar,
        penalties or log-probabilities."""
        members = [self.members[k] for k in which]
        far = [member for member in members if isinstance(member, ServerMember)]
        akin = all(member.vocabulary.akin(members[0].vocabulary) for member in members)
        shaped = self.grammar is not None or self.options.penalises or self.options.records
        plain = self.options.temperature == 0 and not shaped and not self.mapped
        return plain and akin and bool(far) and all(member.tops is not None for member in far)

    def _remote(self, k: int) -> bool:
        """Whether a member runs on a server."""
        return not isinstance(self.members[k], Member)

    def _model(self, k: int) -> Member:
        """A member that runs locally."""
        member = self.members[k]
        assert isinstance(member, Member)
        return member

    def token_lines(self, index: int) -> dict[int, Line]:
        """The lines of the members that run for a prompt, without those on servers."""
        lines = {k: self.lines[k, index] for k in self.running(index)}
        return {k: line for k, line in lines.items() if isinstance(line, Line)}

    def _read(self, which: Sequence[int], chunk: int = 0) -> None:
        """Let members read the prompts, in a race with steps of `chunk` tokens if that is not 0. Members that fail are
        dropped, or raise their error.

        If the weighting needs all logits, and the engine can compute them from hidden states, the scores are computed
        together with the weights: one product with the LM head instead of two. This is not done if the scores are
        needed earlier, to choose the reference vocabulary, or for an explanation.
        """
        servers = {
            (k, row): ServerLine(member, prompt, self.options, self.check)
            for k in which
            for row, encoded in enumerate(self.encoded)
            if isinstance(member := self.members[k], ServerMember) and isinstance(prompt := encoded[k], Asked)
        }
        self._servers |= servers
        keep = isinstance(self.options.weighting, str) and find(self.options.weighting).needs_logits
        late = keep and not self.options.explains and (not self.mapped or self.one_vocabulary(self.candidates))
        asked, unread = {}, set()
        for k in (k for k in which if not self._remote(k)):
            for row, encoded in enumerate(self.encoded):
                prompt = encoded[k]
                member = self._model(k)
                sequence = member.open(self._prefixes)
                sequence.gate = self.check
                if keep and isinstance(sequence.engine, KeepsHidden) and sequence.engine.keep_hidden(sequence) and late:
                    unread.add((k, row))
                asked[k, row] = sequence, member, prompt.ids, () if (k, row) in unread else prompt.positions
        self._opened += [sequence for sequence, *_ in asked.values()]
        with reading(servers) as judged:
            lines, scores, failed = self._raced(asked, chunk) if chunk else open_lines(asked)
            for slot, read in judged().items():
                if isinstance(read, MemberError):
                    failed[slot] = read
                else:
                    self.lines[slot], self._scores[slot] = servers[slot], read
        self.lines |= lines
        self._cached |= {slot: line.sequence.cached_tokens for slot, line in lines.items()}
        self._scores |= {slot: None if slot in unread else score for slot, score in scores.items()}
        for (k, _), error in failed.items():
            if k not in self.failures.members:
                lost, _ = self.failures.lose(error, [k])
                self._drop(lost)
        self.lines = dict(sorted(self.lines.items()))

    def _raced(
        self, asked: Mapping[Slot, tuple[base.Sequence, Member, Sequence[int], Sequence[int]]], chunk: int
    ) -> tuple[dict[Slot, Line], dict[Slot, Tensor], dict[Slot, MemberError]]:
        """As open_lines. Members that left the race are in none of the three results."""
        race = Race({(k, r): (asked[k, r][0], asked[k, r][1], self.encoded[r][k]) for k, r in asked})
        failed = race.run(chunk, self.options.min_weight)
        left = {}
        for slot in race.going:
            sequence, member, ids, positions = asked[slot]
            start = len(sequence.ids)
            left[slot] = sequence, member, ids[start:], [at - start for at in positions if at > start]
        lines, scores, more = open_lines(left)
        failed |= more
        return (
            lines,
            {slot: race.scores_with(slot, scores[slot]) for slot in lines},
            {slot: self.members[slot[0]].failed(error) for slot, error in failed.items()},
        )

    def _translate(self) -> list[int]:
        """Choose the member with the lowest NLL per byte as the reference. Map the members with other vocabularies to
        the reference's vocabulary (paper §3.4).

        Returns:
            The mapped members; they have not yet read the prompt in the reference's ids.
        """
        live = self._live()
        by_byte = self.options.model_copy(update={"weighting": "top1", "unit": "byte"})
        lowest = self._reading(0, live).weigh(by_byte)
        reference = live[max(range(len(live)), key=lowest.values.__getitem__)]
        others = [k for k in live if not self.one_vocabulary([reference, k])]
        members, wanted = list(self.members), [self._model(k) for k in others]
        for k, member in zip(others, translated(wanted, self._model(reference)), strict=True):
            self.lines.pop((k, 0)).close()
            members[k] = member
            self.encoded[0][k] = self.encoded[0][reference]
        self.members = members
        self.limits(0)
        return others

    def running(self, index: int) -> list[int]:
        """Members that decode a prompt's answer: those with a weight above 0."""
        return [k for k in self._live() if self.weights[index].values[k] != 0]

    def one_vocabulary(self, which: Sequence[int]) -> bool:
        """Whether these members share a vocabulary."""
        if any(self._remote(k) for k in which):
            return False
        first = self.members[which[0]].vocabulary
        return all(self.members[k].vocabulary.akin(first) for k in which[1:])

    def cache_bytes(self) -> int:
        """Largest size in bytes of the KV caches of all members and prompts."""
        limits = self.limits(self.options.max_tokens)
        return (self.options.n or 1) * sum(
            (len(prompt.ids) + limit) * self._model(k).engine.token_bytes
            for encoded, limit in zip(self.encoded, limits, strict=True)
            for k, prompt in encoded.items()
            if not self._remote(k)
        )

    def usage(self, index: int, member: int) -> Usage:
        """Usage of a prompt in a member's tokens, with no completion tokens yet."""
        line = self.lines.get((member, index))
        servers = {
            self.members[k].name: line.bill.as_dict() for (k, row), line in self._servers.items() if row == index
        }
        size = line.prompt_tokens if isinstance(line, ServerLine) else len(self.encoded[index][member].ids)
        return Usage(size, 0, self._cached.get((member, index), 0), servers=servers)

    def close(self) -> None:
        """Free the caches."""
        for sequence in self._opened:
            sequence.close()


def _length(member: Author, text: str) -> int:
    """Tokens of a text after a prompt; of a text far longer than the member's window, at least so many."""
    try:
        check_length(text, member.context_window or sys.maxsize, member.encoder.plain)
    except TooLong as error:
        return error.tokens
    return len(member.encoder.continuation(text))
