"""exact: the global minimum of PackLLM's Eq. 3 with a certificate; map: the same with a prior (METHODS §3).

The loss f(λ) = mean_i [logsumexp_v Σ_k λ_k s_k(v) − Σ_k λ_k s_k(x_i)] is convex. One pass over the logits, which
also gives the members' own scores, builds a compact lower bound of it (see minorant.py), block by block and each
at the minimiser of what came before. A second pass evaluates f at the minimiser λ of the whole bound and makes the
bound touch f there, at the positions where it is loosest; f(λ) less the new minimum of the bound is the certificate.
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
"""The search ends when the optimum is certified to be at most this far below, in nats per token."""

LEFT = GAP / 4
"""How far below the loss the bound may stay on average at the positions where it is not made to touch."""

ROUNDS, PASSES = 3, 20
"""Most times that the bound is made to touch the loss, and after that most passes of Newton's method on the loss
itself; a gap that is then above GAP is reported as it is."""

FIRST = 32
"""Positions read at uniform weights, before the first minimiser of the bound."""

_NOISE = 1e-6  # nats: what float32 rounding may raise a loss by; a step that raises it no more is progress
_INNER = GAP / 10, 50  # tolerance and passes of a minimisation of the bound, which costs milliseconds
_FLOOR = 1e-9  # least weight under a prior, whose gradient is infinite at 0


Expand = Callable[[np.ndarray], Expansion]


def solve(problem: Problem, options: Options) -> Solution:
    """The minimum of f over the simplex; `gap` bounds fused_nll − min f."""
    found = _search(problem, "exact", prior=0.0)
    return simple.uniform(problem, options) if found is None else guarded(problem, *found)


def solve_map(problem: Problem, options: Options) -> Solution:
    """The minimum of f(λ) + (β/t) KL(λ ‖ uniform), whose gap is reported; fused_nll is f alone, unguarded."""
    found = _search(problem, "map", options.beta / problem.scored)
    if found is None:
        return simple.uniform(problem, options)
    members, weights, loss, gap = found
    values = np.zeros(len(problem.names))
    values[members] = weights
    return Solution(tuple(values.tolist()), loss, gap)


def _search(problem: Problem, name: str, prior: float) -> tuple[list[int], list[float], float, float] | None:
    """The usable members, their weights, mean loss, and the gap of the (regularised) objective on all positions."""
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
    """Read all logits once: tells the problem the members' scores, gives the bound and its minimiser."""
    everyone = len(members) == len(problem.names)
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
        seen = len(bound.order)
        if seen == total:
            if everyone:
                problem.told(scores.cpu().double())
            return bound, minimise(bound.expand, weights, prior, _FLOOR if prior else 0.0, *_INNER)[0]
        if seen >= next_stop:  # the only reads from the device: O(log t)
            next_stop = seen + seen // 2
            if everyone:
                problem.check(scores[:, bound.order])
            # A prior worth one position keeps few positions from deciding against a member.
            weights = minimise(bound.expand, weights, max(prior, 1 / seen), _FLOOR, 10 * GAP, 20)[0]
    raise AssertionError("the source gave fewer positions than it has")


def _stages(total: int) -> Iterator[Tensor]:
    """0..total-1 in parts spread evenly over the text, each twice as large as the one before it."""
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
    """The bound, made to touch the loss at `weights` (where it is loosest, or everywhere), and the mean loss there."""
    if isinstance(source, SharedHeadSource):
        start, total = 0, torch.zeros((), dtype=torch.float64, device=bound.order.device)
        for loss, gradient in source.losses(weights, bound.order.cpu(), targets, members):
            rows = _loosest(loss - bound.losses(slice(start, start + len(loss)), weights))
            bound.touch(start + rows, loss[rows], gradient(rows), weights)
            total += loss.double().sum()
            start += len(loss)
        return bound, float(total) / start
    fresh: Minorant | None = None
    for part, block in source.blocks(torch.arange(len(targets)), members):
        if fresh is None:
            fresh = Minorant((len(members), len(targets), block.shape[2]), block.device)
        fresh.add(part.to(block.device), block, chosen(block, targets[part]), weights)
    assert fresh is not None
    return fresh, fresh.expand(weights).value


def _loosest(slack: Tensor) -> Tensor:
    """The fewest positions without which the bound is LEFT below the loss: a gradient costs as much as a loss."""
    ordered, rows = slack.sort(descending=True)
    if slack.device.type != "cpu":  # a GPU would have to wait for the count; half has been enough
        return rows[: (len(rows) + 1) // 2]
    left = ordered.sum() - ordered.cumsum(0)
    return rows[: 1 + int((left > LEFT * len(rows)).sum())]


def _divergence(weights: np.ndarray) -> float:
    """KL(λ ‖ uniform)."""
    held = weights[weights > 0]
    return float(held @ np.log(held * len(weights)))


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
