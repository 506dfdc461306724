"""dexperts: weights (1, α, −α) on base, expert and anti-expert (Liu et al. 2021, PackLLM arXiv 2404.11531, Eq. 9).
α is an option; dexperts-opt chooses it on the prompt."""

from __future__ import annotations

import torch

from packllm.errors import WeightsError
from packllm.options import Options
from packllm.weights.blocks import STEPS, grid_search, usable
from packllm.weights.problem import Problem, Solution


def solve(problem: Problem, options: Options) -> Solution:
    """Weights (1, α, −α) on the members in order: base, expert, anti-expert.

    Raises:
        WeightsError: not exactly three members.
    """
    _check(problem)
    return Solution((1.0, options.alpha, -options.alpha))


def _check(problem: Problem) -> None:
    if len(problem.names) != 3:
        raise WeightsError(
            f"weighting='dexperts' takes exactly 3 members in the order base, expert, anti-expert; "
            f"got {len(problem.names)}: {', '.join(problem.names)}"
        )


def solve_opt(problem: Problem, options: Options) -> Solution:
    """Weights (1, α, −α) with the α of {0, .05, ..., 1} that has the lowest NLL of the prompt, the smallest among
    equals."""
    _check(problem)
    if len(usable(problem)) < 3:
        problem.logits("dexperts-opt")
        return Solution((1.0, 0.0, 0.0), -float(problem.logprobs[0].mean()))
    strength = torch.arange(STEPS + 1, dtype=torch.float64) / STEPS
    points = torch.stack((torch.ones_like(strength), strength, -strength), dim=1)
    chosen, loss = grid_search(problem, "dexperts-opt", range(3), points)
    return Solution(tuple(points[chosen].tolist()), loss)
