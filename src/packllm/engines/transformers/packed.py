"""Rows of different lengths in one pass: all tokens form one row of a batch of one; each attends to its own cache.

Every matrix product of the model runs once over the tokens of all sequences. Only attention runs sequence by sequence,
over each one's keys and values. So no cache is padded, copied or moved when sequences start or end. transformers lets a
model's attention be replaced by name (its attention interface). Without a mask function of that name there is no mask;
the function here knows which positions each token may attend to.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache as once
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from packllm.engines.transformers import kv, varlen
from packllm.engines.transformers.architecture import device_of

NAME = "packllm"

KERNELS = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
"""cuDNN's kernel is left out: it makes a new plan for each length of keys and each thread."""

_here = threading.local()


class PackedCache(DynamicCache):
    """The caches of several sequences as one cache for one pass.

    Args:
        caches: one per sequence.
        counts: tokens of each sequence in this pass.
    """

    def __init__(self, caches: Sequence[DynamicCache], counts: Sequence[int]) -> None:
        super().__init__()
        self._caches, self.counts = caches, list(counts)
        self._keys: Tensor | None = None
        self._layer = 0
        self._masks: dict[tuple[torch.device, int, int, int | None], Tensor] = {}
        self._ends: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}
        self.windows: dict[int, int | None] = {}  # by layer, as passed to the attention

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append each sequence's part of keys and values (1, heads, n, d) to its cache."""
        layers: list[Any] = [cache.layers[layer_idx] for cache in self._caches]
        parts = list(zip(self._split(key_states), self._split(value_states), strict=True))
        places = [place for layer, part in zip(layers, parts, strict=True) for place in layer.extend(*part)]
        torch._foreach_copy_(places, [states for part in parts for states in part])  # one launch on a GPU
        self._keys, self._layer = key_states, layer_idx
        return key_states, value_states

    def _split(self, states: Tensor) -> tuple[Tensor, ...]:
        """The parts of the sequences. The first stride is that of the caches' places: equal ones are copied faster."""
        return states[0][None].split(self.counts, dim=2)

    def stored(self, keys: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each sequence all its keys and values of the last updated layer, (1, heads, N, d)."""
        if keys is not self._keys:
            raise ValueError("this architecture changes keys after they are cached")
        layers: list[Any] = [cache.layers[self._layer] for cache in self._caches]
        return [(layer.keys, layer.values) for layer in layers]

    def ends(self, lengths: Sequence[int], device: torch.device) -> Tensor:
        """Where parts of these lengths end, one after another: int32 (parts + 1,), from 0. Shared by all layers."""
        key = device, tuple(lengths)
        if key not in self._ends:
            self._ends[key] = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        return self._ends[key]

    def mask(self, tokens: int, length: int, window: int | None, device: torch.device) -> Tensor:
        """The positions that each of the last `tokens` of `length` tokens may attend to: bool (tokens, length). Shared
        by all layers."""
        key = device, tokens, length, window
        if key not in self._masks:
            ahead = torch.arange(length, device=device) - torch.arange(length - tokens, length, device=device)[:, None]
            self._masks[key] = ahead <= 0 if window is None else (ahead <= 0) & (ahead > -window)
        return self._masks[key]


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention with queries (1, heads, n, d), as called by transformers; each sequence attends to its own cache."""
    cache: PackedCache = _here.cache
    cache.windows[getattr(module, "layer_idx", len(cache.windows))] = sliding_window
    pairs = zip(cache.counts, cache.stored(key), strict=True)
    stored = [_within(sliding_window, count, *pair) for count, pair in pairs]
    if len(stored) > 1 and softcap is None and s_aux is None and (kernel := varlen.of(query, value)):
        lengths = [keys.shape[2] for keys, _ in stored]
        ends = cache.ends(cache.counts, query.device), cache.ends(lengths, query.device)
        longest = max(cache.counts), max(lengths)
        return varlen.attend(kernel, query, stored, ends, longest, scaling, sliding_window), None
    parts = []
    for part, (keys, values) in zip(query.split(cache.counts, dim=2), stored, strict=True):
        count, length = part.shape[2], keys.shape[2]
        window = sliding_window if sliding_window is not None and sliding_window < length else None
        plain = window is None and (count == 1 or count == length)
        mask = None if plain or count == 1 else cache.mask(count, length, window, part.device)
        if softcap is not None or s_aux is not None:
            mask = None if count == 1 else cache.mask(count, length, window, part.device)
            parts.append(_by_hand(part, keys, values, mask, scaling, softcap, s_aux))
        elif count == 1:  # heads that share keys become rows, so no keys are repeated
            shape = (1, keys.shape[1], -1, part.shape[-1])
            out = scaled_dot_product_attention(part.reshape(shape), keys, values, scale=scaling)
            parts.append(out.reshape(1, -1, 1, values.shape[-1]))
        else:
            grouped = part.shape[1] != keys.shape[1]
            out = scaled_dot_product_attention(
                part, keys, values, attn_mask=mask, scale=scaling, is_causal=mask is None, enable_gqa=grouped
            )
            parts.append(out)
    outputs = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return outputs.transpose(1, 2).contiguous(), None


def _within(window: int | None, count: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values that the last `count` tokens attend to: with a window, none attends further back."""
    start = 0 if window is None else keys.shape[2] - (window + count - 1)
    return (keys[:, :, start:], values[:, :, start:]) if start > 0 else (keys, values)


def _by_hand(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with features that fused kernels lack: capped scores (Gemma 2), attention sinks (gpt-oss)."""
    repeat = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(repeat, 1), values.repeat_interleave(repeat, 1)
    scores = query @ keys.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1).to(scores)], dim=-1)
    shares = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (shares if sinks is None else shares[..., :-1]) @ values


