"""Engines run members: they answer reads. No module above this folder depends on the kind of an engine."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from collections.abc import Sequence as List
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from packllm.errors import AnswerTimeout, CancelledError

Want = Literal["all", "last", "none"] | List[int]
"""Which log-probabilities a read returns.

"all": float32 (n, V), after each of the n ids. "last": float32 (1, V), after the last id. "none": (0, V).
A list of n ids, the targets: float64 (n,) on the CPU, the log-probability of each target right after the id at the same
index; NaN where the target is negative.
"""


class Sequence(ABC):
    """The ids that a model has read, and the cache that its engine keeps for them.

    Attributes:
        engine: the engine that reads.
        ids: the ids read so far; a lost cache is computed again from them.
        cached_tokens: how many of them were not read, because an earlier sequence had the same prefix.
        gate: called before every forward pass; an exception from it ends the read.
        top: how many of the likeliest tokens the next rows must contain; other entries may be bounds, see bound().
            None: all entries.
    """

    engine: Engine
    ids: list[int]
    cached_tokens: int = 0
    gate: Callable[[], object] = staticmethod(lambda: None)
    top: int | None = None

    def bound(self, length: int) -> float:
        """In the row after the first `length` ids, entries up to this value may be upper bounds of log-probabilities.
        -inf: all entries are exact."""
        return -math.inf

    @abstractmethod
    def crop(self, length: int) -> None:
        """Go back to the first `length` ids. This always works; its cost depends on the engine."""

    @abstractmethod
    def fork(self) -> Sequence:
        """A copy that reads on independently of this sequence."""

    @abstractmethod
    def close(self) -> None:
        """Free the cache; the sequence cannot read any more."""


class Prefixes(Protocol):
    """Access to cached prefixes: sequences of earlier prompts (prefix.py)."""

    def longest(self, engine: Engine, adapter: int | None, ids: List[int]) -> tuple[Sequence, int] | None:
        """The cached sequence of these weights with the longest common prefix with `ids`, and its length in ids."""
        ...

    def note(self, tokens: int) -> None:
        """Record that a new sequence starts with so many cached tokens."""
        ...

    def keep(self, adapter: int | None, sequence: Sequence, nbytes: int) -> None:
        """Store a sequence that nobody else uses; it is closed when it is evicted."""
        ...


@dataclass(frozen=True, eq=False)
class Read:
    """A request to read these ids after that sequence; see Want for the result."""

    sequence: Sequence
    ids: List[int]
    want: Want = "last"


class Reader(Protocol):
    """An object that answers reads."""

    def read(self, reads: List[Read]) -> list[Tensor | Exception]: ...


class Engine(ABC):
    """Runs one set of weights. Safe to use from several threads.

    Attributes:
        vocabulary_size: V, the number of ids, counted from 0, that it gives log-probabilities of.
        context_window: maximum number of ids in a sequence; None if there is no limit.
        end_ids: ids that end an answer, as far as the model itself defines them.
        meeting: the queue that several engines of one place share; None: the engine answers its own reads.
        place: a device; engines at different places run at the same time, those at one place in turn.
        rewinds: whether crop() is cheap, as it is for KV caches, but not for recurrent states.
        size: bytes of weights that one pass reads; used to compare the passes of several engines.
        token_bytes: bytes of cache per token of a sequence.
        requests: how many requests shared the last pass, and so its cost.
        packing: cost of each further token in a pass, relative to a pass over one token.
        asks: options that the model's generation_config sets; used only if the caller wants them.
    """

    vocabulary_size: int
    context_window: int | None = None
    end_ids: frozenset[int] = frozenset()
    meeting: Reader | None = None
    place: Hashable = "cpu"
    rewinds: bool = True
    size: int = 1
    token_bytes: int = 0
    requests: int = 1
    packing: float = 0.1
    asks: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def open(self, adapter: int | None = None, prefixes: Prefixes | None = None) -> Sequence:
        """A new, empty sequence.

        Args:
            adapter: index of one of the engine's adapters; None for the weights without an adapter.
            prefixes: the prefix cache, from which the sequence may start, and in which it may be stored.
        """

    @abstractmethod
    def read(self, reads: List[Read]) -> list[Tensor | Exception]:
        """Answer reads, in their order. They may be of several sequences; those of one sequence are done in order. The
        answer of a read that failed is its exception; other reads are not affected."""

    def held(self, adapter: int | None = None) -> dict[Hashable, int]:
        """Bytes of the weights in memory, in parts; parts with equal keys are shared by several engines or adapters."""
        return {id(self): self.size}

    def fingerprint(self, adapter: int | None = None) -> str:
        """Hash of the weights: it changes if answers do."""
        return f"{id(self)} {adapter}"


@runtime_checkable
class KeepsHidden(Protocol):
    """An engine that can keep the hidden states behind its log-probabilities. Log-pool optimisers then need no second
    pass (METHODS §3)."""

    def keep_hidden(self, sequence: Sequence) -> bool:
        """Called before the first read: keep the hidden states of the sequence, if logits depend on them alone; return
        whether they are kept."""
        ...

    def release_hidden(self, sequence: Sequence) -> None:
        """Free the hidden states."""
        ...

    def hidden(self, sequence: Sequence, places: Tensor) -> Tensor | None:
        """Hidden states (n, d) after the ids at some indices (int64); None if they are not kept."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 (n, V) of hidden states (n, d)."""
        ...

    def head(self) -> tuple[Tensor, Tensor | None, Tensor] | None:
        """The LM head: weight (at least V, d), bias or None, and ids without mass; None if logits are more than this
        product."""
        ...


def read_together(reads: List[Read]) -> list[Tensor | Exception]:
    """Answer reads of any engines, in their order; engines at different places run at the same time.

    Raises:
        CancelledError, AnswerTimeout: raised by a gate.
    """
    by_reader: dict[int, list[int]] = {}
    for at, read in enumerate(reads):
        engine = read.sequence.engine
        by_reader.setdefault(id(engine.meeting or engine), []).append(at)
    by_place: dict[Hashable, list[list[int]]] = {}
    for group in by_reader.values():
        by_place.setdefault(reads[group[0]].sequence.engine.place, []).append(group)
    answers: list[Tensor | Exception] = [torch.empty(0)] * len(reads)

    def run(groups: list[list[int]]) -> None:
        for group in groups:
            engine = reads[group[0]].sequence.engine
            try:
                results = (engine.meeting or engine).read([reads[at] for at in group])
            except Exception as error:
                results = [error] * len(group)
            for at, answer in zip(group, results, strict=True):
                if isinstance(answer, CancelledError | AnswerTimeout):
                    raise answer  # from a gate, raised or returned by the engine: not a member's failure
                answers[at] = answer

    if len(by_place) <= 1:
        for groups in by_place.values():
            run(groups)
    else:
        with ThreadPoolExecutor(len(by_place)) as pool:
            list(pool.map(run, by_place.values()))
    return answers
