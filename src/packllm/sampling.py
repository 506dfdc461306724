"""Choosing the next token from the fused distribution."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Sampler = Callable[[Tensor], int]

_LEAST_TEMPERATURE = 1e-30
"""Below this, dividing in float32 makes every log-probability -infinity; the distribution is one-hot long before."""


def make_sampler(temperature: float, top_p: float, top_k: int | None, seed: int | None) -> Sampler:
    """A function from log-probabilities (V,) to a token id.

    temperature 0 is greedy (the smallest id of equals). Otherwise the distribution is raised to
    1/temperature, cut to the top_k likeliest, then to the smallest set that reaches top_p, and sampled.
    """
    if temperature == 0:
        return lambda logprobs: int(logprobs.argmax())
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)

    def sample(logprobs: Tensor) -> int:
        scaled, ids = filtered(logprobs, temperature, top_p, top_k)
        drawn = torch.multinomial(scaled.softmax(-1).cpu(), 1, generator=generator)
        return int(drawn if ids is None else ids[drawn])

    return sample


def filtered(logprobs: Tensor, temperature: float, top_p: float, top_k: int | None) -> tuple[Tensor, Tensor | None]:
    """Unnormalised log-probabilities that remain after temperature, top_k and top_p, and the token ids
    they belong to (None: all, in order). Without top_k and top_p nothing is sorted."""
    scaled = logprobs / max(temperature, _LEAST_TEMPERATURE)
    ids = None
    if top_k is not None and top_k < len(scaled):
        ids = (scaled >= scaled.topk(top_k).values[-1]).nonzero()[:, 0]  # all that tie for the last place
    if ids is None and top_p >= 1.0:
        return scaled, None
    # Stable: of equals the smaller id comes first, so the cuts keep it, as greedy choice does.
    scaled, order = (scaled if ids is None else scaled[ids]).sort(descending=True, stable=True)
    ids = order if ids is None else ids[order]
    scaled, ids = scaled[:top_k], ids[:top_k]
    if top_p < 1.0:
        probabilities = scaled.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        keep = int((before < top_p).sum())  # the token that crosses top_p is kept
        scaled, ids = scaled[:keep], ids[:keep]
    return scaled, ids
