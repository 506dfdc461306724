"""What a torch model has read for one request, and what it keeps for that."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from packllm.engines import base
from packllm.engines.base import Engine, Prefixes
from packllm.engines.meeting import Circle, Meeting
from packllm.engines.transformers import kv


class Sequence(base.Sequence):
    """See base.Sequence. Only its engine reads into it.

    Args:
        engine, meeting: whose it is, and where its reads wait.
        adapter: of the engine's adapters, None for the weights as they are.
        prefixes: where earlier prompts are kept, None for nowhere.

    Attributes:
        cache: transformers' cache of the first `cached` ids; None where there is none.
        known: float64, what each id but the first was given, NaN where nobody asked; of the ids that were read as a
            prompt.
        hidden: (n, d), what the head reads after the first n ids; None where that is not kept.
    """

    def __init__(self, engine: Engine, meeting: Meeting, adapter: int | None, prefixes: Prefixes | None = None) -> None:
        self.engine, self.adapter, self.prefixes = engine, adapter, prefixes
        self._meeting = meeting
        self.circle = Circle()
        self.closed = False
        self.ids: list[int] = []
        self.cache: Any = None
        self.cached = 0
        self.known: Tensor = torch.empty(0, dtype=torch.float64)
        self.hidden: Tensor | None = None
        self._checkpoint: tuple[int, Any] | None = None  # an earlier state, of a cache that cannot go back

    def crop(self, length: int) -> None:
        if length >= len(self.ids):
            return
        del self.ids[length:]
        self.known = self.known[: max(0, length - 1)]
        if self.hidden is not None:
            self.hidden = self.hidden[:length]
        if self.cached <= length:
            return
        if self.engine.rewinds:
            kv.crop(self.cache, self.cached - length)
            self.cached = length
        else:
            self.lose()

    def lose(self) -> None:
        """The cache cannot be used any more: go back to the last state that is sure, and read the rest of the ids
        again."""
        self.cache, self.cached = None, 0
        if self._checkpoint is not None and self._checkpoint[0] <= len(self.ids):
            self.cached, self.cache = self._checkpoint[0], copy.deepcopy(self._checkpoint[1])

    @property
    def remembers(self) -> bool:
        return self._checkpoint is not None

    def remember(self) -> None:
        """Where the cache cannot go back: keep the state as it is now, for a crop() to here or further on."""
        self._checkpoint = self.cached, copy.deepcopy(self.cache)

    def fork(self) -> Sequence:
        twin = copy.copy(self)
        twin.ids = list(self.ids)
        if self.cache is not None:
            twin.cache = kv.fork(self.cache)
        self._meeting.fork(self, twin)
        return twin

    def close(self) -> None:
        if not self.closed:
            self.closed, self.cached = True, 0
            self.cache = self.hidden = self._checkpoint = None
            self._meeting.leave(self)

    def nbytes(self) -> int:
        """Memory held, in whole allocations."""
        held = [self.known, *(kv.tensors(self.cache) if self.cache is not None else ())]
        storages = [tensor.untyped_storage() for tensor in (held if self.hidden is None else [*held, self.hidden])]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
