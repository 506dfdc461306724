"""opt: PackLLM's greedy perplexity minimisation, arXiv 2404.11531, Eq. 5-7 and Algorithm 1."""

from __future__ import annotations

import torch

from packllm.options import Options
from packllm.weights import simple
from packllm.weights.blocks import STEPS, grid_search, guarded, usable
from packllm.weights.problem import Problem, Solution


def solve(problem: Problem, options: Options) -> Solution:
    """Fold in one member after the other, best first, each with the λ of {0, .05, ..., 1} that gives the lowest NLL.

    λ is the share of the members folded in before, and 1 − λ that of the next one. The larger λ wins among equal
    losses; λ = 1 ends the folding. Each member takes one pass over the logits, so there are at most K − 1.
    """
    problem.logits("opt")
    members = usable(problem)
    if not members:
        return simple.uniform(problem, options)
    grid = torch.arange(STEPS, -1, -1, dtype=torch.float64) / STEPS  # larger λ first: grid_search prefers it
    weights = torch.ones(1, dtype=torch.float64)
    fused_nll = -float(problem.logprobs[members[0]].mean())
    for folded in range(1, len(members)):
        points = torch.cat((grid[:, None] * weights, 1 - grid[:, None]), dim=1)
        chosen, loss = grid_search(problem, "opt", members[: folded + 1], points)
        if grid[chosen] == 1:
            break
        weights, fused_nll = points[chosen], loss
    return guarded(problem, members[: len(weights)], weights.tolist(), fused_nll)
