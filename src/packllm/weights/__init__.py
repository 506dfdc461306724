"""Weightings: they compute each member's weight for one prompt. Each has its own file; WEIGHTINGS lists them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from packllm.errors import OptionError, WeightsError
from packllm.options import Options, make_options
from packllm.weights import cbtm, dexperts, exact, exhaustive, opt, router, simple
from packllm.weights import em as _em
from packllm.weights.adaptive import Adaptive
from packllm.weights.calibrate import calibrate
from packllm.weights.em import em
from packllm.weights.problem import (
    LogitSource,
    Problem,
    Solution,
    TensorSource,
    Weighting,
)
from packllm.weights.result import Pool, Unit, Weights

__all__ = [
    "WEIGHTINGS",
    "Adaptive",
    "LogitSource",
    "Problem",
    "Solution",
    "Weighting",
    "Weights",
    "calibrate",
    "em",
    "find",
    "fixed",
    "solve",
    "weigh",
]

WEIGHTINGS: dict[str, Weighting] = {
    "em": Weighting("linear", _em.solve, takes=("alpha", "prior", "prior_strength")),
    "uniform": Weighting("log", simple.uniform),
    "top1": Weighting("linear", simple.top1),
    "sim": Weighting("log", simple.sim, takes=("tau",)),
    "opt": Weighting("log", opt.solve, needs_logits=True),
    "exhaustive": Weighting("log", exhaustive.solve, needs_logits=True),
    "exact": Weighting("log", exact.solve, needs_logits=True),
    "map": Weighting("log", exact.solve_map, needs_logits=True, takes=("beta",)),
    "dexperts": Weighting("log", dexperts.solve, takes=("alpha",)),
    "dexperts-opt": Weighting("log", dexperts.solve_opt, needs_logits=True),
    "cbtm": Weighting("linear", cbtm.solve, takes=("fitted", "tau")),
    "router": Weighting("linear", router.solve, takes=("fitted",)),
}


def find(name: str) -> Weighting:
    """The weighting of that name. Raise OptionError with the valid names if there is none."""
    if name not in WEIGHTINGS:
        valid = ", ".join(WEIGHTINGS)
        raise OptionError(f"weighting={name!r} is unknown; valid: {valid}, or a mapping {{member name: weight}}")
    return WEIGHTINGS[name]


def fixed(
    weights: Mapping[str, float], names: tuple[str, ...], pool: Pool, option: str = "weighting"
) -> tuple[float, ...]:
    """A mapping of weights as a tuple in member order; members that it does not name get 0.

    Args:
        option: the option with the mapping, for error messages.

    Raises:
        WeightsError: an unknown member, a sum other than 1, or a negative weight in the linear pool.
    """
    unknown = [name for name in weights if name not in names]
    if unknown:
        raise WeightsError(f"{option} names unknown member {unknown[0]!r}; members: {', '.join(names)}")
    total = math.fsum(weights.values())
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        raise WeightsError(f"{option}={weights!r} sums to {total:g}; weights must sum to 1")
    if pool == "linear" and min(weights.values()) < 0:
        remedy = "prior weights must be at least 0" if option == "prior" else "negative weights need pool='log'"
        raise WeightsError(f"{option}={weights!r}: {remedy}")
    return tuple(float(weights.get(name, 0.0)) for name in names)


def weigh(problem: Problem, options: Options, unit: Unit = "token") -> Weights:
    """Compute the weights of a prompt with `options.weighting` and `options.pool`; `unit` is that of the NLLs."""
    scored = problem.scored
    if isinstance(options.weighting, dict):
        pool = options.pool or "linear"
        solution, strategy = Solution(fixed(options.weighting, problem.names, pool)), "fixed"
    else:
        strategy, weighting = options.weighting, find(options.weighting)
        pool = options.pool or weighting.pool
        # Without scored tokens nothing favours any member, except the prior of em.
        has_evidence = scored or strategy == "em"
        solution = weighting.solve(problem, options) if has_evidence else simple.uniform(problem, options)
        if pool == "linear" and min(solution.values) < 0:
            raise OptionError(f"pool='linear' cannot have the negative weights of weighting={strategy!r}; use 'log'")
        if pool != weighting.pool:  # fused_nll and gap hold only for the weighting's own pool
            solution = Solution(solution.values)
    return Weights(
        values=solution.values,
        names=problem.names,
        pool=pool,
        nll=tuple(problem.nll.tolist()) if scored else (None,) * len(problem.names),
        unit=unit,
        strategy=strategy,
        fused_nll=solution.fused_nll,
        gap=solution.gap,
        scored=scored,
    )


def solve(name: str, logits: Tensor | LogitSource, targets: Tensor, **options: Any) -> Weights:
    """Compute weights from logits alone, without a pack.

    Args:
        name: a key of WEIGHTINGS.
        logits: (K, t, V), next-token logits at the t positions before the targets; or a LogitSource.
        targets: int64 (t,), the observed tokens.
        options: the weighting's options (tau, alpha, beta, pool, ...).

    Returns:
        Weights of members "0", "1", ...; NLLs in nats per token.

    Raises:
        OptionError: an unknown weighting or option.
        WeightsError: shapes that do not fit together.
        MemberError: logits that are NaN or +infinity, or a position where all are -infinity.
    """
    find(name)
    source: LogitSource = TensorSource(logits) if isinstance(logits, Tensor) else logits
    members, positions, vocabulary = source.shape
    if targets.shape != (positions,):
        raise WeightsError(f"targets have shape {tuple(targets.shape)}; with these logits it must be ({positions},)")
    if positions and not 0 <= int(targets.min()) <= int(targets.max()) < vocabulary:
        raise WeightsError(f"targets must be token ids in 0..{vocabulary - 1}")
    problem = Problem(tuple(str(k) for k in range(members)), source=source, targets=targets)
    return weigh(problem, make_options({**options, "weighting": name}))
