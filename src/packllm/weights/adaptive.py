"""adapt: mixture weights that go on learning while an answer is written (METHODS §3)."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence

import numpy as np
from torch import Tensor

from packllm.errors import WeightsError
from packllm.weights.result import Weights

RATES = (0.05, 0.3, 1.0)
"""How often a new member is drawn, per token; which of these holds is learnt too."""

TRUST = (0.25, 0.25, 0.5)
"""Prior of each rate. At rate 1 the weights stay what they were: that half bounds the loss against them."""

_LEAST = 1e-290
"""Weights below this are none: what is left of them after a rate is no normal number."""

_RATES = np.array(RATES)[:, None]


class Adaptive:
    """Sequential Bayes over a hidden path: at each token the member that speaks stays with probability 1 - r, else it
    is drawn anew from π, averaged over the rates r.

    All tokens together lose at most ln 2 nats to the static mixture π, whatever they are.

    Args:
        weights: π, (..., K): each row's weights found on the prompt, or Weights.

    Raises:
        WeightsError: weights that are no distribution: DExperts' have none to mix.
    """

    def __init__(self, weights: Weights | Sequence[float] | np.ndarray | Tensor) -> None:
        given = weights.values if isinstance(weights, Weights) else weights
        prior = np.array(given, dtype=np.float64)
        if not prior.ndim or not prior.size or not np.isfinite(prior).all() or prior.min() < 0:
            raise WeightsError(f"weights={given!r} are no distribution; adapting ones are at least 0 and sum to 1")
        if not np.allclose(prior.sum(-1), 1.0, atol=1e-6):
            raise WeightsError(f"weights={given!r} sum to {prior.sum(-1)}; adapting ones must sum to 1")
        self._start_from(np.where(prior < _LEAST, 0.0, prior))

    def _start_from(self, prior: np.ndarray) -> None:
        self._prior = prior / prior.sum(-1, keepdims=True)
        self._known = self._prior > 0
        self._belief = np.repeat(self._prior[..., None, :], len(RATES), -2)  # (..., rates, K)
        self._trust = np.broadcast_to(np.log(TRUST), self._belief.shape[:-1])  # log, or a rate that lost never returns

    def weights(self) -> np.ndarray:
        """float64 (..., K): the mixture of the next token."""
        trust = np.exp(self._trust)
        return np.matmul((trust / trust.sum(-1, keepdims=True))[..., None, :], self._belief)[..., 0, :]

    def observe(self, p: Sequence[float] | np.ndarray | Tensor) -> None:
        """A token was chosen.

        Args:
            p: (..., K), the probabilities that the members gave it, or numbers in proportion to them. Where all are 0
                nobody is blamed.

        Raises:
            WeightsError: another shape than the weights', or numbers that are negative, infinite or NaN.
        """
        given = np.asarray(p, dtype=np.float64)
        if given.shape != self._prior.shape:
            raise WeightsError(f"p has shape {given.shape}, the weights have {self._prior.shape}")
        if not (given.min() >= 0 and given.max() < np.inf):
            raise WeightsError(f"p={given.tolist()} must be probabilities")
        given = np.where(self._known, given, 0.0)
        most = given.max(-1, keepdims=True)
        given = given / most if most.all() else np.where(most > 0, given / np.where(most > 0, most, 1.0), 1.0)
        joint = self._belief * given[..., None, :]
        total = joint.sum(-1, keepdims=True)
        self._belief = (1 - _RATES) * (joint / total) + _RATES * self._prior[..., None, :]
        trust = self._trust + np.log(total[..., 0])
        self._trust = trust - trust.max(-1, keepdims=True)

    def lose(self, members: Collection[int]) -> None:
        """Members leave, in all rows: weights() is what it was without them, renormalised.

        Raises:
            WeightsError: nobody is left.
        """
        left = np.ones(self._prior.shape[-1])
        left[list(members)] = 0.0
        prior = self._prior * left
        if not prior.sum(-1).all():
            raise WeightsError(f"no member with a weight is left without {sorted(members)}")
        belief = self._belief * left
        total = belief.sum(-1, keepdims=True)
        self._prior, self._known = prior / prior.sum(-1, keepdims=True), prior > 0
        self._belief, self._trust = belief / total, self._trust + np.log(total[..., 0])

    def fork(self) -> Adaptive:
        """The same once more; this one stays as it is."""
        return copy.copy(self)  # arrays are replaced, never written to
