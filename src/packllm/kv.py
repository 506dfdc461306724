"""Key-value caches: rows taken apart and put together, and tokens at the end taken off again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def is_full(cache: DynamicCache) -> bool:
    """Whether every layer attends to all that was read."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def is_plain(cache: DynamicCache) -> bool:
    """Whether the layers hold keys and values alone, in tensors that they replace and never write into."""
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


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
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in _filled(twin):
        layer.keys, layer.values = layer.keys[chosen], layer.values[chosen]
    return twin


def join(caches: Sequence[DynamicCache]) -> DynamicCache:
    """One cache with the rows of several plain ones that have read equally much."""
    whole = copy.copy(caches[0])
    whole.layers = [copy.copy(layer) for layer in whole.layers]
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


def _filled(cache: DynamicCache) -> list[Any]:
    layers: list[Any] = cache.layers
    return [layer for layer in layers if layer.get_seq_length()]