@once
def _register() -> None:
    from transformers import AttentionInterface  # loads 120 MB of libraries, which llama.cpp does not need

    AttentionInterface.register(NAME, attend)


@contextmanager
def attention(config: Any, cache: PackedCache) -> Iterator[None]:
    """Within this context, in this thread, models with this configuration use `attend` over the given caches. Outside
    of it the user's model is unchanged."""
    _register()
    before = config._attn_implementation
    config._attn_implementation, _here.cache = NAME, cache
    try:
        yield
    finally:
        config._attn_implementation = before
        del _here.cache


_packable: dict[str, bool] = {}
"""Results by class and configuration: each kind of model is tried once."""


def can_pack(model: Any, vocabulary_size: int, carrier: str | None) -> bool:
    """Whether sequences of a model can be packed: its attention uses transformers' interface and passes its windows,
    and two packed sequences, read in two passes, give the results of fresh passes."""
    kind = f"{type(model).__module__} {type(model).__name__} {model.dtype} {model.config.to_json_string()}"
    kind += " without memory" if device_of(model).type == "meta" else ""
    if kind not in _packable:
        _packable[kind] = carrier is not None and _tried(model, vocabulary_size, carrier)
    return _packable[kind]


def _tried(model: Any, vocabulary_size: int, carrier: str) -> bool:
    config = model.config.get_text_config(decoder=True)
    accepted = inspect.signature(model.forward).parameters
    is_transformers_class = type(model).__module__.startswith(
        "transformers."
    )  # other classes may use the cache in other ways
    if not is_transformers_class or not {"position_ids", carrier} <= accepted.keys():
        return False
    if getattr(config, "attention_chunk_size", None):
        return False
    device = device_of(model)
    rows = [[i % vocabulary_size for i in row] for row in (range(1, 7), range(3, 6))]
    caches = [kv.full(config) for _ in rows]
    ours: list[list[Tensor]] = [[], []]
    with torch.inference_mode():
        try:
            for cuts in ((slice(0, 4), slice(0, 1)), (slice(4, 6), slice(1, 3))):
                parts = [row[cut] for row, cut in zip(rows, cuts, strict=True)]
                cache = PackedCache(caches, [len(part) for part in parts])
                ids = torch.tensor([[i for part in parts for i in part]], device=device)
                places = [place for row, cut in zip(rows, cuts, strict=True) for place in range(len(row))[cut]]
                at = torch.tensor([places], device=device)
                with attention(config, cache):
                    logits = model(input_ids=ids, position_ids=at, use_cache=True, **{carrier: cache}).logits[0]
                for row_logits, part in zip(ours, logits.split([len(part) for part in parts]), strict=True):
                    row_logits.append(part)
            if device.type != "meta":
                fresh = [model(input_ids=torch.tensor([row]).to(device), use_cache=False).logits[0] for row in rows]
        except Exception:  # its attention does not use the interface
            return False
    if sum(window is not None for window in cache.windows.values()) != _windows(config):
        return False
    if device.type == "meta":  # there is no data to compare
        return True
    scale = 1e-3 if model.dtype == torch.float32 else 0.2
    return all(
        bool(
            (torch.cat(row_logits).float() - right.float()).abs().max() <= scale * max(1.0, float(right.float().std()))
        )
        for row_logits, right in zip(ours, fresh, strict=True)
    )


def _windows(config: Any) -> int:
    """Number of layers with a sliding window."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return sum(kind == "sliding_attention" for kind in kinds)
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return config.num_hidden_layers if window else 0
