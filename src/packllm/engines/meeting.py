"""Reads of all requests meet at an engine and run together.

Whoever finds the engine free takes the reads that wait, runs one pass over them, hands out the results and leaves. There is
no thread of the engine's own and no mode: threads, tasks and batches all get continuous batching, and a request stays
plain blocking code.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import dataclass, field

import torch
from torch import Tensor

from packllm.engines.base import Read, Sequence

QUIET, LONGEST = 0.01, 0.1
"""Seconds that a pass waits for readers of the pass before it: since the last one came, and at most. They are choosing
their next tokens; a pass without them would be run again for them."""

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
    """Sequences that read together once, and forks of these: one request's. A pass waits for requests, not for sequences."""

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


class Meeting:
    """Where the reads of one engine wait for a pass.

    Args:
        run: runs one pass over some parts and takes their jobs on.
        most: tokens of one pass.
        packing: what each further token adds to a pass over one, as a share of it. A request with a long read
            may make a pass of short ones three times as long: it must not keep those waiting.
    """

    def __init__(self, run: Callable[[List[Part]], None], most: int, packing: float) -> None:
        self._run, self._most, self._packing = run, most, packing
        self._condition = threading.Condition()
        self._waiting: list[Job] = []
        self._busy = False
        self._running: list[Job] = []
        self._expected: set[Circle] = set()  # of the last pass, those that have not come back

    def read(self, reads: List[Read]) -> list[Tensor | Exception]:
        """Engine.read."""
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
        """Run one pass over what waits."""
        try:
            with self._condition:
                self._gather()
                parts = self._chosen()
                self._running = [part.job for part in parts]
            if parts:
                self._run(parts)
        finally:
            with self._condition:
                ended = [job for job in self._waiting if job.answer is not None]
                self._waiting = [job for job in self._waiting if job.answer is None]
                circles = {_circle(job.read.sequence).whole() for job in ended}
                waiting = {_circle(job.read.sequence).whole() for job in self._waiting}
                self._expected = {circle for circle in circles - waiting if circle.open}
                self._busy, self._running = False, []
                self._condition.notify_all()

    def _gather(self) -> None:
        """Wait a moment for the requests of the last pass."""
        latest = time.monotonic() + LONGEST
        while self._expected:
            count = len(self._expected)
            if not self._condition.wait(min(QUIET, latest - time.monotonic())) and len(self._expected) == count:
                break
            if time.monotonic() >= latest:
                break
        self._expected = set()

    def _chosen(self) -> list[Part]:
        """What the next pass reads: what is short, then long reads as far as there is room, half of it for the oldest and the
        shortest of the others next."""
        queues: dict[Sequence, list[Job]] = {}
        for job in self._waiting:
            queues.setdefault(job.read.sequence, []).append(job)
        left = {sequence: sum(job.left for job in jobs) for sequence, jobs in queues.items()}
        short = [sequence for sequence in queues if left[sequence] <= SHORT]
        long = [sequence for sequence in queues if left[sequence] > SHORT]
        taken = {sequence: left[sequence] for sequence in short}
        if long:
            steps = sum(taken.values())
            requests = len({_circle(sequence).whole() for sequence in long})
            room = min(self._most, int(2 * requests * (1 / self._packing + steps))) if steps else self._most
            oldest, others = long[0], sorted(long[1:], key=left.__getitem__)
            if others:
                taken[oldest] = min(left[oldest], max(1, room // 2))
                room -= taken[oldest]
            for sequence in [*others, oldest]:
                more = min(left[sequence] - taken.get(sequence, 0), room)
                taken[sequence] = taken.get(sequence, 0) + more
                room -= more
        parts: list[Part] = []
        for sequence, jobs in queues.items():
            for job in jobs:
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
