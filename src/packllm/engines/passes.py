"""Shared by engines that keep a cache per sequence: batching reads into passes, distributing the results, and starting
sequences from cached prefixes."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from packllm.engines import base, prefix
from packllm.engines.base import Prefixes
from packllm.engines.meeting import Circle, Job, Meeting, Packs, Part

NOT_FINITE = "its logits are not finite (NaN or infinity)"


class Cached(base.Sequence):
    """A sequence with a cache (see base.Sequence). Only its engine reads into it.

    Args:
        engine, meeting: its engine, and the queue of its reads.
        adapter: index of the engine's adapter; None for the weights without an adapter.
        prefixes: the cache of earlier prompts; None for none.

    Attributes:
        cache: the engine's cache of the first `cached` ids; None if there is none.
        known: float64, the log-probabilities of the ids but the first, as far as they were read as a prompt; NaN where
            they were not requested.
    """

    def __init__(
        self, engine: base.Engine, meeting: Meeting, adapter: int | None, prefixes: Prefixes | None = None
    ) -> None:
        self.engine, self.adapter, self.prefixes = engine, adapter, prefixes
        self._meeting = meeting
        self.circle = Circle()
        self.closed = False
        self.ids: list[int] = []
        self.cache: Any = None
        self.cached = 0
        self.known: Tensor = torch.empty(0, dtype=torch.float64)
        self._checkpoint: tuple[int, Any] | None = None  # an earlier state, if the cache cannot go back

    @abstractmethod
    def shorten(self, length: int) -> None:
        """Cut the cache to the first `length` ids; only called if the engine rewinds."""

    @abstractmethod
    def twin(self) -> Any:
        """A copy of the cache that can grow independently."""

    @abstractmethod
    def snapshot(self, cache: Any) -> Any:
        """A copy of a cache, for remember()."""

    @abstractmethod
    def nbytes(self) -> int:
        """Memory of the cache in bytes."""

    def crop(self, length: int) -> None:
        if length >= len(self.ids):
            return
        del self.ids[length:]
        self.known = self.known[: max(0, length - 1)]
        if self.cached <= length:
            return
        if self.engine.rewinds:
            self.shorten(length)
            self.cached = length
        else:
            self.lose()

    def lose(self) -> None:
        """Discard the invalid cache: go back to the last valid state, so that the rest of the ids is read again."""
        self.cache, self.cached = None, 0
        if self._checkpoint is not None and self._checkpoint[0] <= len(self.ids):
            self.cached, self.cache = self._checkpoint[0], self.snapshot(self._checkpoint[1])

    @property
    def remembers(self) -> bool:
        return self._checkpoint is not None

    def remember(self) -> None:
        """If the cache cannot go back: save its state, for a later crop() to here or beyond."""
        self._checkpoint = self.cached, self.snapshot(self.cache)

    def fork(self) -> Self:
        return self.beside(None if self.cache is None else self.twin())

    def beside(self, cache: Any) -> Self:
        """Another sequence with the same ids and its own cache."""
        other = copy.copy(self)
        other.ids, other.cache = list(self.ids), cache
        self._meeting.fork(self, other)
        return other

    def close(self) -> None:
        if not self.closed:
            self.closed, self.cached = True, 0
            self.cache = self._checkpoint = None
            self._meeting.leave(self)

    def extend(self, ids: List[int], states: Tensor | None) -> None:
        """Record that these ids have been read; `states` (n, d) are the engine's hidden states of them, if any."""
        self.ids += ids
        self.cached += len(ids)

    def start_from(self, source: Self, count: int, known: Tensor) -> None:
        """Take over the first `count` ids, cache and scores of a sequence that was cut to them and is not used
        again."""
        self.cache, self.cached, self.ids, self.known = source.cache, count, source.ids, known
        source.cache = None


S = TypeVar("S", bound=Cached)


@dataclass(eq=False)
class Row(Generic[S]):
    """The part of a pass that one sequence reads."""

    sequence: S
    parts: list[Part] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return [i for part in self.parts for i in part.ids]


