"""exact: the global minimum of PackLLM's Eq. 3 with a certificate; map: the same with a prior (METHODS §3).

The loss f(λ) = mean_i [logsumexp_v Σ_k λ_k s_k(v) − Σ_k λ_k s_k(x_i)] is convex. A first pass over the logits builds a
compact lower bound of it (see minorant.py), each block at the minimiser of the blocks before; it also computes the
members' own scores. A second pass evaluates f at the minimiser λ of the complete bound, and tightens the bound there,
at the positions where it is loosest. f(λ) minus the new minimum of the bound is the certificate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from packllm.options import Options
from packllm.weights import simple
from packllm.weights.blocks import NOTHING, Expansion, expand, guarded, margins, usable
from packllm.weights.minorant import Minorant
from packllm.weights.problem import LogitSource, Problem, SharedHeadSource, Solution, chosen, normalisers

GAP = 1e-4
"""The search ends when f is certified to be at most this far above the optimum, in nats per token."""

LEFT = GAP / 4
"""Mean distance that the bound may keep from the loss at the positions where it is not tightened."""

ROUNDS, PASSES = 3, 20
"""ROUNDS: how often the bound is tightened, at most. PASSES: how many passes of Newton's method on the loss itself may
follow. If the gap is still above GAP then, it is reported as it is."""

FIRST = 32
"""Positions read at uniform weights before the bound is first minimised."""

_NOISE = 1e-6  # nats: float32 rounding may raise a loss by this much, so a step that does still counts as progress
_INNER = GAP / 10, 50  # tolerance and passes when the bound is minimised, which takes milliseconds
_FLOOR = 1e-9  # smallest weight under a prior, whose gradient is infinite at 0


Expand = Callable[[np.ndarray], Expansion]


def solve(problem: Problem, options: Options) -> Solution:
    """Minimise f over the simplex; `gap` is an upper bound of fused_nll − min f."""
    result = _search(problem, "exact", prior=0.0)
    return simple.uniform(problem, options) if result is None else guarded(problem, *result)


def solve_map(problem: Problem, options: Options) -> Solution:
    """Minimise f(λ) + (β/t) KL(λ ‖ uniform); `gap` is that of this objective. fused_nll is f alone; there is no guard
    against a better single member."""
    result = _search(problem, "map", options.beta / problem.scored)
    if result is None:
        return simple.uniform(problem, options)
    members, weights, loss, gap = result
    values = np.zeros(len(problem.names))
    values[members] = weights
    return Solution(tuple(values.tolist()), loss, gap)


def _search(problem: Problem, name: str, prior: float) -> tuple[list[int], list[float], float, float] | None:
    """The usable members, their weights, the mean loss, and the gap of the (regularised) objective."""
    source, targets = problem.logits(name)
    members = list(range(len(problem.names)))
    bound, weights = _sweep(problem, source, targets, members, prior)
    if len(usable(problem)) < len(members):
        members = usable(problem)
        if not members:
            return None
        bound, weights = _sweep(problem, source, targets, members, prior)
    if len(members) == 1:
        return members, [1.0], -float(problem.logprobs[members[0]].mean()), 0.0
    floor = _FLOOR if prior else 0.0
    for _ in range(ROUNDS):
        bound, loss = _touch(bound, source, targets, members, weights)
        lowest, least, slack = minimise(bound.expand, weights, prior, floor, *_INNER)
        gap = loss - least + slack + prior * (_divergence(weights) - _divergence(lowest))
        if gap <= GAP:
            return members, weights.tolist(), loss, max(0.0, gap)
        weights = lowest
    everywhere = torch.arange(len(targets))
    weights, loss, gap = minimise(
        lambda at: expand(margins(source, targets, members, everywhere), at), weights, prior, floor, GAP, PASSES
    )
    return members, weights.tolist(), loss, gap


def _sweep(
    problem: Problem, source: LogitSource, targets: Tensor, members: list[int], prior: float
) -> tuple[Minorant, np.ndarray]:
    """Read all logits once: compute the members' scores, the bound, and its minimiser."""
    all_members = len(members) == len(problem.names)
    total = len(targets)
    weights = np.full(len(members), 1.0 / len(members))
    bound: Minorant | None = None
    next_stop = FIRST
    for part, block in chain.from_iterable(source.blocks(stage, members) for stage in _stages(total)):
        if bound is None:
            bound = Minorant((len(members), total, block.shape[2]), block.device)
            scores = torch.empty(len(members), total, device=block.device)
        at = part.to(block.device)
        observed = chosen(block, targets[part])
        scores[:, at] = observed - normalisers(block)
        bound.add(at, block, observed.clamp_min(NOTHING), weights)
        count = len(bound.order)
        if count == total:
            if all_members:
                problem.provide_logprobs(scores.cpu().double())
            return bound, minimise(bound.expand, weights, prior, _FLOOR if prior else 0.0, *_INNER)[0]
        if count >= next_stop:  # the only transfers from the device: O(log t)
            next_stop = count + count // 2
            if all_members:
                problem.check(scores[:, bound.order])
                # A prior worth one position: a few positions must not exclude a member.
            weights = minimise(bound.expand, weights, max(prior, 1 / count), _FLOOR, 10 * GAP, 20)[0]
    raise AssertionError("the source gave fewer positions than it has")


