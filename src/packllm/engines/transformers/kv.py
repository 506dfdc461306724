"""KV caches of one sequence: appending does not move stored tokens, crop() removes tokens, forks share them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

SPARE = 64
"""Tokens of spare room in a layer. A step reads all stored tokens anyway, so copying them once in 64 steps is cheap."""


class RoomyLayer(DynamicLayer):
    """A layer with full attention and spare room, so that appending does not move the stored tokens.

    Keys and values are views of the beginning of larger tensors. Tokens that another cache may share are never
    overwritten.

    Attributes:
        shared: how many of the first tokens another cache may share.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shared = 0
        self._rooms: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (1, heads, n, d); return all of them, (1, heads, N, d)."""
        for place, states in zip(self.extend(key_states, value_states), (key_states, value_states), strict=True):
            place.copy_(states)
        return self.keys, self.values  # type: ignore[return-value]

    def extend(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Make `keys` and `values` longer by these states (1, heads, n, d), which are not written yet.

        Returns:
            The places to write the states to.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, count = self.get_seq_length(), key_states.shape[-2]
        if self._rooms is None or not self._fits(self._rooms[0], before, before + count):
            size = before + count + (SPARE if before else 0)
            stored = zip((self.keys, self.values), (key_states, value_states), strict=True)
            keys, values = (_moved(old, states, before, size) for old, states in stored)
            self._rooms, self.shared = (keys, values), 0
        keys, values = self._rooms
        self.keys, self.values = keys.narrow(-2, 0, before + count), values.narrow(-2, 0, before + count)
        return keys.narrow(-2, before, count), values.narrow(-2, before, count)

    def _fits(self, room: Tensor, before: int, after: int) -> bool:
        """Whether there is room, and the keys are still a view of it."""
        is_view = self.keys is not None and self.keys.data_ptr() == room.data_ptr()
        return is_view and self.shared <= before and after <= room.shape[-2]

    def twin(self) -> RoomyLayer:
        """A copy that shares the tokens so far and grows independently."""
        self.shared = max(self.shared, self.get_seq_length())
        twin = copy.copy(self)
        twin._rooms = None
        return twin


def full(config: Any) -> DynamicCache:
    """An empty cache whose layers all store every token, also those with a sliding window; so it can go back."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() for _ in cache.layers]
    return cache


def new(config: Any) -> DynamicCache:
    """An empty cache of the layers that the architecture needs; layers with full attention have spare room."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def text() -> DynamicCache:
    """An empty cache for a model without a state: it stores the ids themselves, as keys of width 1."""
    cache = DynamicCache()
    cache.layers = [RoomyLayer()]
    return cache


def append_text(cache: DynamicCache, tokens: Tensor) -> Tensor:
    """Append ids int64 (1, n) to a cache whose last layer stores the ids; return all ids, (1, N)."""
    ids = tokens[:, None, :, None]
    return cache.update(ids, ids[..., :0], len(cache.layers) - 1)[0][:, 0, :, 0]


def is_recurrent(cache: DynamicCache) -> bool:
    """Whether no layer attends to earlier tokens: each has only a running state."""
    return all(
        isinstance(layer, LinearAttentionLayer) and not isinstance(layer, DynamicLayer) for layer in cache.layers
    )


def is_full(cache: Any) -> bool:
    """Whether every layer stores all tokens: then the cache can go back and be shared."""
    return isinstance(cache, DynamicCache) and all(type(layer) is RoomyLayer for layer in cache.layers)


def fork(cache: Any) -> Any:
    """A copy of a cache that grows independently; full caches share the stored tokens."""
    if not is_full(cache):
        return copy.deepcopy(cache)
    twin = copy.copy(cache)
    twin.layers = [layer.twin() for layer in cache.layers]
    return twin


def crop(cache: DynamicCache, count: int) -> None:
    """Remove the last `count` tokens of a full cache."""
    layers: list[Any] = cache.layers
    for layer in layers:
        if layer.get_seq_length():
            layer.keys, layer.values = layer.keys[..., :-count, :], layer.values[..., :-count, :]


def tensors(cache: Any) -> Iterator[Tensor]:
    """All tensors in the cache's layers."""
    for layer in cache.layers:
        for value in vars(layer).values():
            yield from (
                part for part in (value.values() if isinstance(value, dict) else [value]) if torch.is_tensor(part)
            )


def _moved(old: Tensor | None, states: Tensor, count: int, size: int) -> Tensor:
    """Room for `size` tokens of such states, with the first `count` of the old ones."""
    *_, heads, _, width = states.shape
    if states.is_cuda:  # token by token: then many caches can be written in one launch (packed.py)
        room = states.new_empty((size, heads, width)).transpose(0, 1)[None]
    else:
        room = states.new_empty((1, heads, size, width))
    if count and old is not None:
        room.narrow(-2, 0, count).copy_(old)
    return room
