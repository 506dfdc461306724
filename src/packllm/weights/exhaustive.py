"""exhaustive: every point of a grid on the simplex, the reference of PackLLM's Table 4 (arXiv 2404.11531)."""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor

from packllm.errors import WeightsError
from packllm.options import Options
from packllm.weights import simple
from packllm.weights.blocks import STEPS, grid_search, guarded, usable
from packllm.weights.problem import Problem, Solution

MOST_POINTS = 10**5


def solve(problem: Problem, options: Options) -> Solution:
    """The grid point of step 0.05 with the lowest prompt NLL (Eq. 3); ties go to the better members.

    Raises:
        WeightsError: the grid has more than 10^5 points (K > 6).
    """
    problem.logits("exhaustive")
    count = math.comb(STEPS + len(problem.names) - 1, STEPS)
    if count > MOST_POINTS:
        raise WeightsError(
            f"weighting='exhaustive' with K={len(problem.names)} members means {count} grid points, more than "
            f"{MOST_POINTS}; use weighting='exact', which finds the optimum itself in a few passes"
        )
    members = usable(problem)
    if not members:
        return simple.uniform(problem, options)
    points = simplex_grid(len(members))
    chosen, loss = grid_search(problem, "exhaustive", members, points)
    return guarded(problem, members, points[chosen].tolist(), loss)


def simplex_grid(members: int) -> Tensor:
    """float64 (P, members): all weights that are multiples of 0.05, those with more weight in front first."""
    # Stars and bars: a point is a choice of the positions of K − 1 bars among 20 stars.
    bars = torch.tensor(list(combinations(range(STEPS + members - 1), members - 1)), dtype=torch.float64)
    ends = torch.full((len(bars), 1), STEPS + members - 1, dtype=torch.float64)
    stars = torch.diff(torch.cat((-torch.ones_like(ends), bars, ends), dim=1)) - 1
    return stars.flip(0) / STEPS