def _stages(total: int) -> Iterator[Tensor]:
    """0..total-1 in parts that are spread evenly over the text; each part is about as large as all before it."""
    step = 1
    while total // (2 * step) >= FIRST:
        step *= 2
    yield torch.arange(0, total, step)
    while step > 1:
        yield torch.arange(step // 2, total, step)
        step //= 2


def _touch(
    bound: Minorant, source: LogitSource, targets: Tensor, members: list[int], weights: np.ndarray
) -> tuple[Minorant, float]:
    """Tighten the bound at `weights`, where it is loosest or everywhere; return it and the mean loss."""
    if isinstance(source, SharedHeadSource):
        start, total = 0, torch.zeros((), dtype=torch.float64, device=bound.order.device)
        for loss, gradient in source.losses(weights, bound.order.cpu(), targets, members):
            rows = _loosest(loss - bound.losses(slice(start, start + len(loss)), weights))
            bound.touch(start + rows, loss[rows], gradient(rows), weights)
            total += loss.double().sum()
            start += len(loss)
        return bound, float(total) / start
    new_bound: Minorant | None = None
    for part, block in source.blocks(torch.arange(len(targets)), members):
        if new_bound is None:
            new_bound = Minorant((len(members), len(targets), block.shape[2]), block.device)
        new_bound.add(part.to(block.device), block, chosen(block, targets[part]), weights)
    assert new_bound is not None
    return new_bound, new_bound.expand(weights).value


def _loosest(slack: Tensor) -> Tensor:
    """The fewest positions to tighten so that the bound is at most LEFT below the loss elsewhere; gradients cost as
    much as losses."""
    ordered, rows = slack.sort(descending=True)
    if slack.device.type != "cpu":  # avoids waiting for the GPU; half has always been enough
        return rows[: (len(rows) + 1) // 2]
    rest = ordered.sum() - ordered.cumsum(0)
    return rows[: 1 + int((rest > LEFT * len(rows)).sum())]


def _divergence(weights: np.ndarray) -> float:
    """KL(λ ‖ uniform)."""
    positive = weights[weights > 0]
    return float(positive @ np.log(positive * len(weights)))


def minimise(
    objective: Expand, start: np.ndarray, prior: float, floor: float, tolerance: float, passes: int
) -> tuple[np.ndarray, float, float]:
    """Newton's method on the simplex for objective(λ) + prior · KL(λ ‖ uniform), both convex.

    Returns:
        λ; the objective there, without the prior's term; and the Frank-Wolfe gap ∇·λ − min_k ∇_k of the sum, which by
        convexity is an upper bound of its distance to the minimum.
    """
    weights = target = trial = start
    loss = gap = value = bound = np.inf
    slope, step = 0.0, 1.0
    for _ in range(passes):
        expansion = objective(trial)
        regularised = _regularised(expansion, trial, prior)
        new_gap = max(0.0, float(regularised.gradient @ trial - regularised.gradient.min()))
        if regularised.value <= bound or new_gap <= tolerance:
            weights, loss, gap = trial, expansion.value, new_gap
            if gap <= tolerance:
                break
            value, step = regularised.value, 1.0
            target = _newton_point(expansion, weights, prior, floor)
            slope = float(regularised.gradient @ (target - weights))
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
    """The minimum of the quadratic model of the objective plus the prior's term. That term is far from quadratic near
    0, so it is not approximated; this needs no pass over the logits."""
    if not prior:
        target = np.maximum(simplex_qp(at.gradient, at.hessian, weights), floor)
        return target / target.sum()

    def model(trial: np.ndarray) -> Expansion:
        change = trial - weights
        curvature = at.hessian @ change
        quadratic = Expansion(at.value + change @ (at.gradient + curvature / 2), at.gradient + curvature, at.hessian)
        return _regularised(quadratic, trial, prior)

    return minimise(model, weights, prior=0.0, floor=floor, tolerance=GAP / 1000, passes=200)[0]


def simplex_qp(gradient: np.ndarray, hessian: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The y on the simplex that minimises gradient·(y − start) + (y − start)ᵀ hessian (y − start) / 2.

    Primal active-set method: solve for the free coordinates, fix those that reach 0 on the way, free the one with the
    most negative multiplier. K is small, so each solve takes a few microseconds.
    """
    members = len(start)
    # Equal members, and float32 moments, give curvatures of 0 or slightly below. The floor keeps the problem convex and
    # its solution a descent direction, and selects the nearest of equal points.
    curvatures, axes = np.linalg.eigh(hessian)
    convex = (axes * np.maximum(curvatures, 1e-9 + 1e-7 * curvatures[-1])) @ axes.T
    linear = gradient - convex @ start
    at, free = start.copy(), start > 0
    for _ in range(50 * members):
        size = int(free.sum())
        system = np.ones((size + 1, size + 1))
        system[:size, :size], system[size, size] = convex[np.ix_(free, free)], 0.0
        solution = np.linalg.solve(system, np.append(-linear[free], 1.0))
        goal = np.zeros(members)
        goal[free] = solution[:size]
        falling = free & (goal < 0)
        if falling.any():
            share = np.full(members, np.inf)
            share[falling] = at[falling] / (at[falling] - goal[falling])
            first = int(share.argmin())
            at = at + share[first] * (goal - at)
            at[first], free[first] = 0.0, False
            continue
        at = goal
        multipliers = np.where(free, 0.0, convex @ at + linear + solution[size])
        if multipliers.min() >= -1e-12:
            break
        free[int(multipliers.argmin())] = True
    return np.maximum(at, 0.0)
