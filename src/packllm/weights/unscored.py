"""Weights of packs with members that cannot score a prompt: authors, which only write."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from packllm.errors import WeightsError
from packllm.options import Options
from packllm.weights import find, fixed
from packllm.weights.result import Weights


def check_unscored(options: Options, unscored: Sequence[str]) -> None:
    """Raise WeightsError if the weighting needs logits and a member gives none."""
    if unscored and isinstance(options.weighting, str) and find(options.weighting).needs_logits:
        raise WeightsError(
            f"weighting={options.weighting!r} needs the logits of all members, but {unscored[0]!r} gives none; "
            f"use em, sim, top1, uniform or a mapping {{member name: weight}}"
        )


def joined(scored: Weights | None, names: Sequence[str], which: Sequence[str], options: Options) -> Weights:
    """The weights of all members, from those of the members that scored the prompt.

    A mapping is used as it is. `top1` chooses among the members that scored the prompt. Otherwise a member that did not
    gets its share of `prior` (or 1/K), and the rest is shared as the weighting says.

    Args:
        scored: the weights of the members that scored the prompt; None if none did.
        names: all members.
        which: the names of the members that scored it, in the order of `scored`.
    """
    at = {name: k for k, name in enumerate(which)}
    pool = options.pool or ("linear" if isinstance(options.weighting, dict) else find(options.weighting).pool)
    prior = _shares(options.prior, names)
    if isinstance(options.weighting, dict):
        values = list(fixed(options.weighting, tuple(names), pool))
    elif scored is None:
        values = prior
    else:
        rest = 1.0 - math.fsum(share for name, share in zip(names, prior, strict=True) if name not in at)
        if options.weighting == "top1" or rest <= 0:
            prior, rest = [0.0] * len(names), 1.0
        values = [scored.values[at[n]] * rest if n in at else share for n, share in zip(names, prior, strict=True)]
    nll = tuple(None if scored is None or name not in at else scored.nll[at[name]] for name in names)
    if scored is None:
        strategy = options.weighting if isinstance(options.weighting, str) else "fixed"
        return Weights(tuple(values), tuple(names), pool, nll, options.unit or "word", strategy)
    return replace(scored, values=tuple(values), names=tuple(names), nll=nll, fused_nll=None, gap=None)


def _shares(prior: Any, names: Sequence[str]) -> list[float]:
    """The prior weights of these members."""
    worth = [1.0 if prior is None else float(prior.get(name, 0.0)) for name in names]
    total = math.fsum(worth)
    return [value / total for value in worth] if total > 0 else [1.0 / len(names)] * len(names)
