"""Reads of all requests meet and run together.

Whoever finds the place free (a CPU, a GPU) takes the reads that wait at one of its engines, runs one pass over them,
hands out the results and leaves. There is
no thread of the engine's own and no mode: threads, tasks and batches all get continuous batching, and a request stays
plain blocking code.
"""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Hashable
from collections.abc import Sequence as List
from dataclasses import dataclass, field

import torch
from torch import Tensor

from packllm.engines.base import Engine, Read, Sequence

QUIET, LONGEST = 0.01, 0.1
"""Seconds that a pass waits for readers of the pass before it: since the last one came, and at most. They are choosing
their next tokens; a pass without them would be run again for them."""

PATIENCE = 4
"""Passes of other engines that one whose reads wait lets go first."""

SHORT = 16
"""Tokens that one sequence reads in a pass at any time: a step of an answer, a drafted block."""


@dataclass(eq=False)
class Job:
    """A read under way.

    Attributes:
        read: what was asked.
        done: how many of its ids have been read.
        results: what came back for these.
        answer: the whole result, or what went wrong, once there is one.
    """

    read: Read
    done: int = 0
    results: list[Tensor] = field(default_factory=list)
    answer: Tensor | Exception | None = None

    @property
    def left(self) -> int:
        return len(self.read.ids) - self.done

    def take(self, count: int, result: Tensor) -> None:
        """So many more ids are read."""
        self.done += count
        self.results.append(result)
        if not self.left:
            self.answer = self.results[0] if len(self.results) == 1 else torch.cat(self.results)


class Circle:
    """Sequences that read together once, and forks of these: one request's. A pass waits for requests, not for
    sequences."""

    def __init__(self) -> None:
        self.open = 1  # sequences
        self._part_of: Circle | None = None

    def whole(self) -> Circle:
        """The circle that this one has become a part of."""
        return self if self._part_of is None else self._part_of.whole()

    def join(self, other: Circle) -> None:
        if (one := self.whole()) is not (two := other.whole()):
            two.open += one.open
            one._part_of = two


@dataclass(frozen=True)
class Part:
    """What a pass reads of a job: its next `count` ids."""

    job: Job
    count: int

    @property
    def sequence(self) -> Sequence:
        return self.job.read.sequence

    @property
    def ids(self) -> list[int]:
        return list(self.job.read.ids[self.job.done : self.job.done + self.count])

    @property
    def targets(self) -> list[int] | None:
        """What log-probabilities are wanted of, after each id; None where whole rows are."""
        want = self.job.read.want
        return None if isinstance(want, str) else list(want[self.job.done : self.job.done + self.count])

    @property
    def places(self) -> list[int]:
        """After which of the ids something is wanted."""
        if (targets := self.targets) is not None:
            return [place for place, target in enumerate(targets) if target >= 0]
        if self.job.read.want == "all":
            return list(range(self.count))
        return [self.count - 1] if self.job.read.want == "last" and self.count == self.job.left else []


class Packs(Engine):
    """An engine that runs passes over what a meeting chooses.

    Attributes:
        meeting: where its reads wait.
        most: tokens of one pass.
    """

    meeting: Meeting
    most: int

    @abstractmethod
    def run(self, parts: List[Part]) -> None:
        """Run one pass over some parts, and take their jobs on."""

    def read(self, reads: List[Read]) -> list[Tensor | Exception]:
        return self.meeting.read(reads)


