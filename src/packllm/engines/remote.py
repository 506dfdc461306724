"""A member in another process: the worker that runs it, and the local engine that represents it.

A worker may be killed at any time. So every read states which ids precede it, by their number and a hash. If the worker
lacks them, it says so, and the complete ids are sent. The local ids are therefore authoritative, and crops and forks
need no message. Results are only the wanted rows, in float16; or, if that is enough, the likeliest tokens of
each row and a bound for all others.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
import weakref
from collections.abc import Callable, Hashable
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from packllm.engines import base
from packllm.engines.base import Prefixes, Read, Want, read_together
from packllm.engines.member import Member
from packllm.errors import CancelledError


@dataclass(frozen=True)
class Task:
    """The reads of one sequence.

    Attributes:
        key: the sequence's name.
        origins: names of sequences that it is a fork of, the nearest first.
        start, digest: the number of preceding ids, and their hash.
        reads: ids and what is wanted, one after the other.
        before: the preceding ids; only set after the worker has said that it lacks them.
        prompt: name under which to cache the prompt; None: do not cache it.
        prefix: name of a cached prompt with a common prefix, and the length of that prefix.
        top: how many of the likeliest tokens a row must contain; None: all tokens.
    """

    key: str
    origins: tuple[str, ...]
    start: int
    digest: int
    reads: tuple[tuple[List[int], Want], ...]
    before: List[int] | None = None
    prompt: str | None = None
    prefix: tuple[str, int] | None = None
    top: int | None = None


Rows = tuple[np.ndarray, np.ndarray]
"""float16 (n, V), log-probabilities minus their row's peak, and float32 (n, 1), the peaks. So likely tokens have the
smallest error."""


@dataclass(frozen=True)
class Likeliest:
    """The likeliest tokens of n rows.

    Attributes:
        ids: int32 (n, m), the likeliest tokens, and the end tokens.
        logprobs: float32 (n, m), their log-probabilities.
        rest: float32 (n, 1), an upper bound for all other tokens.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    rest: np.ndarray


Found = Rows | Likeliest | np.ndarray | Exception


@dataclass(frozen=True)
class Answer:
    """The results of a task.

    Attributes:
        found: for each read its rows or their likeliest tokens, float64 (n,) for targets, or an error.
        cached: ids that did not have to be read.
        noted: the same, if the prompt has just started; else None.
        kept: number of ids and bytes of the prompt that is now cached; else None.
    """

    found: list[Found]
    cached: int = 0
    noted: int | None = None
    kept: tuple[int, int] | None = None


class Worker:
    """Runs a member for an engine in another process; loads it on first use. Safe to use from several threads.

    Args:
        load: makes the member.
    """

    def __init__(self, load: Callable[[], Member]) -> None:
        self._load, self._lock = load, threading.Lock()
        self._member: Member | None = None
        self._stopped: set[int] = set()
        self.held: dict[str, base.Sequence] = {}
        self._prompts: dict[str, _Prompt] = {}

    @property
    def member(self) -> Member:
        with self._lock:
            if self._member is None:
                self._member = self._load()
            return self._member

    def describe(self) -> dict[str, Any]:
        """The facts about the member that the other process needs."""
        engine, member = self.member.engine, self.member
        attributes = ("vocabulary_size", "context_window", "end_ids", "rewinds", "size", "token_bytes", "packing")
        return {
            "name": member.name,
            "tokenizer": member.tokenizer,
            "fingerprint": engine.fingerprint(member.adapter),
            "engine": {name: getattr(engine, name) for name in attributes},
        }

    def read(self, call: int, tasks: List[Task]) -> list[Answer | None]:
        """Answer tasks; None for a task whose preceding ids are not here. `call` identifies the call for stop()."""
        answers: dict[str, Answer | None] = {}
        ready: list[Task] = []
        reads: list[Read] = []
        for task in sorted(
            tasks, key=lambda task: task.key in self.held
        ):  # forks first, before their originals read on
            try:
                sequence = self._sequence_of(task, partial(self._gate, call))
            except CancelledError:
                raise
            except Exception as error:
                answers[task.key] = Answer([_packed(error)] * len(task.reads))
                continue
            if sequence is None:
                answers[task.key] = None
            else:
                ready.append(task)
                reads += [Read(sequence, ids, want) for ids, want in task.reads]
        try:
            answers_ = iter(read_together(reads))
        finally:
            self._stopped.discard(call)
        for task in ready:
            parts = [self._told(next(answers_), task.top) for _ in task.reads]
            answers[task.key] = self._answer(task, parts)
        return [answers[task.key] for task in tasks]

    def _told(self, answer: Tensor | Exception, top: int | None) -> Found:
        if top is None or isinstance(answer, Exception) or answer.dtype == torch.float64:
            return _packed(answer)
        best = answer.topk(min(top, answer.shape[-1]))
        ends = torch.tensor(sorted(i for i in self.member.end_ids if i < answer.shape[-1]), dtype=torch.long)
        ids = torch.cat([best.indices.cpu(), ends.expand(len(answer), -1)], -1)
        return Likeliest(ids.int().numpy(), answer.cpu().gather(-1, ids).numpy(), best.values[:, -1:].cpu().numpy())

    def _sequence_of(self, task: Task, gate: Callable[[], object]) -> base.Sequence | None:
        """A task's sequence at the end of its preceding ids; None if these must be sent."""
        sequence = self.held.get(task.key)
        if task.before is None and task.start:
            origin = sequence or next((self.held[key] for key in task.origins if key in self.held), None)
            if origin is None or hash(tuple(origin.ids[: task.start])) != task.digest:
                return None
            sequence = self.held[task.key] = sequence or origin.fork()
            sequence.crop(task.start)
        else:
            self.forget(task.key)
            prompt = None
            if task.prompt is not None:
                cached = None if task.prefix is None else self.held.get(task.prefix[0])
                prompt = self._prompts[task.key] = _Prompt(cached, task.prefix[1] if task.prefix else 0)
            sequence = self.held[task.key] = self.member.open(prompt)
        sequence.gate = gate
        if task.before:
            (answer,) = read_together([Read(sequence, task.before, "none")])
            if isinstance(answer, Exception):
                raise answer
        return sequence

    def _answer(self, task: Task, parts: list[Found]) -> Answer:
        cached, prompt = self.held[task.key].cached_tokens, self._prompts.get(task.key)
        if prompt is None:
            return Answer(parts, cached)
        new_prompt, prompt.noted = prompt.noted, None
        stored = None
        if prompt.sequence is not None and task.prompt is not None:
            self.held[task.prompt] = prompt.sequence
            stored = len(prompt.sequence.ids), prompt.nbytes
            del self._prompts[task.key]
        return Answer(parts, cached, new_prompt, stored)

    def _gate(self, call: int) -> None:
        if call in self._stopped:
            raise CancelledError("this call was cancelled")

    def stop(self, call: int) -> None:
        """End a call of read() before its next pass."""
        self._stopped.add(call)

    def forget(self, key: str) -> None:
        """Free a sequence."""
        self._prompts.pop(key, None)
        if (sequence := self.held.pop(key, None)) is not None:
            sequence.close()


