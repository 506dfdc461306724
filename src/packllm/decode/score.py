"""Fused log-likelihood of given continuations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from packllm.decode.line import Line, read_lines, score_rows
from packllm.decode.remote import ServerLine
from packllm.decode.tokens import fused_row
from packllm.errors import MemberError
from packllm.weights.result import Weights

TOGETHER = 8
"""Most continuations that are read together."""

BLOCK_BYTES = 32 * 2**20
"""Most bytes of float32 log-probabilities that one member's block holds."""


def continuation_logprobs(
    lines: dict[int, Line], weights: Weights, continuations: Sequence[Sequence[int]]
) -> Iterator[float]:
    """Σ log p(token) of each continuation under the fused members, after their prompt.

    Args:
        lines: at the end of the prompt, by index of the members that run; they stay there.
        weights: final weights; those of the running members are used.
        continuations: token ids, each at least one.

    Yields:
        Nats, one number per continuation, in order.
    """
    one = _mixed if weights.pool == "linear" else _multiplied
    for start in range(0, len(continuations), TOGETHER):
        yield from one(lines, weights, continuations[start : start + TOGETHER])


def member_logprobs(lines: Mapping[int, Line | ServerLine], texts: Sequence[str]) -> dict[str, list[float]]:
    """log p of each text under each member by itself, in its own tokens; -infinity where it has none for it. Members
    that can only write are left out."""
    here = {k: line for k, line in lines.items() if isinstance(line, Line)}
    spoken = {k: [line.member.encoder.continuation(text) for text in texts] for k, line in here.items()}
    given = score_rows(here, {k: [ids for ids in rows if ids] for k, rows in spoken.items()})
    found = {k: iter(scores) for k, scores in given.items()}
    told = {
        lines[k].member.name: [float(next(found[k]).sum()) if ids else -math.inf for ids in rows]
        for k, rows in spoken.items()
    }
    for line in lines.values():
        if isinstance(line, ServerLine) and line.member.kind == "judge":
            scored = line.spelled(texts)
            told[line.member.name] = [-math.inf if one is None else float(one.logprobs.sum()) for one in scored]
    return told


def _mixed(lines: dict[int, Line], weights: Weights, rows: Sequence[Sequence[int]]) -> list[float]:
    """In the linear pool what each member gives the tokens themselves is enough (Eq. 8)."""
    given = score_rows(lines, dict.fromkeys(lines, rows))
    scale = torch.tensor([weights.values[k] for k in lines], dtype=torch.float64).log()[:, None]
    return [float((torch.stack([given[k][r] for k in lines]) + scale).logsumexp(0).sum()) for r in range(len(rows))]


def _multiplied(lines: dict[int, Line], weights: Weights, rows: Sequence[Sequence[int]]) -> list[float]:
    """The logarithmic pool is normalised over the vocabulary (Eq. 1)."""
    first = fused_row({k: line.here for k, line in lines.items()}, weights)
    totals = [float(first[ids[0]]) for ids in rows]
    forks = {(k, r): line.fork() for k, line in lines.items() for r in range(len(rows))}
    step = max(1, BLOCK_BYTES // (4 * len(first) * len(rows)))
    try:
        for at in range(0, max(map(len, rows)) - 1, step):
            blocks = {(k, r): rows[r][at : min(at + step, len(rows[r]) - 1)] for k, r in forks if len(rows[r]) - 1 > at}
            answers: dict[tuple[int, int], Tensor] = {}
            for slot, answer in read_lines(forks, blocks).items():
                if isinstance(answer, MemberError):
                    raise answer
                answers[slot] = answer
            for r in {r for _, r in blocks}:
                fused = fused_row({k: answers[k, r] for k in lines}, weights)
                targets = torch.tensor(rows[r][at + 1 : at + 1 + len(fused)], device=fused.device)
                totals[r] += float(fused.gather(-1, targets[:, None]).double().sum())
    finally:
        for fork in forks.values():
            fork.close()
    return totals
