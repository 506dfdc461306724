"""A compact lower bound of the log pool's loss, for `exact` and `map` (METHODS §3).

At a position, a_k(v) = s_k(v) − s_k(x) are the members' margins over the observed token x and

    f(λ) = log Σ_v exp(λ·a(v)) = log [Σ_{v likely} exp(λ·a(v)) + T(λ)],    T(λ) = Σ_{v unlikely} exp(λ·a(v)).

The few likely tokens are kept as they are. The many others are kept as one: with q the pool at λ', restricted to
them, and ā = E_q a, Jensen's inequality gives

    T(λ) = T(λ') E_q exp((λ − λ')·a) ≥ T(λ') exp((λ − λ')·ā) = exp(λ·ā + c),    c = log T(λ') − λ'·ā.

So the kept f is a log-sum-exp of some thousand terms, convex and nowhere above f, and touches it at λ' with value
and gradient. Each position has a λ' of its own. The mean over positions is minimised in milliseconds, and its
minimum bounds that of the loss from below.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from packllm.weights.blocks import NOTHING, Expansion, expand, pool

LIKELY = 1536
"""Most tokens kept of each position: on texts of some hundred tokens one evaluation of the loss certifies then."""

TERMS_BYTES = 48 * 2**20
"""Most bytes that the bound of a long text takes; it keeps fewer tokens then, but no fewer than LEAST_LIKELY."""

LEAST_LIKELY = 256

_LEAST = 1e-5  # mass of the unlikely tokens below which a difference of float32 numbers does not tell their mean


class Minorant:
    """The bound over the positions added so far.

    Args:
        shape: (K, t, V), members and positions to come.
        device: where the logits are.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        members, positions, vocabulary = shape
        room = TERMS_BYTES // (4 * (members + 1) * positions)
        likely = min(vocabulary, LIKELY, max(LEAST_LIKELY, room))
        # Terms of each position: K margins and a constant, which is 0 for a token and c for the rest, the last.
        self._terms = torch.zeros(members + 1, positions, likely + 1, device=device)
        self._order = torch.empty(positions, dtype=torch.int64, device=device)
        self._count = 0

    def add(self, part: Tensor, block: Tensor, observed: Tensor, weights: np.ndarray) -> None:
        """Touch the loss at `weights` on these positions.

        Args:
            part: int64 (b,) positions, none of them added before.
            block: float32 (K, b, V) logits; overwritten.
            observed: float32 (K, b), those of the observed tokens.
            weights: λ'.
        """
        here = slice(self._count, self._count + len(part))
        self._count = here.stop
        self._order[here] = part
        terms = self._terms[:, here]
        fused = pool(block, weights)
        holes = fused.device.type != "cpu" or bool(fused.amin() == -torch.inf)  # a GPU would have to wait for the look
        logits, likely = _likely(fused, terms.shape[2] - 1)
        peak = logits.amax(-1, keepdim=True)
        chances = fused.sub_(peak).exp_()  # each a share of `total`
        total = chances.sum(-1)
        loss = total.log() + peak[:, 0] - _combine(observed, weights)
        chances.scatter_(-1, likely, 0.0)
        if holes:
            block.clamp_(min=NOTHING)  # for 0 · −inf
        kept = block.gather(-1, likely.expand(len(block), -1, -1)) - observed[..., None]
        terms[:-1, :, :-1] = kept.masked_fill_(logits.isneginf(), NOTHING)  # also where a weight is 0
        rest = chances.sum(-1)
        mean = torch.bmm(block.transpose(0, 1), chances[..., None])[..., 0].T / rest.clamp_min(1e-30) - observed
        terms[:-1, :, -1], terms[-1, :, -1] = mean, _constant(mean, rest / total, loss, weights)

    def losses(self, here: slice, weights: np.ndarray) -> Tensor:
        """float32 (n,), the bound at `weights` on these positions.

        Args:
            here: positions, as indices into `order`.
        """
        terms = self._terms[:, here]
        return _combine(terms.flatten(1), np.append(weights, 1.0)).view(terms.shape[1:]).logsumexp(-1)

    def touch(self, here: Tensor, loss: Tensor, gradient: Tensor, weights: np.ndarray) -> None:
        """Touch the loss at other weights, with the same likely tokens.

        Args:
            here: int64 (n,) positions, as indices into `order`.
            loss: float32 (n,), f at `weights` on them.
            gradient: float32 (K, n), E_p a_k with p the pool there.
            weights: the new λ'.
        """
        kept, last = self._terms[:-1, here, :-1], self._terms[:, here, -1]
        chances = (_combine(kept.flatten(1), weights).view(kept.shape[1:]) - loss[:, None]).exp_()
        rest = 1 - chances.sum(-1)
        mean = (gradient - torch.einsum("knm,nm->kn", kept, chances)) / rest
        fresh = torch.cat((mean, _constant(mean, rest, loss, weights)[None]))
        self._terms[:, here, -1] = torch.where(rest > _LEAST, fresh, last)

    @property
    def order(self) -> Tensor:
        """int64 (n,), the positions in the order they were added."""
        return self._order[: self._count]

    def expand(self, weights: np.ndarray) -> Expansion:
        """Value, gradient and Hessian of the mean at `weights`."""
        share = max(1, 2**16 // self._terms[0, 0].numel())
        whole = expand(self._terms[:, : self._count].split(share, dim=1), np.append(weights, 1.0))
        return Expansion(whole.value, whole.gradient[:-1], whole.hessian[:-1, :-1])


def _likely(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Logits (b, count) of likely tokens among (b, V), and their ids: the best of each of `count` groups of ids. Near
    the best `count` of all, which take six times as long to find; any choice makes a bound."""
    groups = pad(logits, (0, -logits.shape[1] % count), value=-torch.inf).view(len(logits), -1, count)
    best = groups.amax(1)
    number = torch.arange(groups.shape[1], dtype=torch.int16, device=best.device)[:, None]
    row = ((groups == best[:, None]) * number).amax(1).long()  # an argmax takes six times as long
    row.masked_fill_(best.isneginf(), 0)  # where all are impossible, the padding is no better
    return best, row * count + torch.arange(count, device=row.device)


def _combine(values: Tensor, weights: np.ndarray) -> Tensor:
    """Σ_k λ_k values_k, (K, n) -> (n,)."""
    return torch.from_numpy(weights).to(values) @ values


def _constant(mean: Tensor, rest: Tensor, loss: Tensor, weights: np.ndarray) -> Tensor:
    """c of unlikely tokens with the pool's mass `rest` and margins `mean`, where log Σ_v exp(λ'·a) is `loss`."""
    return (rest.log() + loss - _combine(mean, weights)).clamp_min(NOTHING)
