"""Key-value caches: rows taken apart and put together, and tokens at the end taken off again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

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
        """Append (B, heads, n, d) keys and values; all of them, (B, heads, N, d)."""
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
        """Whether there is space, and the keys still begin there: crop() leaves them, reorder_cache() does not."""
        there = self.keys is not None and self.keys.data_ptr() == room.data_ptr()
        return there and self.shared <= before and after <= room.shape[-2]

    def twin(self) -> RoomyLayer:
        """A layer of its own that shares what was read so far."""
        self.shared = max(self.shared, self.get_seq_length())
        twin = copy.copy(self)
        twin._rooms = None
        return twin


def new(config: Any) -> DynamicCache:
    """An empty cache for a model of this configuration."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def text() -> DynamicCache:
    """An empty cache for a model that carries no state: it holds the ids that were read, as keys of width 1."""
    cache = DynamicCache()
    cache.layers = [RoomyLayer()]
    return cache


def append_text(cache: DynamicCache, tokens: Tensor) -> Tensor:
    """Append int64 (B, n) ids to a cache whose last layer holds the text; all ids of it, (B, N)."""
    ids = tokens[:, None, :, None]
    return cache.update(ids, ids[..., :0], len(cache.layers) - 1)[0][:, 0, :, 0]


def is_recurrent(cache: DynamicCache) -> bool:
    """Whether no layer attends to tokens read before: each keeps a running state alone."""
    return all(
        isinstance(layer, LinearAttentionLayer) and not isinstance(layer, DynamicLayer) for layer in cache.layers
    )


def is_plain(cache: DynamicCache) -> bool:
    """Whether the layers hold keys and values alone, and never write over what another cache shares."""
    return all(type(layer) in (RoomyLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def index(rows: Sequence[int]) -> Any:
    """Index of these rows: a slice where they follow each other, which copies nothing."""
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows)


def take(cache: DynamicCache, rows: Sequence[int]) -> DynamicCache:
    """A cache of its own over these rows, which may repeat; consecutive ones of plain layers are shared."""
    twin = copy.copy(cache)
    if not is_plain(cache):
        twin.layers = copy.deepcopy(cache.layers)
        twin.reorder_cache(torch.LongTensor(rows))  # also where layers keep a running state
        return twin
    chosen = index(rows)
    twin.layers = _twins(cache)
    for layer in _filled(twin):
        layer.keys, layer.values = layer.keys[chosen], layer.values[chosen]
    return twin


def join(caches: Sequence[DynamicCache]) -> DynamicCache:
    """One cache with the rows of several plain ones that have read equally much."""
    whole = copy.copy(caches[0])
    whole.layers = _twins(whole)
    for layer, *parts in zip(_filled(whole), *map(_filled, caches), strict=True):
        layer.keys = torch.cat([part.keys for part in parts])
        layer.values = torch.cat([part.values for part in parts])
    return whole


def is_whole(cache: DynamicCache) -> bool:
    """Whether crop() can take the cache back to any length: plain layers that still hold all that was read."""
    return is_plain(cache) and all(layer.keys.shape[-2] == layer.get_seq_length() for layer in _filled(cache))


def crop(cache: DynamicCache, count: int) -> None:
    """Drop the last `count` tokens of a whole cache, which stays whole: unlike its own crop(), this lets sliding
    windows keep what left them."""
    for layer in _filled(cache) if count else ():
        layer.keys, layer.values = layer.keys[..., :-count, :], layer.values[..., :-count, :]
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length -= count


def forget_past(cache: DynamicCache) -> None:
    """Let sliding windows drop what they recorded, and record no more."""
    for layer in cache.layers:
        if type(layer) is DynamicSlidingWindowLayer and layer.record_past:
            layer.crop(0)
            layer.record_past = False


def tensors(cache: DynamicCache) -> Iterator[Tensor]:
    """All tensors that the layers hold."""
    for layer in cache.layers:
        for held in vars(layer).values():
            yield from (part for part in (held.values() if isinstance(held, dict) else [held]) if torch.is_tensor(part))


def _moved(states: Tensor, size: int) -> Tensor:
    room = states.new_empty((*states.shape[:-2], size, states.shape[-1]))
    room[..., : states.shape[-2], :] = states
    return room


def _twins(cache: DynamicCache) -> list[Any]:
    return [layer.twin() if isinstance(layer, RoomyLayer) else copy.copy(layer) for layer in cache.layers]


def _filled(cache: DynamicCache) -> list[Any]:
    layers: list[Any] = cache.layers
    return [layer for layer in layers if layer.get_seq_length()]
