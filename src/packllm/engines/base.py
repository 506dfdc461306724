"""What runs a member: an engine answers reads. Nothing above this folder knows what is behind one."""

from __future__ import annotations

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
"""Which of the log-probabilities after the ids of a read come back.

"all": float32 (n, V), after each of the n ids. "last": float32 (1, V), after the last of them. "none": (0, V).
n ids, the targets: float64 (n,) on the CPU, what each target is given right after the id at its place; NaN where the
target is negative.
"""


class Sequence(ABC):
    """The ids that a model has read, and whatever its engine keeps for them.

    Attributes:
        engine: whose it is.
        ids: what has been read; the truth from which a lost cache is made again.
        cached_tokens: how many of them did not have to be read, since an earlier sequence began alike.
        gate: called before every pass; what it raises ends the read.
    """

    engine: Engine
    ids: list[int]
    cached_tokens: int = 0
    gate: Callable[[], object] = staticmethod(lambda: None)

    @abstractmethod
    def crop(self, length: int) -> None:
        """Go back to the first `length` ids. This always works; what it costs is the engine's affair."""

    @abstractmethod
    def fork(self) -> Sequence:
        """Another sequence that has read the same; this one stays as it is."""

    @abstractmethod
    def close(self) -> None:
        """Free what is kept; the sequence cannot be read into any more."""


class Prefixes(Protocol):
    """What is kept of earlier sequences (prefix.py)."""

    def longest(self, engine: Engine, adapter: int | None, ids: List[int]) -> tuple[Sequence, int] | None:
        """The kept sequence of these weights that begins most like `ids`, and how many first ids are the same."""
        ...

    def note(self, tokens: int) -> None:
        """A sequence starts, and need not read so many tokens."""
        ...

    def keep(self, adapter: int | None, sequence: Sequence, nbytes: int) -> None:
        """Keep a sequence, which nobody else uses; it is closed when its time has come."""
        ...


@dataclass(frozen=True, eq=False)
class Read:
    """These ids come after that sequence; see Want for what comes back."""

    sequence: Sequence
    ids: List[int]
    want: Want = "last"


class Reader(Protocol):
    """What answers reads."""

    def read(self, reads: List[Read]) -> list[Tensor | Exception]: ...


class Engine(ABC):
    """Runs one set of weights. Safe to use from several threads.

    Attributes:
        vocabulary_size: V, ids that it gives log-probabilities of; they are the first of the member's vocabulary.
        context_window: most ids that a sequence may hold, None if there is no limit.
        end_ids: ids that end an answer, as far as the model says so itself.
        meeting: what answers reads of several engines of one place, where these meet; None: each engine does.
        place: engines of different places run at the same time, those of one place in turn.
        rewinds: whether crop() is cheap, as it is for keys and values, and not for recurrent states.
        size: what one pass has to read, in bytes: how passes of several engines compare.
        token_bytes: what is kept of each id that a sequence has read.
        requests: how many shared the last pass: each has a part of what it cost.
        packing: what each further token adds to a pass over one, as a share of it.
        asks: options that the model itself asks for (its generation_config); used on request only.
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
        """A sequence that has read nothing.

        Args:
            adapter: one of the engine's adapters, None for the weights as they are.
            prefixes: what is kept of earlier sequences; this one may start from it, and be kept there.
        """

    @abstractmethod
    def read(self, reads: List[Read]) -> list[Tensor | Exception]:
        """Answers to reads in their order, which may come from several sequences; one sequence's happen one after the
        other. A read that failed has its exception for an answer, and the others theirs."""

    def fingerprint(self, adapter: int | None = None) -> str:
        """Hash of the weights: changes with the answers."""
        return f"{id(self)} {adapter}"


@runtime_checkable
class KeepsHidden(Protocol):
    """An engine that can tell what it made its log-probabilities of. Log-pool optimisers then need no second pass
    (METHODS §3)."""

    def keep_hidden(self, sequence: Sequence) -> bool:
        """Before anything is read: keep hidden states of what follows, where logits are made of them alone; whether
        so."""
        ...

    def release_hidden(self, sequence: Sequence) -> None:
        """They are not needed any more."""
        ...

    def hidden(self, sequence: Sequence, places: Tensor) -> Tensor | None:
        """(n, d), hidden states after the ids at some places (int64); None where they are not kept."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 (n, V) of hidden states (n, d)."""
        ...

    def head(self) -> tuple[Tensor, Tensor | None, Tensor] | None:
        """Weight (at least V, d), bias or None, and ids without mass, where logits are just that product; None
        elsewhere."""
        ...


def read_together(reads: List[Read]) -> list[Tensor | Exception]:
    """Answers to reads of any engines, in their order; engines of different places run at the same time.

    Raises:
        CancelledError, AnswerTimeout: a gate said so.
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
                found = (engine.meeting or engine).read([reads[at] for at in group])
            except Exception as error:
                found = [error] * len(group)
            for at, answer in zip(group, found, strict=True):
                if isinstance(answer, CancelledError | AnswerTimeout):
                    raise answer  # a gate's word, whether the engine let it pass or told it: no fault of a member
                answers[at] = answer

    if len(by_place) <= 1:
        for groups in by_place.values():
            run(groups)
    else:
        with ThreadPoolExecutor(len(by_place)) as pool:
            list(pool.map(run, by_place.values()))
    return answers
