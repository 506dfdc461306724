"""Key-value caches of one sequence: tokens appended without moving what is there, taken off again, shared by forks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

SPARE = 64
"""Tokens that a layer leaves room for. Every step reads all that is there; copying it at one step in 64 is little."""


class RoomyLayer(DynamicLayer):
    """A layer that attends to all that was read, with room to spare: what is appended does not move what is there.

    Keys and values are the beginning of larger tensors. Tokens that another cache may share are never written over.

    Attributes:
        shared: how many first tokens another cache may share.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shared = 0
        self._rooms: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (1, heads, n, d) keys and values; all of them, (1, heads, N, d)."""
        before = self.get_seq_length()
        if self.keys is None or self.values is None or not before:
            return super().update(key_states, value_states)
        after = before + key_states.shape[-2]
        if self._rooms is None or not self._fits(self._rooms[0], before, after):
            self._rooms = _moved(self.keys, after + SPARE), _moved(self.values, after + SPARE)
            self.shared = 0
        for room, added in zip(self._rooms, (key_states, value_states), strict=True):
            room[..., before:after, :] = added
        self.keys, self.values = (room[..., :after, :] for room in self._rooms)
        return self.keys, self.values

    def _fits(self, room: Tensor, before: int, after: int) -> bool:
        """Whether there is space, and the keys still begin there."""
        there = self.keys is not None and self.keys.data_ptr() == room.data_ptr()
        return there and self.shared <= before and after <= room.shape[-2]

    def twin(self) -> RoomyLayer:
        """A layer of its own that shares what was read so far."""
        self.shared = max(self.shared, self.get_seq_length())
        twin = copy.copy(self)
        twin._rooms = None
        return twin


def full(config: Any) -> DynamicCache:
    """An empty cache whose layers all keep all that is read, also where they look back a few tokens only: it can go
    back."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() for _ in cache.layers]
    return cache


def new(config: Any) -> DynamicCache:
    """An empty cache as the architecture wants it; layers that look at everything have room."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def text() -> DynamicCache:
    """An empty cache for a model that carries no state: it holds the ids that were read, as keys of width 1."""
    cache = DynamicCache()
    cache.layers = [RoomyLayer()]
    return cache


def append_text(cache: DynamicCache, tokens: Tensor) -> Tensor:
    """Append int64 (1, n) ids to a cache whose last layer holds the text; all ids of it, (1, N)."""
    ids = tokens[:, None, :, None]
    return cache.update(ids, ids[..., :0], len(cache.layers) - 1)[0][:, 0, :, 0]


def is_recurrent(cache: DynamicCache) -> bool:
    """Whether no layer attends to tokens read before: each keeps a running state alone."""
    return all(
        isinstance(layer, LinearAttentionLayer) and not isinstance(layer, DynamicLayer) for layer in cache.layers
    )


def is_full(cache: Any) -> bool:
    """Whether every layer holds all that was read: then it can go back, and share."""
    return isinstance(cache, DynamicCache) and all(type(layer) is RoomyLayer for layer in cache.layers)


def fork(cache: Any) -> Any:
    """A cache of its own with the same content; full ones share it."""
    if not is_full(cache):
        return copy.deepcopy(cache)
    twin = copy.copy(cache)
    twin.layers = [layer.twin() for layer in cache.layers]
    return twin


def crop(cache: DynamicCache, count: int) -> None:
    """Drop the last `count` tokens of a full cache."""
    layers: list[Any] = cache.layers
    for layer in layers:
        if layer.get_seq_length():
            layer.keys, layer.values = layer.keys[..., :-count, :], layer.values[..., :-count, :]


def tensors(cache: Any) -> Iterator[Tensor]:
    """All tensors that the layers hold."""
    for layer in cache.layers:
        for held in vars(layer).values():
            yield from (part for part in (held.values() if isinstance(held, dict) else [held]) if torch.is_tensor(part))


def _moved(states: Tensor, size: int) -> Tensor:
    room = states.new_empty((*states.shape[:-2], size, states.shape[-1]))
    room[..., : states.shape[-2], :] = states
    return room
