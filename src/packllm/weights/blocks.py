"""Shared by the log-pool optimisers: margins in blocks, grid search, and the guard against a worse fusion (METHODS
§3)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from packllm.weights.problem import LogitSource, Problem, Solution

STEPS = 20
"""Steps of a grid from 0 to 1: 1/20 = 0.05 each (PackLLM Algorithm 1, line 10)."""

TIE = 1e-6
"""Losses closer than this, in nats per token, count as equal: float32 logits cannot distinguish them."""

WORKSPACE = 2**20
"""Upper bound of the floats in one working tensor: it fits a CPU's cache, and still keeps a GPU busy."""

NOTHING = -1e4
"""Margin of a row without mass: its exp() is exactly 0, and its square finite."""


def usable(problem: Problem) -> list[int]:
    """The members that give every observed token a probability above 0, lowest NLL first, the earlier among equals.

    Any other member with weight makes the log pool's NLL of the prompt infinite.
    """
    finite = problem.logprobs.isfinite().all(dim=1).tolist()
    return sorted((k for k, is_finite in enumerate(finite) if is_finite), key=problem.nll.tolist().__getitem__)


def margins(source: LogitSource, targets: Tensor, members: Sequence[int], positions: Tensor) -> Iterator[Tensor]:
    """Margins: the logits of these members minus each member's logit of the observed token.

    With margins a, the pool's loss at a position is logsumexp_v Σ_k λ_k a_k(v) for λ on the simplex, its gradient
    E_p a_k, and its Hessian Cov_p(a_k, a_l) (METHODS §3). Margins are small numbers, which keeps float32 moments exact.
    A token that is −inf for any of the members has no mass in the pool.

    Args:
        source: the source of the logits.
        targets: int64 (t,), the observed tokens.
        members: indices of members, in the order of the result; all must be `usable`.
        positions: int64, ascending, from 0..t-1.

    Yields:
        float32 (len(members), b, V), newly allocated; together they cover `positions` in order.
    """
    share = max(1, WORKSPACE // (len(members) * source.shape[2]))
    for part, block in source.blocks(positions, members):
        holes = not bool(block.amin() > -math.inf)  # masking costs a third of a pass; only done if needed
        for rows, logits in zip(part.split(share), block.split(share, dim=1), strict=True):
            observed = targets[rows.to(targets.device)].to(block.device)[:, None]
            margin = logits - logits.gather(-1, observed.expand(len(members), -1, -1))
            yield margin.masked_fill_(margin.amin(dim=0) == -math.inf, NOTHING) if holes else margin


def pool(block: Tensor, weights: np.ndarray) -> Tensor:
    """Σ_k λ_k s_k of logits (K, b, V): float32 (b, V); −inf where any member has −inf, whatever its weight."""
    scale = torch.from_numpy(weights).to(block).clamp_min(1e-30)  # 0 · −inf would be NaN
    return (scale @ block.flatten(1)).view(block.shape[1:])


def grid_losses(points: Tensor, margin: Tensor) -> Tensor:
    """The summed loss of each of P weight vectors on one block of margins: float64 (P,) on the CPU.

    Args:
        points: float32 (P, K) on the margins' device, rows on the simplex.
        margin: float32 (K, b, V).
    """
    members, positions, vocabulary = margin.shape
    flat = margin.reshape(members, -1)
    share = max(1, WORKSPACE // (positions * vocabulary))
    losses = [(chunk @ flat).view(-1, positions, vocabulary).logsumexp(-1) for chunk in points.split(share)]
    return torch.cat(losses).cpu().double().sum(dim=1)


def grid_search(problem: Problem, name: str, members: Sequence[int], points: Tensor) -> tuple[int, float]:
    """The first point with the lowest loss (up to TIE), and its mean loss in nats per token; one pass over the logits.

    Args:
        points: float64 (P, len(members)), rows on the simplex, preferred points first.
    """
    source, targets = problem.logits(name)
    total = torch.zeros(len(points), dtype=torch.float64)
    for margin in margins(source, targets, members, torch.arange(len(targets))):
        total += grid_losses(points.to(margin), margin)
    losses = total / len(targets)
    first = int((losses <= losses.min() + TIE).nonzero()[0, 0])
    return first, float(losses[first])


@dataclass(frozen=True)
class Expansion:
    """Value, gradient (K,) and Hessian (K, K) of an objective at one λ, float64."""

    value: float
    gradient: np.ndarray
    hessian: np.ndarray


def expand(blocks: Iterable[Tensor], weights: np.ndarray) -> Expansion:
    """The objective at `weights` from margins (K, b, V). With p the pool: E_p a_k and Cov_p(a_k, a_l), averaged over
    positions."""
    members, count, sums = len(weights), 0, torch.zeros(())
    for margin in blocks:
        flat = margin.flatten(1)
        fused = (torch.from_numpy(weights).to(margin) @ flat).view(margin.shape[1:])
        loss = fused.logsumexp(dim=-1, keepdim=True)
        weighted = margin * fused.sub_(loss).exp_()
        mean = weighted.sum(dim=-1).double()
        moments = (weighted.flatten(1) @ flat.T).double() - mean @ mean.T
        # One small running sum: small tensors kept from each block would fragment the heap between the large ones.
        sums = sums.to(moments) + torch.cat((loss.double().sum()[None], mean.sum(dim=1), moments.flatten()))
        count += margin.shape[1]
    means = (sums / count).cpu().numpy()  # the only transfer from the device in this pass
    return Expansion(float(means[0]), means[1 : members + 1], means[members + 1 :].reshape(members, members))


def guarded(
    problem: Problem, members: Sequence[int], weights: Sequence[float], fused_nll: float, gap: float | None = None
) -> Solution:
    """These weights of `members`, or the best single member if it has a lower NLL.

    Args:
        fused_nll: mean loss under `weights`, in nats per token.
        gap: upper bound of `fused_nll` minus the optimum, if known.
    """
    nll = (-problem.logprobs.mean(dim=1)).tolist()
    best = min(members, key=nll.__getitem__)
    if nll[best] < fused_nll:
        members, weights = [best], [1.0]
        # The optimum is at most `gap` below the loss that is replaced here, so it is closer to the new one.
        gap = None if gap is None else max(0.0, gap - (fused_nll - nll[best]))
        fused_nll = nll[best]
    weight = dict(zip(members, weights, strict=True))
    return Solution(tuple(float(weight.get(k, 0.0)) for k in range(len(problem.names))), fused_nll, gap)
