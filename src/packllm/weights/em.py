"""em: maximum a posteriori weights of the linear pool (METHODS §3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from torch import Tensor

from packllm.errors import WeightsError
from packllm.options import Options
from packllm.weights.problem import Problem, Solution


def em(
    logprobs: Tensor | np.ndarray,
    *,
    alpha: float = 1.0,
    prior: Sequence[float] | np.ndarray | None = None,
    strength: float | Literal["prompt"] | None = None,
) -> tuple[float, ...]:
    """Weights that maximise Σ_i log Σ_k λ_k p_k(x_i) + s Σ_k π_k log λ_k over the simplex.

    Expectation-maximisation: r_ik ∝ λ_k p_k(x_i); λ_k = (Σ_i r_ik + s π_k) / (t + s). The objective is
    concave, so the fixed point is the global maximum.

    Args:
        logprobs: (K, t), the members' log-probabilities of the observed tokens or words. A column in which all are
            -infinity is skipped.
        alpha: s, strength of the Dirichlet prior in observed tokens, if `strength` is None; 0 is maximum likelihood.
        prior: π, (K,), the members' weights before anything is observed; sums to 1. None: uniform.
        strength: s in observed tokens; "prompt": the number of observed tokens, so that prompt and prior count alike.

    Returns:
        K weights; the prior if nothing is observed.

    Raises:
        WeightsError: a prior of another length, with a negative weight, or with a sum other than 1.
    """
    values = np.asarray(logprobs, dtype=np.float64)
    members = values.shape[0]
    pi = np.full(members, 1.0 / members) if prior is None else np.asarray(prior, dtype=np.float64)
    if pi.shape != (members,) or not (pi >= 0).all() or not np.isclose(pi.sum(), 1.0, atol=1e-6):
        raise WeightsError(f"prior={prior!r} must be {members} weights, none negative, that sum to 1")
    return maximise(values, pi, alpha if strength is None else strength)[0]


def maximise(
    logprobs: np.ndarray,
    pi: np.ndarray,
    strength: float | Literal["prompt"],
    tolerance: float = 1e-9,
    rounds: int = 2000,
) -> tuple[tuple[float, ...], float | None]:
    """As em(), with checked arguments: (weights, fused NLL per column), the NLL None if nothing is observed."""
    values = pi.copy()
    best = logprobs.max(axis=0, initial=-np.inf)
    observed = np.isfinite(best)
    if len(values) == 1 or not observed.any():
        return tuple(values.tolist()), None
    # Dividing a column by its largest probability cancels in the responsibilities, and exp() cannot underflow.
    scaled = np.exp(logprobs[:, observed] - best[observed])
    prior = pi * (scaled.shape[1] if strength == "prompt" else strength)
    total, has_prior = scaled.shape[1] + prior.sum(), prior > 0
    values = (values + 1 / len(values)) / 2  # a weight of 0 would never grow

    def update(at: np.ndarray) -> np.ndarray:
        return (at * (scaled @ (1.0 / (at @ scaled))) + prior) / total

    def objective(at: np.ndarray) -> float:
        return float(np.log(at @ scaled).sum() + prior[has_prior] @ np.log(at[has_prior]))

    for _ in range(rounds):
        first = update(values)
        second = update(first)
        if np.abs(second - first).max() < tolerance:
            values = second
            break
        # Plain updates are slow if members are similar. Two of them give a direction and a longer step
        # (SQUAREM, Varadhan & Roland 2008); a step that lowers the objective is rejected.
        change, curvature = first - values, second - 2 * first + values
        stretch = float(np.linalg.norm(change)) / max(float(np.linalg.norm(curvature)), 1e-300)
        leap = values + 2 * stretch * change + stretch**2 * curvature
        values = update(leap) if leap.min() > 0 and objective(leap) > objective(second) else second
    values /= values.sum()
    fused_nll = -float(np.mean(np.log(values @ scaled) + best[observed]))
    return tuple(values.tolist()), fused_nll


def solve(problem: Problem, options: Options) -> Solution:
    values, fused_nll = maximise(problem.logprobs.numpy(), *prior_of(options, problem.names))
    return Solution(values, fused_nll=fused_nll)


def prior_of(options: Options, names: Sequence[str]) -> tuple[np.ndarray, float | Literal["prompt"]]:
    """The prior of these members and its strength. Members of the pack may be missing; the rest is renormalised."""
    if options.prior is None:
        return np.full(len(names), 1.0 / len(names)), options.alpha
    if isinstance(options.prior, str):
        raise WeightsError(f"prior={options.prior!r} is a file, which only a pack can match to members; give a mapping")
    pi = np.array([options.prior.get(name, 0.0) for name in names])
    return pi / pi.sum() if pi.sum() > 0 else np.full(len(names), 1.0 / len(names)), options.prior_strength
