"""A compact lower bound of the log pool's loss, for `exact` and `map` (METHODS §3).

At a position, a_k(v) = s_k(v) − s_k(x) are the members' margins over the observed token x, and

    f(λ) = log Σ_v exp(λ·a(v)) = log [Σ_{v likely} exp(λ·a(v)) + T(λ)],    T(λ) = Σ_{v unlikely} exp(λ·a(v)).

The few likely tokens are stored. The many others are replaced by one term. Let q be the pool at λ', restricted to them,
and ā = E_q a. Then Jensen's inequality gives

    T(λ) = T(λ') E_q exp((λ − λ')·a) ≥ T(λ') exp((λ − λ')·ā) = exp(λ·ā + c),    c = log T(λ') − λ'·ā.

So the bound is a log-sum-exp of some thousand terms. It is convex and never above f, and equals f at λ' in value and
gradient (it "touches" f there). Each position has its own λ'. Minimising the mean over positions takes milliseconds;
this minimum is a lower bound of the minimum of the loss.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from packllm.weights.blocks import NOTHING, Expansion, expand, pool

LIKELY = 1536
"""Tokens stored per position, at most. On texts of some hundred tokens one evaluation of the loss then certifies it."""

TERMS_BYTES = 48 * 2**20
"""Upper bound of the bound's size for a long text, in bytes: it stores fewer tokens then, but at least LEAST_LIKELY."""

LEAST_LIKELY = 256

_LEAST = 1e-5  # below this mass of the unlikely tokens, their mean is too inexact in float32


class Minorant:
    """The bound over the positions that were added so far.

    Args:
        shape: (K, t, V) of all positions that will be added.
        device: the device of the logits.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        members, positions, vocabulary = shape
        room = TERMS_BYTES // (4 * (members + 1) * positions)
        likely = min(vocabulary, LIKELY, max(LEAST_LIKELY, room))
        # Terms of each position: K margins and a constant. It is 0 for a token, and c for the last term, all others.
        self._terms = torch.zeros(members + 1, positions, likely + 1, device=device)
        self._order = torch.empty(positions, dtype=torch.int64, device=device)
        self._count = 0

    def add(self, part: Tensor, block: Tensor, observed: Tensor, weights: np.ndarray) -> None:
        """Add positions; the bound touches the loss at `weights`.

        Args:
            part: int64 (b,), new positions.
            block: float32 (K, b, V), logits; overwritten.
            observed: float32 (K, b), the logits of the observed tokens.
            weights: λ'.
        """
        here = slice(self._count, self._count + len(part))
        self._count = here.stop
        self._order[here] = part
        terms = self._terms[:, here]
        fused = pool(block, weights)
        holes = fused.device.type != "cpu" or bool(fused.amin() == -torch.inf)  # a GPU would have to wait for the test
        logits, likely = _likely(fused, terms.shape[2] - 1)
        peak = logits.amax(-1, keepdim=True)
        chances = fused.sub_(peak).exp_()  # not normalised: they sum to `total`
        total = chances.sum(-1)
        loss = total.log() + peak[:, 0] - _combine(observed, weights)
        chances.scatter_(-1, likely, 0.0)
        if holes:
            block.clamp_(min=NOTHING)  # for 0 · −inf
        likely_margins = block.gather(-1, likely.expand(len(block), -1, -1)) - observed[..., None]
        terms[:-1, :, :-1] = likely_margins.masked_fill_(logits.isneginf(), NOTHING)  # also where a weight is 0
        rest = chances.sum(-1)
        mean = torch.bmm(block.transpose(0, 1), chances[..., None])[..., 0].T / rest.clamp_min(1e-30) - observed
        terms[:-1, :, -1], terms[-1, :, -1] = mean, _constant(mean, rest / total, loss, weights)

    def losses(self, here: slice, weights: np.ndarray) -> Tensor:
        """The bound at `weights` on these positions: float32 (n,).

        Args:
            here: positions, as indices into `order`.
        """
        terms = self._terms[:, here]
        return _combine(terms.flatten(1), np.append(weights, 1.0)).view(terms.shape[1:]).logsumexp(-1)

    def touch(self, here: Tensor, loss: Tensor, gradient: Tensor, weights: np.ndarray) -> None:
        """Let the bound touch the loss at other weights, with the same likely tokens.

        Args:
            here: int64 (n,), positions, as indices into `order`.
            loss: float32 (n,), f at `weights` on them.
            gradient: float32 (K, n), E_p a_k with p the pool at `weights`.
            weights: the new λ'.
        """
        likely_margins, last = self._terms[:-1, here, :-1], self._terms[:, here, -1]
        chances = (_combine(likely_margins.flatten(1), weights).view(likely_margins.shape[1:]) - loss[:, None]).exp_()
        rest = 1 - chances.sum(-1)
        mean = (gradient - torch.einsum("knm,nm->kn", likely_margins, chances)) / rest
        new_terms = torch.cat((mean, _constant(mean, rest, loss, weights)[None]))
        self._terms[:, here, -1] = torch.where(rest > _LEAST, new_terms, last)

    @property
    def order(self) -> Tensor:
        """int64 (n,), the positions in the order of addition."""
        return self._order[: self._count]

    def expand(self, weights: np.ndarray) -> Expansion:
        """Value, gradient and Hessian of the mean at `weights`."""
        share = max(1, 2**16 // self._terms[0, 0].numel())
        expansion = expand(self._terms[:, : self._count].split(share, dim=1), np.append(weights, 1.0))
        return Expansion(expansion.value, expansion.gradient[:-1], expansion.hessian[:-1, :-1])


def _likely(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Logits (b, count) of likely tokens among (b, V), and their ids: the best of each of `count` groups of ids. These
    are close to the best `count` of all, which take six times as long to find. Any choice gives a valid bound."""
    groups = pad(logits, (0, -logits.shape[1] % count), value=-torch.inf).view(len(logits), -1, count)
    best = groups.amax(1)
    number = torch.arange(groups.shape[1], dtype=torch.int16, device=best.device)[:, None]
    row = ((groups == best[:, None]) * number).amax(1).long()  # an argmax takes six times as long
    row.masked_fill_(best.isneginf(), 0)  # if all of a group are impossible, do not choose the padding
    return best, row * count + torch.arange(count, device=row.device)


def _combine(values: Tensor, weights: np.ndarray) -> Tensor:
    """Σ_k λ_k values_k, (K, n) -> (n,)."""
    return torch.from_numpy(weights).to(values) @ values


def _constant(mean: Tensor, rest: Tensor, loss: Tensor, weights: np.ndarray) -> Tensor:
    """The constant c (see the module) of unlikely tokens with mass `rest` in the pool and mean margins `mean`; `loss`
    is log Σ_v exp(λ'·a)."""
    return (rest.log() + loss - _combine(mean, weights)).clamp_min(NOTHING)