@dataclass(eq=False)
class _Prompt:
    """Prefixes (see base.py) of one prompt: the other process has chosen the cached sequence to start from."""

    kept: base.Sequence | None
    count: int
    noted: int | None = None
    sequence: base.Sequence | None = None
    nbytes: int = 0

    def longest(self, engine: base.Engine, adapter: int | None, ids: List[int]) -> tuple[base.Sequence, int] | None:
        return None if self.kept is None else (self.kept, self.count)

    def note(self, tokens: int) -> None:
        self.noted = tokens

    def keep(self, adapter: int | None, sequence: base.Sequence, nbytes: int) -> None:
        self.sequence, self.nbytes = sequence, nbytes


def _packed(answer: Tensor | Exception) -> Found:
    if isinstance(answer, Exception):
        plain = type(answer).__module__ == "builtins"  # other classes may not exist in the other process
        return answer if plain else RuntimeError(f"{type(answer).__name__}: {answer}")
    if answer.dtype == torch.float64:
        return answer.numpy()
    peaks = answer.amax(-1, keepdim=True)
    return (answer - peaks).half().cpu().numpy(), peaks.cpu().numpy()


def _unpacked(found: Found, size: int) -> Tensor | Exception:
    if isinstance(found, Likeliest):
        rows = torch.from_numpy(found.rest.copy()).expand(-1, size).clone()
        return rows.scatter_(-1, torch.from_numpy(found.ids.astype(np.int64)), torch.from_numpy(found.logprobs.copy()))
    if isinstance(found, tuple):
        return torch.from_numpy(found[0].astype(np.float32) + found[1])
    return torch.from_numpy(found.copy()) if isinstance(found, np.ndarray) else found


class Wire(Protocol):
    """The connection to a worker."""

    def call(self, gate: Callable[[], object], stop: Callable[[], object], name: str, *args: Any) -> Any:
        """Call a method of the worker and return its result. `gate` is called before and regularly while it runs; if it
        raises an exception, stop() is called and the wait ends."""
        ...

    def tell(self, name: str, *args: Any) -> None:
        """Let the worker run a method later, without a result."""
        ...


