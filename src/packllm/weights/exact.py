"""exact: the global minimum of PackLLM's Eq. 3 with a certificate; map: the same with a prior (METHODS §3).

The loss f(λ) = mean_i [logsumexp_v Σ_k λ_k s_k(v) − Σ_k λ_k s_k(x_i)] is convex. Newton steps on the simplex
run first on a sample of positions whose margins are kept, which costs little and ends near the optimum; a
few passes over all positions (two, typically) finish and certify.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import numpy as np
import torch

from packllm.options import Options
from packllm.weights import simple
from packllm.weights.blocks import Expansion, expand, guarded, margins, usable
from packllm.weights.problem import Problem, Solution

GAP = 1e-4
"""The search ends when the optimum is certified to be at most this far below, in nats per token."""

SAMPLE_PASSES, PASSES = 100, 20
"""Most evaluations on the sample and on all positions; a gap that is then above GAP is reported as it is."""

SAMPLE_POSITIONS, SAMPLE_BYTES = 128, 64 * 2**20
"""Limits on the sample of positions whose margins are kept."""

_NOISE = 1e-6  # nats: what float32 rounding may raise a loss by; a step that raises it no more is progress
_FLOOR = 1e-9  # least weight under a prior, whose gradient is infinite at 0


Expand = Callable[[np.ndarray], Expansion]


def solve(problem: Problem, options: Options) -> Solution:
    """The minimum of f over the simplex; `gap` bounds fused_nll − min f."""
    problem.logits("exact")
    members = usable(problem)
    if not members:
        return simple.uniform(problem, options)
    weights, loss, gap = _search(problem, "exact", members, prior=0.0)
    return guarded(problem, members, weights.tolist(), loss, gap)


def solve_map(problem: Problem, options: Options) -> Solution:
    """The minimum of f(λ) + (β/t) KL(λ ‖ uniform), whose gap is reported; fused_nll is f alone, unguarded."""
    _, targets = problem.logits("map")
    members = usable(problem)
    if not members:
        return simple.uniform(problem, options)
    weights, loss, gap = _search(problem, "map", members, prior=options.beta / len(targets))
    values = np.zeros(len(problem.names))
    values[members] = weights
    return Solution(tuple(values.tolist()), loss, gap)


def _search(problem: Problem, name: str, members: list[int], prior: float) -> tuple[np.ndarray, float, float]:
    """Weights of `members`, their mean loss, and the gap of the (regularised) objective on all positions."""
    source, targets = problem.logits(name)
    total = len(targets)
    count = min(total, SAMPLE_POSITIONS, max(1, SAMPLE_BYTES // (4 * len(members) * source.shape[2])))
    sample = torch.arange(count) * total // count
    kept = list(margins(source, targets, members, sample))
    uniform = np.full(len(members), 1.0 / len(members))
    floor = _FLOOR if prior else 0.0
    weights, loss, gap = minimise(lambda at: expand(kept, at), uniform, prior, floor, GAP, SAMPLE_PASSES)
    if count == total:
        return weights, loss, gap
    rest = torch.ones(total, dtype=torch.bool)
    rest[sample] = False
    others = rest.nonzero()[:, 0]

    def everywhere(at: np.ndarray) -> Expansion:
        return expand(chain(kept, margins(source, targets, members, others)), at)

    return minimise(everywhere, weights, prior, floor, GAP, PASSES)


def minimise(
    objective: Expand, start: np.ndarray, prior: float, floor: float, tolerance: float, passes: int
) -> tuple[np.ndarray, float, float]:
    """Newton's method on the simplex for objective(λ) + prior · KL(λ ‖ uniform), both convex.

    Returns:
        λ; the objective there, without the prior's term; the Frank-Wolfe gap ∇·λ − min_k ∇_k of the sum,
        by convexity an upper bound on its distance to the minimum.
    """
    weights = target = trial = start
    loss = gap = value = bound = np.inf
    slope, step = 0.0, 1.0
    for _ in range(passes):
        there = objective(trial)
        whole = _regularised(there, trial, prior)
        reached = max(0.0, float(whole.gradient @ trial - whole.gradient.min()))
        if whole.value <= bound or reached <= tolerance:
            weights, loss, gap = trial, there.value, reached
            if gap <= tolerance:
                break
            value, step = whole.value, 1.0
            target = _newton_point(there, weights, prior, floor)
            slope = float(whole.gradient @ (target - weights))
        else:
            step /= 2
        trial = weights + step * (target - weights)
        bound = value + 0.1 * step * slope + _NOISE
    return weights, loss, gap


def _regularised(at: Expansion, weights: np.ndarray, prior: float) -> Expansion:
    if not prior:
        return at
    relative = np.log(weights * len(weights))
    return Expansion(
        at.value + prior * float(weights @ relative),
        at.gradient + prior * (relative + 1),
        at.hessian + np.diag(prior / weights),
    )


def _newton_point(at: Expansion, weights: np.ndarray, prior: float, floor: float) -> np.ndarray:
    """The minimum of the quadratic model plus the prior's term, which is far from quadratic near 0 and so is
    kept whole: it costs no pass over logits."""
    if not prior:
        target = np.maximum(simplex_qp(at.gradient, at.hessian, weights), floor)
        return target / target.sum()

    def model(trial: np.ndarray) -> Expansion:
        moved = trial - weights
        bent = at.hessian @ moved
        quadratic = Expansion(at.value + moved @ (at.gradient + bent / 2), at.gradient + bent, at.hessian)
        return _regularised(quadratic, trial, prior)

    return minimise(model, weights, prior=0.0, floor=floor, tolerance=GAP / 1000, passes=200)[0]


def simplex_qp(gradient: np.ndarray, hessian: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The y on the simplex that minimises gradient·(y − start) + (y − start)ᵀ hessian (y − start) / 2.

    Primal active set: solve for the free coordinates, drop those that hit 0 on the way there, free the one
    with the most negative multiplier. K is small, so each solve is a few microseconds.
    """
    members = len(start)
    # Members that do not differ, and float32 moments, give curvatures of 0 and just below: the floor keeps the
    # programme convex, its solution a descent direction, and picks the nearest of equal points.
    curvatures, axes = np.linalg.eigh(hessian)
    curved = (axes * np.maximum(curvatures, 1e-9 + 1e-7 * curvatures[-1])) @ axes.T
    linear = gradient - curved @ start
    at, free = start.copy(), start > 0
    for _ in range(50 * members):
        size = int(free.sum())
        system = np.ones((size + 1, size + 1))
        system[:size, :size], system[size, size] = curved[np.ix_(free, free)], 0.0
        solved = np.linalg.solve(system, np.append(-linear[free], 1.0))
        goal = np.zeros(members)
        goal[free] = solved[:size]
        falling = free & (goal < 0)
        if falling.any():
            share = np.full(members, np.inf)
            share[falling] = at[falling] / (at[falling] - goal[falling])
            first = int(share.argmin())
            at = at + share[first] * (goal - at)
            at[first], free[first] = 0.0, False
            continue
        at = goal
        multipliers = np.where(free, 0.0, curved @ at + linear + solved[size])
        if multipliers.min() >= -1e-12:
            break
        free[int(multipliers.argmin())] = True
    return np.maximum(at, 0.0)