class Meeting:
    """Where the reads of all engines of one place wait for a pass."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._busy = False
        self._expected: set[Circle] = set()  # requests that were served and have not come back
        self._passed_over: Counter[Packs] = Counter()

    @staticmethod
    def at(place: Hashable) -> Meeting:
        """The meeting of a place."""
        with _lock:
            return _meetings.setdefault(place, Meeting())

    def read(self, reads: List[Read]) -> list[Tensor | Exception]:
        """Answers to reads of engines of this place, in their order."""
        jobs = [Job(read) for read in reads]
        circles = [_circle(read.sequence) for read in reads]
        with self._condition:
            for circle in circles[1:]:
                circle.join(circles[0])
            self._expected = {circle.whole() for circle in self._expected} - {circles[0].whole()}
            self._waiting += jobs
            self._condition.notify_all()
        try:
            while any(job.answer is None for job in jobs):
                for read in reads:
                    read.sequence.gate()
                with self._condition:
                    while self._busy and any(job.answer is None for job in jobs):
                        self._condition.wait()
                    if all(job.answer is not None for job in jobs):
                        break
                    self._busy = True
                self._lead()
        finally:
            with self._condition:  # who is interrupted takes the reads along, but for those of a pass under way
                self._waiting = [job for job in self._waiting if job not in jobs]
                while self._busy and any(job in self._running for job in jobs):
                    self._condition.wait()
        return [job.answer for job in jobs if job.answer is not None]

    def fork(self, sequence: Sequence, twin: Sequence) -> None:
        """A twin is of the same request."""
        with self._condition:
            circle = _circle(sequence).whole()
            circle.open += 1
            twin.circle = circle  # type: ignore[attr-defined]

    def leave(self, sequence: Sequence) -> None:
        """A sequence is closed; nobody waits for a request without open ones."""
        with self._condition:
            circle = _circle(sequence).whole()
            circle.open -= 1
            if not circle.open and circle in self._expected:
                self._expected.discard(circle)
                self._condition.notify_all()

    def _lead(self) -> None:
        """Run one pass over what waits at one engine."""
        try:
            with self._condition:
                self._gather()
                engine = self._next()
                parts = [] if engine is None else chosen([j for j in self._waiting if _engine(j) is engine], engine)
                self._running = [part.job for part in parts]
                if engine is not None:
                    engine.requests = len({_circle(part.sequence).whole() for part in parts})
            if engine is not None:
                engine.run(parts)
        finally:
            with self._condition:
                ended = {_circle(job.read.sequence).whole() for job in self._waiting if job.answer is not None}
                self._waiting = [job for job in self._waiting if job.answer is None]
                waiting = {_circle(job.read.sequence).whole() for job in self._waiting}
                self._expected = {circle for circle in self._expected | ended if circle.open} - waiting
                self._busy, self._running = False, []
                self._condition.notify_all()

    def _gather(self) -> None:
        """Wait a moment for the requests that were served last: they are choosing their next tokens, and a pass
        without them would be run again for them."""
        latest = time.monotonic() + LONGEST
        while self._expected:
            count = len(self._expected)
            if not self._condition.wait(min(QUIET, latest - time.monotonic())) and len(self._expected) == count:
                break
            if time.monotonic() >= latest:
                break
        self._expected = set()

    def _next(self) -> Packs | None:
        """The engine whose turn it is: where the fewest requests wait, so that they catch up with the others; but
        none is passed over more than a few times."""
        requests: dict[Packs, set[Circle]] = {}
        for job in self._waiting:
            requests.setdefault(_engine(job), set()).add(_circle(job.read.sequence).whole())
        if not requests:
            return None
        engine = min(requests, key=lambda one: (self._passed_over[one] < PATIENCE, len(requests[one])))
        self._passed_over = Counter({other: self._passed_over[other] + 1 for other in requests if other is not engine})
        return engine


def chosen(jobs: List[Job], engine: Packs) -> list[Part]:
    """What the next pass of an engine reads: what is short, then long reads as far as there is room, half of it for
    the oldest
    and the shortest of the others next. A request with a long read may make a pass of short ones three times as long:
    it must not keep those waiting."""
    queues: dict[Sequence, list[Job]] = {}
    for job in jobs:
        queues.setdefault(job.read.sequence, []).append(job)
    left = {sequence: sum(job.left for job in waiting) for sequence, waiting in queues.items()}
    long = [sequence for sequence in queues if left[sequence] > SHORT]
    taken = {sequence: left[sequence] for sequence in queues if left[sequence] <= SHORT}
    if long:
        steps, requests = sum(taken.values()), len({_circle(sequence).whole() for sequence in long})
        room = min(engine.most, int(2 * requests * (1 / engine.packing + steps))) if steps else engine.most
        oldest, others = long[0], sorted(long[1:], key=left.__getitem__)
        if others:
            taken[oldest] = min(left[oldest], max(1, room // 2))
            room -= taken[oldest]
        for sequence in [*others, oldest]:
            more = min(left[sequence] - taken.get(sequence, 0), room)
            taken[sequence] = taken.get(sequence, 0) + more
            room -= more
    parts: list[Part] = []
    for sequence, waiting in queues.items():
        for job in waiting:
            count = min(job.left, taken.get(sequence, 0))
            if count or not job.left:
                parts.append(Part(job, count))
                taken[sequence] = taken.get(sequence, 0) - count
            if count < job.left:
                break
    return parts


def _circle(sequence: Sequence) -> Circle:
    circle: Circle = sequence.circle  # type: ignore[attr-defined]
    return circle


def _engine(job: Job) -> Packs:
    engine = job.read.sequence.engine
    assert isinstance(engine, Packs)
    return engine


_lock = threading.Lock()
_meetings: dict[Hashable, Meeting] = {}
