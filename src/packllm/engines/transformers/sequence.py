"""The ids that a torch model has read for one request, and their cache."""

from __future__ import annotations

import copy
from collections.abc import Sequence as List
from typing import Any, Self

import torch
from torch import Tensor

from packllm.engines.passes import Cached
from packllm.engines.transformers import kv


class Sequence(Cached):
    """A Cached sequence of a torch model.

    Attributes:
        cache: transformers' cache.
        hidden: (n, d), the head's input after each of the first n ids; None if it is not kept.
    """

    hidden: Tensor | None = None

    def shorten(self, length: int) -> None:
        kv.crop(self.cache, self.cached - length)

    def twin(self) -> Any:
        return kv.fork(self.cache)

    def snapshot(self, cache: Any) -> Any:
        return copy.deepcopy(cache)

    def crop(self, length: int) -> None:
        super().crop(length)
        if self.hidden is not None:
            self.hidden = self.hidden[:length]

    def extend(self, ids: List[int], states: Tensor | None) -> None:
        super().extend(ids, states)
        if self.hidden is not None and states is not None:
            self.hidden = torch.cat([self.hidden, states])

    def start_from(self, source: Self, count: int, known: Tensor) -> None:
        super().start_from(source, count, known)
        self.hidden = source.hidden

    def close(self) -> None:
        super().close()
        self.hidden = None

    def nbytes(self) -> int:
        """Memory of the cache in bytes, in whole allocations."""
        tensors = [self.known, *(kv.tensors(self.cache) if self.cache is not None else ())]
        storages = [
            tensor.untyped_storage() for tensor in (tensors if self.hidden is None else [*tensors, self.hidden])
        ]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
