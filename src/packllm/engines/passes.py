"""What engines share that keep a cache for each sequence: from the parts that a meeting chose to one pass, from its
numbers to answers, and from kept prompts to new ones."""

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
    """See base.Sequence. Only its engine reads into it.

    Args:
        engine, meeting: whose it is, and where its reads wait.
        adapter: of the engine's adapters, None for the weights as they are.
        prefixes: where earlier prompts are kept, None for nowhere.

    Attributes:
        cache: what the engine keeps of the first `cached` ids; None where it has nothing.
        known: float64, what each id but the first was given, NaN where nobody asked; of the ids that were read as a
            prompt.
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
        self._checkpoint: tuple[int, Any] | None = None  # an earlier state, of a cache that cannot go back

    @abstractmethod
    def shorten(self, length: int) -> None:
        """Cut the cache to that of the first `length` ids; only where the engine rewinds."""

    @abstractmethod
    def twin(self) -> Any:
        """A cache of the same ids, to go on from independently."""

    @abstractmethod
    def snapshot(self, cache: Any) -> Any:
        """A copy of a cache that stays as it is."""

    @abstractmethod
    def nbytes(self) -> int:
        """Memory held."""

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
        """The cache cannot be used any more: go back to the last state that is sure, and read the rest of the ids
        again."""
        self.cache, self.cached = None, 0
        if self._checkpoint is not None and self._checkpoint[0] <= len(self.ids):
            self.cached, self.cache = self._checkpoint[0], self.snapshot(self._checkpoint[1])

    @property
    def remembers(self) -> bool:
        return self._checkpoint is not None

    def remember(self) -> None:
        """Where the cache cannot go back: keep the state as it is now, for a crop() to here or further on."""
        self._checkpoint = self.cached, self.snapshot(self.cache)

    def fork(self) -> Self:
        return self.beside(None if self.cache is None else self.twin())

    def beside(self, cache: Any) -> Self:
        """Another sequence that has read the same, with a cache of its own."""
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
        """These ids have been read; `states` (n, d) is what the engine says of them besides their logits."""
        self.ids += ids
        self.cached += len(ids)

    def start_from(self, kept: Self, count: int, known: Tensor) -> None:
        """Take over the first `count` ids of a sequence, which is cut to these and given up, and what is known of
        them."""
        self.cache, self.cached, self.ids, self.known = kept.cache, count, kept.ids, known
        kept.cache = None


S = TypeVar("S", bound=Cached)


@dataclass(eq=False)
class Row(Generic[S]):
    """What one sequence reads in a pass."""

    sequence: S
    parts: list[Part] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return [i for part in self.parts for i in part.ids]


@dataclass(frozen=True)
class Numbers:
    """What a pass gave.

    Attributes:
        logprobs: float32 (m, V) at the m places where all were wanted; None where there are none.
        sound: whether each row of them is finite.
        scores: of the targets at the other places.
        states: (n, d) of all n places, for Cached.extend.
    """

    logprobs: Tensor | None
    sound: list[bool]
    scores: list[float]
    states: Tensor | None = None


class Passes(Packs, Generic[S]):
    """An engine that runs a pass over rows of several sequences, each of which keeps a cache."""

    @abstractmethod
    def groups(self, rows: List[Row[S]]) -> list[list[Row[S]]]:
        """Rows that can share a pass."""

    @abstractmethod
    def catch_up(self, sequence: S) -> None:
        """Make a cache where there is none, and read again what it lacks of the ids."""

    @abstractmethod
    def compute(self, rows: List[Row[S]], whole: List[int], some: List[int], targets: List[int]) -> Numbers:
        """Run the rows' ids, one row after the other, through the model, after what each sequence's cache holds.

        Args:
            whole: places, counted through all rows, after which all log-probabilities are wanted.
            some, targets: places after which that of one target is.
        """

    def prepare(self, sequence: S) -> None:
        """Before a prompt is read that may be kept."""

    def scores_again(self, kept: S, places: List[int], targets: List[int]) -> list[float] | None:
        """What a kept sequence tells of other targets than its own ids; None where it cannot."""
        return None

    def kept(self, sequence: S) -> S:
        """A twin of a sequence, to be kept while others run."""
        return sequence.fork()

    def run(self, parts: List[Part]) -> None:
        """Take the jobs on by their parts. A pass that fails is tried again for each sequence by itself, for the
        fault may be another request's."""
        rows = self._rows(parts)
        for group in self.groups(rows):
            try:
                self._pass(group)
            except BaseException as error:
                for row in group:
                    row.sequence.lose()
                if not isinstance(error, Exception):
                    raise  # an interrupt: what others asked for is read again
                for row in group:
                    self._alone(row, error if len(group) == 1 else None)

    def _alone(self, row: Row[S], error: Exception | None) -> None:
        try:
            if error is not None:
                raise error
            self._pass([row])
        except Exception as own:
            row.sequence.lose()
            for part in row.parts:
                part.job.answer = own

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
        """Run the rows of a group, and give their jobs what they want."""
        for row in rows:
            self.catch_up(row.sequence)
        whole: list[int] = []
        some: list[int] = []
        targets: list[int] = []
        at = 0
        for part in (part for row in rows for part in row.parts):
            if part.targets is None:
                whole += [at + place for place in part.places]
            else:
                some += [at + place for place in part.places]
                targets += [part.targets[place] for place in part.places]
            at += part.count
        self._hand_out(rows, self.compute(rows, whole, some, targets))

    def _hand_out(self, rows: List[Row[S]], found: Numbers) -> None:
        whole = some = at = 0
        for row in rows:
            for part, later in zip_longest(row.parts, row.parts[1:]):
                job, sequence, count, ids = part.job, row.sequence, len(part.places), part.ids
                if part.targets is None:
                    answer = self._nothing(part) if found.logprobs is None else found.logprobs[whole : whole + count]
                    job.take(part.count, answer)
                    faulty = not all(found.sound[whole : whole + count])
                    whole += count
                else:
                    scores = found.scores[some : some + count]
                    given = torch.full((part.count,), torch.nan, dtype=torch.float64)
                    given[part.places] = torch.tensor(scores, dtype=torch.float64)
                    faulty = any(math.isnan(score) or score == math.inf for score in scores)
                    some += count
                    self._note(sequence, job, given, -1 if later is None else later.ids[0])
                    job.take(part.count, given)
                if faulty:
                    job.answer = FloatingPointError(NOT_FINITE)
                sequence.extend(ids, None if found.states is None else found.states[at : at + part.count])
                at += part.count
                if part.targets is None and job.answer is not None:
                    self._keep(sequence)
            if not self.rewinds and not row.sequence.remembers:
                row.sequence.remember()

    def _keep(self, sequence: S) -> None:
        """Keep a prompt that has been read, once."""
        prefixes, sequence.prefixes = sequence.prefixes, None
        if prefixes is not None and len(sequence.ids) >= prefix.MINIMUM:
            kept = self.kept(sequence)
            prefixes.keep(sequence.adapter, kept, kept.nbytes())

    def _note(self, sequence: S, job: Job, given: Tensor, later: int) -> None:
        """Remember what a prompt's own next ids were given, for prompts that begin alike; `later` follows its read."""
        if len(sequence.known) == len(sequence.ids):
            following = [*job.read.ids[job.done + 1 :][: len(given)], later][: len(given)]
            targets = list(job.read.want)[job.done :][: len(given)]
            own = torch.tensor([one == other for one, other in zip(following, targets, strict=True)], dtype=torch.bool)
            sequence.known = torch.cat([sequence.known, given.where(own, torch.nan)])

    def _resumed(self, sequence: S, part: Part) -> Part:
        """Let a sequence that has read nothing start from the longest kept one that begins alike; what is left of its
        part."""
        job = part.job
        if sequence.ids or sequence.prefixes is None or job.done or job.read.want == "all":
            return part
        self.prepare(sequence)
        count = 0
        if found := sequence.prefixes.longest(self, sequence.adapter, job.read.ids):
            kept: Any = found[0].fork()
            count = min(found[1], len(job.read.ids) - (part.targets is None))
            given, count = self._scores_kept(kept, job, count)
            if kept.cache is None or not count or (not self.rewinds and count != len(kept.ids)):
                count = 0
            else:
                kept.crop(count)
                sequence.start_from(kept, count, given if part.targets is not None else kept.known[:count])
                sequence.cached_tokens = count
                job.take(count, self._nothing(part) if part.targets is None else given)
            kept.close()
        sequence.prefixes.note(count)
        return Part(job, min(part.count, job.left))

    def _scores_kept(self, kept: S, job: Job, count: int) -> tuple[Tensor, int]:
        """What a kept sequence tells of the first targets, and of how many of `count` ids it tells all that is
        wanted."""
        if isinstance(job.read.want, str):
            return kept.known[:count], count
        targets = list(job.read.want)[:count]
        given = torch.full((count,), torch.nan, dtype=torch.float64)
        known = kept.known[:count]
        same = [one == other for one, other in zip(kept.ids[1 : len(known) + 1], targets, strict=False)]
        given[: len(same)] = known[: len(same)].where(torch.tensor(same, dtype=torch.bool), torch.nan)
        missing = [place for place, target in enumerate(targets) if target >= 0 and given[place].isnan()]
        if missing:
            scores = self.scores_again(kept, missing, [targets[place] for place in missing])
            if scores is None:
                count = missing[0]
            else:
                given[missing] = torch.tensor(scores, dtype=torch.float64)
        return given[:count], count
