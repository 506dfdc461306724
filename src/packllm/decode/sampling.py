"""Samplers: they choose the next token from the fused distribution."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Sampler = Callable[[Tensor], int]

_LEAST_TEMPERATURE = 1e-30
"""Below this, float32 division makes every log-probability -infinity; far above it the distribution is one-hot."""

_ROUNDING = 1e-6
"""In nats: tolerance for rounding, so that min_p keeps a token exactly min_p times as likely as the most likely one."""


class Greedy:
    """Takes the most likely token, the smallest id among equals. It has the methods of Random."""

    def __call__(self, logprobs: Tensor) -> int:
        return int(logprobs.argmax())

    def distribution(self, logprobs: Tensor) -> Tensor:
        return logprobs

    def draw(self, distribution: Tensor) -> int:
        return int(distribution.argmax())

    def judge(self, drafted: int, draft: Tensor, target: Tensor) -> int:
        return self.draw(target)

    def overlap(self, draft: Tensor, target: Tensor) -> float:
        return float(self.draw(draft) == self.draw(target))


class Random:
    """Draws a token at random, after temperature, top_k, top_p and min_p.

    Args:
        temperature, top_p, top_k, min_p: see make_sampler; the temperature is above 0.
        seed: of this sampler's own random generator; None: a new seed each time.
    """

    def __init__(
        self, temperature: float, top_p: float, top_k: int | None, seed: int | None, min_p: float = 0.0
    ) -> None:
        self._filters = temperature, top_p, top_k, min_p
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def __call__(self, logprobs: Tensor) -> int:
        scaled, ids = filtered(logprobs, *self._filters)
        drawn = self.draw(scaled.softmax(-1).cpu())
        return drawn if ids is None else int(ids[drawn])

    def distribution(self, logprobs: Tensor) -> Tensor:
        """The probabilities of drawing each token: float32 (V,) on the CPU."""
        scaled, ids = filtered(logprobs, *self._filters)
        probabilities = scaled.softmax(-1)
        if ids is not None:
            probabilities = torch.zeros_like(logprobs).scatter_(0, ids, probabilities)
        return probabilities.cpu()

    def draw(self, distribution: Tensor) -> int:
        return int(torch.multinomial(distribution, 1, generator=self._generator))

    def judge(self, drafted: int, draft: Tensor, target: Tensor) -> int:
        """Turn a drafted token into one that is distributed as `target`. It is accepted with probability
        min(1, target/draft); otherwise a token is drawn from max(0, target - draft) (arXiv 2211.17192).

        Args:
            drafted: a token drawn from `draft`.
            draft, target: distributions (V,).
        """
        if float(torch.rand((), generator=self._generator)) * float(draft[drafted]) < float(target[drafted]):
            return drafted
        rest = (target - draft).clamp_min(0)
        return self.draw(rest if rest.sum() > 0 else target)  # no remainder: both are equal up to rounding

    def overlap(self, draft: Tensor, target: Tensor) -> float:
        """The probability that judge() accepts."""
        return float(torch.minimum(draft, target).sum())


def make_sampler(
    temperature: float, top_p: float, top_k: int | None, seed: int | None, min_p: float = 0.0
) -> Greedy | Random:
    """A function from log-probabilities (V,) to a token id.

    Temperature 0 is greedy (the smallest id among equals). Otherwise the distribution is raised to 1/temperature, cut
    to the top_k most likely tokens, then to the smallest set with total probability top_p, then to tokens at least
    min_p times as likely as the most likely one; then a token is drawn.
    """
    return Greedy() if temperature == 0 else Random(temperature, top_p, top_k, seed, min_p)


def filtered(
    logprobs: Tensor, temperature: float, top_p: float, top_k: int | None, min_p: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities after temperature, top_k, top_p and min_p, not normalised, and their token ids (None: all ids,
    in order). Without top_k and top_p nothing is sorted."""
    scaled = logprobs / max(temperature, _LEAST_TEMPERATURE)
    ids = None
    if top_k is not None and top_k < len(scaled):
        ids = (scaled >= scaled.topk(top_k).values[-1]).nonzero()[:, 0]  # includes ties for the last place
    if ids is not None or top_p < 1.0:
        # Stable: the smaller id comes first among equals, so the cuts keep it, as greedy decoding does.
        scaled, order = (scaled if ids is None else scaled[ids]).sort(descending=True, stable=True)
        ids = order if ids is None else ids[order]
        scaled, ids = scaled[:top_k], ids[:top_k]
    if top_p < 1.0:
        probabilities = scaled.softmax(-1)
        cumulative = probabilities.cumsum(-1) - probabilities
        count = int((cumulative < top_p).sum())  # the token that crosses top_p is kept
        scaled, ids = scaled[:count], None if ids is None else ids[:count]
    if min_p > 0.0:
        keep = (scaled >= scaled.max() + math.log(min_p) - _ROUNDING).nonzero()[:, 0]
        scaled, ids = scaled[keep], keep if ids is None else ids[keep]
    return scaled, ids
