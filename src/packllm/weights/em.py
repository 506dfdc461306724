"""em: maximum a posteriori weights of the linear pool (METHODS §3)."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from packllm.options import Options
from packllm.weights.problem import Problem, Solution


def em(logprobs: Tensor | np.ndarray, *, alpha: float = 1.0) -> tuple[float, ...]:
    """Weights that maximise Σ_i log Σ_k λ_k p_k(x_i) + (α/K) Σ_k log λ_k over the simplex.

    Expectation-maximisation: r_ik ∝ λ_k p_k(x_i); λ_k = (Σ_i r_ik + α/K) / (t + α). The objective is
    concave, so the fixed point is the global maximum.

    Args:
        logprobs: (K, t) log-probabilities that the members gave to what occurred (tokens or words).
            A column that every member gives probability 0 says nothing and is skipped.
        alpha: Dirichlet prior in observed tokens; 0 is maximum likelihood.

    Returns:
        K weights; uniform where there is nothing to learn from.
    """
    return _maximise(np.asarray(logprobs, dtype=np.float64), alpha)[0]


def _maximise(logprobs: np.ndarray, alpha: float, tolerance: float = 1e-9, rounds: int = 2000) -> tuple:
    members = logprobs.shape[0]
    values = np.full(members, 1.0 / members)
    best = logprobs.max(axis=0, initial=-np.inf)
    seen = np.isfinite(best)
    if members == 1 or not seen.any():
        return tuple(values.tolist()), None
    # Scaling a column by its largest probability cancels in the responsibilities and keeps exp() in range.
    scaled = np.exp(logprobs[:, seen] - best[seen])
    prior, total = alpha / members, scaled.shape[1] + alpha

    def update(at: np.ndarray) -> np.ndarray:
        return (at * (scaled @ (1.0 / (at @ scaled))) + prior) / total

    def objective(at: np.ndarray) -> float:
        return float(np.log(at @ scaled).sum() + (prior * np.log(at).sum() if prior else 0.0))

    for _ in range(rounds):
        once = update(values)
        twice = update(once)
        if np.abs(twice - once).max() < tolerance:
            values = twice
            break
        # Members that agree make plain updates crawl. Two of them tell the direction and how much longer the
        # step may be (SQUAREM, Varadhan & Roland 2008); a step that loses is not taken.
        moved, bent = once - values, twice - 2 * once + values
        stretch = float(np.linalg.norm(moved)) / max(float(np.linalg.norm(bent)), 1e-300)
        leap = values + 2 * stretch * moved + stretch**2 * bent
        values = update(leap) if leap.min() > 0 and objective(leap) > objective(twice) else twice
    values /= values.sum()
    fused_nll = -float(np.mean(np.log(values @ scaled) + best[seen]))
    return tuple(values.tolist()), fused_nll


def solve(problem: Problem, options: Options) -> Solution:
    values, fused_nll = _maximise(problem.logprobs.numpy(), options.alpha)
    return Solution(values, fused_nll=fused_nll)