@dataclass(frozen=True)
class Numbers:
    """The results of a pass.

    Attributes:
        logprobs: float32 (m, V) at the m places where whole rows are wanted; None if there are none.
        sound: for each of these rows, whether it is valid.
        scores: log-probabilities of the targets at the other places.
        states: (n, d) of all n places, for Cached.extend.
    """

    logprobs: Tensor | None
    sound: list[bool]
    scores: list[float]
    states: Tensor | None = None


class Passes(Packs, Generic[S]):
    """An engine that runs passes over rows of several sequences, each with its own cache."""

    @abstractmethod
    def groups(self, rows: List[Row[S]]) -> list[list[Row[S]]]:
        """Partition the rows into groups that can share a pass."""

    @abstractmethod
    def catch_up(self, sequence: S) -> None:
        """Bring the sequence's cache up to date with its ids; create it if there is none."""

    @abstractmethod
    def compute(self, rows: List[Row[S]], whole: List[int], some: List[int], targets: List[int]) -> Numbers:
        """Run the rows' ids through the model, each row after its sequence's cache.

        Args:
            rows: the rows, concatenated in this order.
            whole: places, counted over all rows, after which all log-probabilities are wanted.
            some, targets: places after which one target's log-probability is wanted, and the targets.
        """

    def prepare(self, sequence: S) -> None:
        """Called before a prompt that may be cached is read."""

    def scores_again(self, stored: S, places: List[int], targets: List[int]) -> list[float] | None:
        """A cached sequence's log-probabilities of targets other than its own ids; None if it cannot compute them."""
        return None

    def copy_for_cache(self, sequence: S) -> S:
        """A copy of a sequence for the prefix cache."""
        return sequence.fork()

    def run(self, parts: List[Part]) -> None:
        """Run parts, and record the results in their jobs. A pass that fails is run again for each sequence separately,
        because the fault may be another request's."""
        rows = self._rows(parts)
        for group in self.groups(rows):
            try:
                self._pass(group)
            except BaseException as error:
                for row in group:
                    row.sequence.lose()
                if not isinstance(error, Exception):
                    raise  # an interrupt: the reads of others are run again
                for row in group:
                    self._alone(row, error if len(group) == 1 else None)

    def _alone(self, row: Row[S], error: Exception | None) -> None:
        try:
            if error is not None:
                raise error
            self._pass([row])
        except Exception as failure:
            row.sequence.lose()
            for part in row.parts:
                part.job.answer = failure

    def _rows(self, parts: List[Part]) -> list[Row[S]]:
        rows: dict[int, Row[S]] = {}
        for part in parts:
            sequence: Any = part.sequence
            if sequence.closed:
                part.job.answer = ValueError("this sequence is closed")
            elif not part.count:
                part.job.take(0, self._nothing(part))
            else:
                if id(sequence) not in rows:
                    part = self._resumed(sequence, part)
                if part.count:
                    rows.setdefault(id(sequence), Row(sequence)).parts.append(part)
        return list(rows.values())

    def _nothing(self, part: Part) -> Tensor:
        return torch.empty(0, self.vocabulary_size) if part.targets is None else torch.empty(0, dtype=torch.float64)

    def _pass(self, rows: List[Row[S]]) -> None:
        """Run a group of rows as one pass and distribute the results."""
        for row in rows:
            self.catch_up(row.sequence)
        row_places: list[int] = []
        target_places: list[int] = []
        targets: list[int] = []
        at = 0
        for part in (part for row in rows for part in row.parts):
            if part.targets is None:
                row_places += [at + place for place in part.places]
            else:
                target_places += [at + place for place in part.places]
                targets += [part.targets[place] for place in part.places]
            at += part.count
        self._hand_out(rows, self.compute(rows, row_places, target_places, targets))

    def _hand_out(self, rows: List[Row[S]], numbers: Numbers) -> None:
        row_count = score_count = at = 0
        for row in rows:
            for part, later in zip_longest(row.parts, row.parts[1:]):
                job, sequence, count, ids = part.job, row.sequence, len(part.places), part.ids
                if part.targets is None:
                    answer = (
                        self._nothing(part)
                        if numbers.logprobs is None
                        else numbers.logprobs[row_count : row_count + count]
                    )
                    job.take(part.count, answer)
                    faulty = not all(numbers.sound[row_count : row_count + count])
                    row_count += count
                else:
                    scores = numbers.scores[score_count : score_count + count]
                    logprobs = torch.full((part.count,), torch.nan, dtype=torch.float64)
                    logprobs[part.places] = torch.tensor(scores, dtype=torch.float64)
                    faulty = any(math.isnan(score) or score == math.inf for score in scores)
                    score_count += count
                    self._note(sequence, job, logprobs, -1 if later is None else later.ids[0])
                    job.take(part.count, logprobs)
                if faulty:
                    job.answer = FloatingPointError(NOT_FINITE)
                sequence.extend(ids, None if numbers.states is None else numbers.states[at : at + part.count])
                at += part.count
                if part.targets is None and job.answer is not None:
                    self._keep(sequence)
            if not self.rewinds and not row.sequence.remembers:
                row.sequence.remember()

    def _keep(self, sequence: S) -> None:
        """Store a prompt in the prefix cache after it was read, once."""
        prefixes, sequence.prefixes = sequence.prefixes, None
        if prefixes is not None and len(sequence.ids) >= prefix.MINIMUM:
            stored = self.copy_for_cache(sequence)
            prefixes.keep(sequence.adapter, stored, stored.nbytes())

    def _note(self, sequence: S, job: Job, logprobs: Tensor, later: int) -> None:
        """Record the log-probabilities of a prompt's own next ids, for later prompts with the same prefix. `later` is
        the id after this part."""
        if len(sequence.known) == len(sequence.ids):
            following = [*job.read.ids[job.done + 1 :][: len(logprobs)], later][: len(logprobs)]
            targets = list(job.read.want)[job.done :][: len(logprobs)]
            is_own = torch.tensor(
                [one == other for one, other in zip(following, targets, strict=True)], dtype=torch.bool
            )
            sequence.known = torch.cat([sequence.known, logprobs.where(is_own, torch.nan)])

    def _resumed(self, sequence: S, part: Part) -> Part:
        """Start an empty sequence from the longest cached prefix of its prompt; return the rest of its part."""
        job = part.job
        if sequence.ids or sequence.prefixes is None or job.done or job.read.want == "all":
            return part
        self.prepare(sequence)
        count = 0
        if match := sequence.prefixes.longest(self, sequence.adapter, job.read.ids):
            prefix_sequence: Any = match[0].fork()
            count = min(match[1], len(job.read.ids) - (part.targets is None))
            scores, count = self._stored_scores(prefix_sequence, job, count)
            if prefix_sequence.cache is None or not count or (not self.rewinds and count != len(prefix_sequence.ids)):
                count = 0
            else:
                prefix_sequence.crop(count)
                sequence.start_from(
                    prefix_sequence, count, scores if part.targets is not None else prefix_sequence.known[:count]
                )
                sequence.cached_tokens = count
                job.take(count, self._nothing(part) if part.targets is None else scores)
            prefix_sequence.close()
        sequence.prefixes.note(count)
        return Part(job, min(part.count, job.left))

    def _stored_scores(self, stored: S, job: Job, count: int) -> tuple[Tensor, int]:
        """The cached log-probabilities of the first targets, and how many of `count` ids have all that are wanted."""
        if isinstance(job.read.want, str):
            return stored.known[:count], count
        targets = list(job.read.want)[:count]
        logprobs = torch.full((count,), torch.nan, dtype=torch.float64)
        known = stored.known[:count]
        same = [one == other for one, other in zip(stored.ids[1 : len(known) + 1], targets, strict=False)]
        logprobs[: len(same)] = known[: len(same)].where(torch.tensor(same, dtype=torch.bool), torch.nan)
        missing = [place for place, target in enumerate(targets) if target >= 0 and logprobs[place].isnan()]
        if missing:
            scores = self.scores_again(stored, missing, [targets[place] for place in missing])
            if scores is None:
                count = missing[0]
            else:
                logprobs[missing] = torch.tensor(scores, dtype=torch.float64)
        return logprobs[:count], count