class RemoteSequence(base.Sequence):
    """A sequence whose cache is in a worker; see base.Sequence."""

    engine: RemoteEngine

    def __init__(self, engine: RemoteEngine, prefixes: Prefixes | None = None, key: str | None = None) -> None:
        self.engine, self.prefixes, self.ids = engine, prefixes, []
        self.key = key or engine.new_key()
        self.origins: tuple[str, ...] = ()
        self.closed = False
        self._bounds: dict[int, float] = {}
        self._free = weakref.finalize(self, engine.wire.tell, "forget", self.key)
        self._free.atexit = False

    def bound(self, length: int) -> float:
        return self._bounds.get(length, -math.inf)

    def note(self, found: Found) -> None:
        """Record the bounds of new rows, the last of which is after all ids."""
        rest = found.rest[:, 0].tolist() if isinstance(found, Likeliest) else []
        self._bounds |= {len(self.ids) - at: bound for at, bound in enumerate(reversed(rest))}

    def crop(self, length: int) -> None:
        for at in range(length + 1, len(self.ids) + 1):
            self._bounds.pop(at, None)
        del self.ids[length:]

    def fork(self) -> RemoteSequence:
        twin = RemoteSequence(self.engine)
        twin.ids, twin.gate, twin.origins = list(self.ids), self.gate, (self.key, *self.origins)
        twin._bounds = dict(self._bounds)
        return twin

    def close(self) -> None:
        self.closed = True
        self._free()


class RemoteEngine(base.Engine):
    """An engine in another process.

    Args:
        wire: the connection to its worker.
        told: the worker's description of its member (Worker.describe).
        place: the process.
    """

    def __init__(self, wire: Wire, description: dict[str, Any], place: Hashable) -> None:
        vars(self).update(description["engine"])
        self.wire, self.place, self._fingerprint = wire, place, description["fingerprint"]
        self._numbers, self._origin = itertools.count(), os.urandom(4).hex()

    def new_key(self) -> str:
        return f"{self._origin}-{next(self._numbers)}"

    def fingerprint(self, adapter: int | None = None) -> str:
        return self._fingerprint

    def held(self, adapter: int | None = None) -> dict[Hashable, int]:
        return {}  # nothing here

    def open(self, adapter: int | None = None, prefixes: Prefixes | None = None) -> RemoteSequence:
        return RemoteSequence(self, prefixes)

    def read(self, reads: List[Read]) -> list[Tensor | Exception]:
        groups: dict[int, _Group] = {}
        for at, read in enumerate(reads):
            assert isinstance(read.sequence, RemoteSequence)
            if not read.sequence.closed:
                groups.setdefault(id(read.sequence), _Group(read.sequence)).reads[at] = read
        results: dict[int, Tensor | Exception] = dict.fromkeys(range(len(reads)), ValueError("this sequence is closed"))
        if groups:
            self._ask(list(groups.values()), results)
        return [results[at] for at in range(len(reads))]

    def _ask(self, groups: list[_Group], results: dict[int, Tensor | Exception]) -> None:
        call = next(self._numbers)

        def gate() -> None:
            for group in groups:
                group.sequence.gate()

        ask = partial(self.wire.call, gate, partial(self.wire.tell, "stop", call), "read", call)
        unknown = []
        for group, answer in zip(groups, ask([group.task() for group in groups]), strict=True):
            if answer is None:
                unknown.append(group)
            else:
                group.take(answer, results)
        if unknown:
            for group, answer in zip(unknown, ask([group.task(with_ids=True) for group in unknown]), strict=True):
                group.take(answer, results)


@dataclass(eq=False)
class _Group:
    """The reads of one sequence, by their index among all reads."""

    sequence: RemoteSequence
    reads: dict[int, Read] = field(default_factory=dict)

    def task(self, with_ids: bool = False) -> Task:
        sequence, reads = self.sequence, list(self.reads.values())
        prompt = prefix = None
        if sequence.prefixes is not None:
            prompt = f"{sequence.key} kept"
            if not sequence.ids and (match := sequence.prefixes.longest(sequence.engine, None, reads[0].ids)):
                assert isinstance(match[0], RemoteSequence)
                prefix = match[0].key, match[1]
        return Task(
            sequence.key,
            sequence.origins,
            len(sequence.ids),
            hash(tuple(sequence.ids)),
            tuple((list(read.ids), read.want) for read in reads),
            list(sequence.ids) if with_ids else None,
            prompt,
            prefix,
            sequence.top,
        )

    def take(self, answer: Answer, results: dict[int, Tensor | Exception]) -> None:
        """Store the answers by index, and record the ids that were read."""
        sequence = self.sequence
        for (at, read), part in zip(self.reads.items(), answer.found, strict=True):
            results[at] = _unpacked(part, sequence.engine.vocabulary_size)
            if not isinstance(part, Exception):
                sequence.ids += read.ids
                sequence.note(part)
        sequence.cached_tokens = answer.cached
        if sequence.prefixes is not None and answer.noted is not None:
            sequence.prefixes.note(answer.noted)
        if sequence.prefixes is not None and answer.kept is not None:
            prefixes, sequence.prefixes = sequence.prefixes, None
            stored = RemoteSequence(sequence.engine, key=f"{sequence.key} kept")
            stored.ids = sequence.ids[: answer.kept[0]]
            prefixes.keep(None, stored, answer.kept[1])
