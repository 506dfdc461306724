"""dexperts: fixed weights on base, expert and anti-expert (Liu et al. 2021, PackLLM arXiv 2404.11531, Eq. 9)."""

from __future__ import annotations

from packllm.errors import WeightsError
from packllm.options import Options
from packllm.weights.problem import Problem, Solution


def solve(problem: Problem, options: Options) -> Solution:
    """Weights (1, α, −α) on the members in order: base, expert, anti-expert.

    Raises:
        WeightsError: not exactly three members.
    """
    if len(problem.names) != 3:
        raise WeightsError(
            f"weighting='dexperts' takes exactly 3 members in the order base, expert, anti-expert; "
            f"got {len(problem.names)}: {', '.join(problem.names)}"
        )
    return Solution((1.0, options.alpha, -options.alpha))
