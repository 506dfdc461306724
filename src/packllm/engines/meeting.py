"""The queue in which reads of all requests are batched into common passes.

A thread with a read that finds the place (a CPU, a GPU) free takes the waiting reads of one of its engines, runs one
pass over them and distributes the results. So there is no engine thread and no batch mode: threads, tasks and batches
all get continuous batching, and a request is plain blocking code.
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
"""Seconds that a pass waits for the requests of the previous pass: since the last one came back, and in total. They are
choosing their next tokens; if a pass ran without them, they would need another one."""

SHORT = 16
"""Reads of up to so many tokens are always part of the next pass: a decode step, a block of draft tokens."""


@dataclass(eq=False)
class Job:
    """A read in progress.

    Attributes:
        read: the read.
        done: how many of its ids have been read.
        results: the results for these.
        answer: the complete result or the error, once there is one.
    """

    read: Read
    done: int = 0
    results: list[Tensor] = field(default_factory=list)
    answer: Tensor | Exception | None = None

    @property
    def left(self) -> int:
        return len(self.read.ids) - self.done

    def take(self, count: int, result: Tensor) -> None:
        """Record the result of the next `count` ids."""
        self.done += count
        self.results.append(result)
        if not self.left:  # empty results may be on another device than the others
            filled = [one for one in self.results if len(one)] or self.results[:1]
            self.answer = filled[0] if len(filled) == 1 else torch.cat(filled)


@dataclass(eq=False)
class Call:
    """The reads of one thread.

    Attributes:
        jobs: the reads.
        turn: where the thread waits for them, or for its turn to run a pass.
    """

    jobs: list[Job]
    turn: threading.Condition

    @property
    def done(self) -> bool:
        return all(job.answer is not None for job in self.jobs)


class Circle:
    """The sequences of one request: those that have read together, and their forks. A pass waits for requests, not for
    sequences."""

    def __init__(self) -> None:
        self.open = 1  # number of open sequences
        self._part_of: Circle | None = None

    def root(self) -> Circle:
        """The circle that this one was merged into, or itself."""
        return self if self._part_of is None else self._part_of.root()

    def join(self, other: Circle) -> None:
        if (one := self.root()) is not (two := other.root()):
            two.open += one.open
            one._part_of = two


@dataclass(frozen=True)
class Part:
    """The part of a job in a pass: its next `count` ids."""

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
        """The targets after each id; None if whole rows are wanted."""
        want = self.job.read.want
        return None if isinstance(want, str) else list(want[self.job.done : self.job.done + self.count])

    @property
    def places(self) -> list[int]:
        """Indices of the ids after which a result is wanted."""
        if (targets := self.targets) is not None:
            return [place for place, target in enumerate(targets) if target >= 0]
        if self.job.read.want == "all":
            return list(range(self.count))
        return [self.count - 1] if self.job.read.want == "last" and self.count == self.job.left else []


class Packs(Engine):
    """An engine that runs passes over parts chosen by a meeting.

    Attributes:
        meeting: the queue of its reads.
        most: maximum number of tokens in a pass.
    """

    meeting: Meeting
    most: int

    @abstractmethod
    def run(self, parts: List[Part]) -> None:
        """Run one pass over some parts, and record the results in their jobs."""

    def read(self, reads: List[Read]) -> list[Tensor | Exception]:
        return self.meeting.read(reads)


class Meeting:
    """The queue of the reads of all engines at one place."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: list[Call] = []  # each waits by itself: a pass wakes only those that it concerns
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._busy = False
        self._expected: set[Circle] = set()  # requests that got results and have not queued a read since
        self._all_here = threading.Condition(self._lock)  # notified when nobody is expected any more
        self._came = 0.0  # when the last of them came
        self._passed_over: Counter[Packs] = Counter()

    @staticmethod
    def at(place: Hashable) -> Meeting:
        """The meeting of a place, shared by its engines."""
        with _lock:
            return _meetings.setdefault(place, Meeting())

    def read(self, reads: List[Read]) -> list[Tensor | Exception]:
        """Answer reads of engines of this place, in their order."""
        call = Call([Job(read) for read in reads], threading.Condition(self._lock))
        circles = [_circle(read.sequence) for read in reads]
        with self._lock:
            for circle in circles[1:]:
                circle.join(circles[0])
            if len(circles) > 1:
                self._expected = {circle.root() for circle in self._expected}
            self._waiting += call.jobs
            self._calls.append(call)
            self._no_longer_expected(circles[0].root())
        try:
            while not call.done:
                for read in reads:
                    read.sequence.gate()
                with self._lock:
                    if call.done:
                        break
                    if self._busy:
                        call.turn.wait()
                        continue
                    self._busy = True
                self._lead()
        finally:
            with self._lock:
                if not call.done:  # on an interrupt remove the waiting reads, and wait for those in a pass
                    self._waiting = [job for job in self._waiting if job not in call.jobs]
                    while self._busy and any(job in self._running for job in call.jobs):
                        call.turn.wait()
                self._calls.remove(call)
                self._hand_on()
        return [job.answer for job in call.jobs if job.answer is not None]

    def fork(self, sequence: Sequence, twin: Sequence) -> None:
        """A fork belongs to the same request."""
        with self._lock:
            circle = _circle(sequence).root()
            circle.open += 1
            twin.circle = circle  # type: ignore[attr-defined]

    def leave(self, sequence: Sequence) -> None:
        """A sequence is closed. Passes do not wait for a request without open sequences."""
        with self._lock:
            circle = _circle(sequence).root()
            circle.open -= 1
            if not circle.open:
                self._no_longer_expected(circle)

    def _no_longer_expected(self, circle: Circle) -> None:
        if circle in self._expected:
            self._expected.discard(circle)
            self._came = time.monotonic()
            if not self._expected:
                self._all_here.notify()

    def _hand_on(self) -> None:
        """If nobody runs a pass, wake a thread that will."""
        if not self._busy and (call := next((call for call in self._calls if not call.done), None)):
            call.turn.notify()

    def _lead(self) -> None:
        """Run one pass over the waiting reads of one engine."""
        try:
            with self._lock:
                self._gather()
                engine = self._next()
                parts = [] if engine is None else chosen([j for j in self._waiting if _engine(j) is engine], engine)
                self._running = [part.job for part in parts]
                if engine is not None:
                    engine.requests = len({_circle(part.sequence).root() for part in parts})
            if engine is not None:
                engine.run(parts)
        finally:
            with self._lock:
                ended = {_circle(job.read.sequence).root() for job in self._waiting if job.answer is not None}
                self._waiting = [job for job in self._waiting if job.answer is None]
                waiting = {_circle(job.read.sequence).root() for job in self._waiting}
                self._expected = {circle for circle in self._expected | ended if circle.open} - waiting
                ran, self._running, self._busy = set(self._running), [], False
                for call in self._calls:
                    if call.done or not ran.isdisjoint(call.jobs):
                        call.turn.notify()
                self._hand_on()

    def _gather(self) -> None:
        """Wait a moment for the requests of the last pass: they are choosing their next tokens, and would otherwise
        need another pass."""
        self._came = time.monotonic()
        latest = self._came + LONGEST
        while self._expected and (left := min(self._came + QUIET, latest) - time.monotonic()) > 0:
            self._all_here.wait(left)
        self._expected = set()

    def _next(self) -> Packs | None:
        """The next engine: the one passed over most often since it last ran, and of several the one with most waiting
        requests. Turns let requests that are out of step meet: while other engines run, they come to wait here."""
        requests: dict[Packs, set[Circle]] = {}
        for job in self._waiting:
            requests.setdefault(_engine(job), set()).add(_circle(job.read.sequence).root())
        if not requests:
            return None
        engine = max(requests, key=lambda one: (self._passed_over[one], len(requests[one])))
        self._passed_over = Counter({other: self._passed_over[other] + 1 for other in requests if other is not engine})
        return engine


