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
        logprobs: (K, t) log-probabilities that the members gave to what occurred (tokens or words).
            A column that every member gives probability 0 says nothing and is skipped.
        alpha: s, strength of the Dirichlet prior in observed tokens, where `strength` is None; 0 is maximum likelihood.
        prior: (K,), π: what each member is worth before anything is seen; sums to 1. None: uniform.
        strength: s in observed tokens; "prompt": as many as there are, so that prompt and prior count alike.

    Returns:
        K weights; the prior where there is nothing to learn from.

    Raises:
        WeightsError: a prior of another length, with a negative weight, or of a sum other than 1.
    """
    given = np.asarray(logprobs, dtype=np.float64)
    members = given.shape[0]
    pi = np.full(members, 1.0 / members) if prior is None else np.asarray(prior, dtype=np.float64)
    if pi.shape != (members,) or not (pi >= 0).all() or not np.isclose(pi.sum(), 1.0, atol=1e-6):
        raise WeightsError(f"prior={prior!r} must be {members} weights, none negative, that sum to 1")
    return maximise(given, pi, alpha if strength is None else strength)[0]


def maximise(
    logprobs: np.ndarray,
    pi: np.ndarray,
    strength: float | Literal["prompt"],
    tolerance: float = 1e-9,
    rounds: int = 2000,
) -> tuple[tuple[float, ...], float | None]:
    """As em(), of checked arguments, with the fused NLL per column; None where nothing was seen."""
    values = pi.copy()
    best = logprobs.max(axis=0, initial=-np.inf)
    seen = np.isfinite(best)
    if len(values) == 1 or not seen.any():
        return tuple(values.tolist()), None
    # Scaling a column by its largest probability cancels in the responsibilities and keeps exp() in range.
    scaled = np.exp(logprobs[:, seen] - best[seen])
    prior = pi * (scaled.shape[1] if strength == "prompt" else strength)
    total, felt = scaled.shape[1] + prior.sum(), prior > 0
    values = (values + 1 / len(values)) / 2  # a member that starts at 0 would stay there

    def update(at: np.ndarray) -> np.ndarray:
        return (at * (scaled @ (1.0 / (at @ scaled))) + prior) / total

    def objective(at: np.ndarray) -> float:
        return float(np.log(at @ scaled).sum() + prior[felt] @ np.log(at[felt]))

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
    values, fused_nll = maximise(problem.logprobs.numpy(), *prior_of(options, problem.names))
    return Solution(values, fused_nll=fused_nll)


def prior_of(options: Options, names: Sequence[str]) -> tuple[np.ndarray, float | Literal["prompt"]]:
    """The prior of these members, which may be those of a pack that are left, and its strength."""
    if options.prior is None:
        return np.full(len(names), 1.0 / len(names)), options.alpha
    if isinstance(options.prior, str):
        raise WeightsError(f"prior={options.prior!r} is a file, which names the members of a pack; give a mapping")
    pi = np.array([options.prior.get(name, 0.0) for name in names])
    return pi / pi.sum() if pi.sum() > 0 else np.full(len(names), 1.0 / len(names)), options.prior_strength
