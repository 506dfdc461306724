"""Attention of all sequences of a pass in one call, on a GPU: there the time of a step goes into launching kernels, and
a call for each sequence and layer launches thousands."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache as once
from functools import partial
from typing import Any

import torch
from torch import Tensor

MOST_WIDTH = 256
"""Largest width of a head that the kernel has."""


@once
def kernel(device: torch.device) -> Callable[..., Any] | None:
    """torch's attention for rows of different lengths, if this torch has it with all that is needed here, and the
    device runs it."""
    if device.type != "cuda" or torch.version.hip or not torch.backends.cuda.is_flash_attention_available():
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters.keys()
    if not {"scale", "window_size"} <= known:
        return None
    return partial(varlen_attn, enable_gqa=True) if "enable_gqa" in known else varlen_attn  # before, it always was


def of(query: Tensor, value: Tensor) -> Callable[..., Any] | None:
    """The kernel for these queries (1, heads, n, d) and values; None if it has no form for them."""
    width = query.shape[-1]
    fits = width == value.shape[-1] and width <= MOST_WIDTH and not width % 8
    half = query.dtype in (torch.float16, torch.bfloat16)
    return kernel(query.device) if half and fits else None


def attend(
    kernel: Callable[..., Any],
    query: Tensor,
    stored: Sequence[tuple[Tensor, Tensor]],
    ends: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Attention with queries (1, heads, n, d): the last tokens of each sequence attend to its keys and values.

    Args:
        stored: keys and values (1, key heads, length, d) of each sequence.
        ends: where each sequence's queries, and its keys, end among all of them: int32 (sequences + 1,), from 0.
        longest: most queries and most keys of a sequence.
        window: how many tokens a token attends to, itself included; None: all before it.

    Returns:
        (1, n, heads, d)
    """
    key, value = (torch.cat(parts, dim=2)[0].transpose(0, 1) for parts in zip(*stored, strict=True))
    windows = -1 if window is None else window - 1, 0
    output: Tensor = kernel(query[0].transpose(0, 1), key, value, *ends, *longest, scale=scale, window_size=windows)
    return output[None]