def chosen(jobs: List[Job], engine: Packs) -> list[Part]:
    """Choose what the next pass of an engine reads: all short reads, then long reads as far as there is room. The
    oldest long read gets half of the room, the others follow by length. A request with a long read may make a pass of
    short ones two and a half times as long, but no longer."""
    queues: dict[Sequence, list[Job]] = {}
    for job in jobs:
        queues.setdefault(job.read.sequence, []).append(job)
    remaining = {sequence: sum(job.left for job in waiting) for sequence, waiting in queues.items()}
    long = [sequence for sequence in queues if remaining[sequence] > SHORT]
    counts = {sequence: remaining[sequence] for sequence in queues if remaining[sequence] <= SHORT}
    if long:
        steps, requests = sum(counts.values()), len({_circle(sequence).root() for sequence in long})
        room = min(engine.most, int(1.5 * requests * (1 / engine.packing + steps))) if steps else engine.most
        oldest, others = long[0], sorted(long[1:], key=remaining.__getitem__)
        if others:
            counts[oldest] = min(remaining[oldest], max(1, room // 2))
            room -= counts[oldest]
        for sequence in [*others, oldest]:
            extra = min(remaining[sequence] - counts.get(sequence, 0), room)
            counts[sequence] = counts.get(sequence, 0) + extra
            room -= extra
    parts: list[Part] = []
    for sequence, waiting in queues.items():
        for job in waiting:
            count = min(job.left, counts.get(sequence, 0))
            if count or not job.left:
                parts.append(Part(job, count))
                counts[sequence] = counts.get(sequence, 0) - count
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
