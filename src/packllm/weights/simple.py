"""Weightings that need no optimiser: uniform, top1, sim (PackLLM Eq. 4)."""

from __future__ import annotations

import torch

from packllm.options import Options
from packllm.weights.problem import Problem, Solution


def uniform(problem: Problem, options: Options) -> Solution:
    """λ_k = 1/K: the ensemble baseline."""
    members = len(problem.names)
    return Solution((1.0 / members,) * members)


def top1(problem: Problem, options: Options) -> Solution:
    """All weight on the lowest NLL; ties go to the earlier member."""
    best = int(problem.nll.argmin())
    return Solution(tuple(float(k == best) for k in range(len(problem.names))))


def sim(problem: Problem, options: Options) -> Solution:
    """PackLLM_sim, Eq. 4: λ = softmax(−NLL / τ)."""
    return Solution(tuple(torch.softmax(-problem.nll / options.tau, dim=0).tolist()))
