"""adapt: mixture weights that are updated with every token of the answer (METHODS §3)."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence

import numpy as np
from torch import Tensor

from packllm.errors import WeightsError
from packllm.weights.result import Weights

RATES = (0.05, 0.3, 1.0)
"""Switching rates: the probability per token that the speaking member is drawn again. Which rate holds is learnt
too."""

TRUST = (0.25, 0.25, 0.5)
"""Prior probability of each rate. At rate 1 the weights do not change; its half bounds the loss against fixed
weights."""

_LEAST = 1e-290
"""Weights below this become 0: multiplied by a rate, they would no longer be normal numbers."""

_RATES = np.array(RATES)[:, None]


class Adaptive:
    """Sequential Bayesian updates of a hidden Markov path: at each token the speaking member stays with probability
    1 - r; otherwise it is drawn from π. The result is averaged over the rates r.

    Over a whole answer the loss against the fixed mixture π is at most ln 2 nats, whatever the tokens are.

    Args:
        weights: π, (..., K): each row's weights from the prompt; or Weights.

    Raises:
        WeightsError: the weights are no distribution, as those of DExperts.
    """

    def __init__(self, weights: Weights | Sequence[float] | np.ndarray | Tensor) -> None:
        values = weights.values if isinstance(weights, Weights) else weights
        prior = np.array(values, dtype=np.float64)
        if not prior.ndim or not prior.size or not np.isfinite(prior).all() or prior.min() < 0:
            raise WeightsError(f"weights={values!r} are no distribution; adaptive weights are at least 0 and sum to 1")
        if not np.allclose(prior.sum(-1), 1.0, atol=1e-6):
            raise WeightsError(f"weights={values!r} sum to {prior.sum(-1)}; adaptive weights must sum to 1")
        self._start_from(np.where(prior < _LEAST, 0.0, prior))

    def _start_from(self, prior: np.ndarray) -> None:
        self._prior = prior / prior.sum(-1, keepdims=True)
        self._known = self._prior > 0
        self._belief = np.repeat(self._prior[..., None, :], len(RATES), -2)  # (..., rates, K)
        # In logs: the probability of an unlikely rate must not become 0 for good.
        self._trust = np.broadcast_to(np.log(TRUST), self._belief.shape[:-1])

    def weights(self) -> np.ndarray:
        """float64 (..., K): the weights for the next token."""
        trust = np.exp(self._trust)
        return np.matmul((trust / trust.sum(-1, keepdims=True))[..., None, :], self._belief)[..., 0, :]

    def observe(self, p: Sequence[float] | np.ndarray | Tensor) -> None:
        """Update the weights after a chosen token.

        Args:
            p: (..., K), the members' probabilities of the token, or numbers proportional to them. Where all are 0 the
                weights are not updated.

        Raises:
            WeightsError: another shape than the weights', or numbers that are negative, infinite or NaN.
        """
        likelihoods = np.asarray(p, dtype=np.float64)
        if likelihoods.shape != self._prior.shape:
            raise WeightsError(f"p has shape {likelihoods.shape}, the weights have {self._prior.shape}")
        if not (likelihoods.min() >= 0 and likelihoods.max() < np.inf):
            raise WeightsError(f"p={likelihoods.tolist()} must be probabilities")
        likelihoods = np.where(self._known, likelihoods, 0.0)
        peak = likelihoods.max(-1, keepdims=True)
        likelihoods = (
            likelihoods / peak if peak.all() else np.where(peak > 0, likelihoods / np.where(peak > 0, peak, 1.0), 1.0)
        )
        joint = self._belief * likelihoods[..., None, :]
        total = joint.sum(-1, keepdims=True)
        self._belief = (1 - _RATES) * (joint / total) + _RATES * self._prior[..., None, :]
        trust = self._trust + np.log(total[..., 0])
        self._trust = trust - trust.max(-1, keepdims=True)

    def lose(self, members: Collection[int]) -> None:
        """Drop members in all rows: weights() then gives the other weights, renormalised.

        Raises:
            WeightsError: no member with weight would remain.
        """
        mask = np.ones(self._prior.shape[-1])
        mask[list(members)] = 0.0
        prior = self._prior * mask
        if not prior.sum(-1).all():
            raise WeightsError(f"no member with a weight remains without {sorted(members)}")
        belief = self._belief * mask
        total = belief.sum(-1, keepdims=True)
        self._prior, self._known = prior / prior.sum(-1, keepdims=True), prior > 0
        self._belief, self._trust = belief / total, self._trust + np.log(total[..., 0])

    def fork(self) -> Adaptive:
        """A copy that adapts independently of this one."""
        return copy.copy(self)  # arrays are replaced, never changed in place
