"""Fused log-likelihoods of texts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from packllm.decode.line import Line, read_lines, score_rows
from packllm.decode.remote import ServerLine
from packllm.decode.request import Request
from packllm.decode.rerank import text_logprobs
from packllm.decode.tokens import Slot, fused_row, in_one_vocabulary
from packllm.errors import MemberError, OptionError
from packllm.weights.result import Weights

TOGETHER = 8
"""How many continuations are read in one pass, at most."""

BLOCK_BYTES = 32 * 2**20
"""Upper bound of one member's float32 log-probabilities in a block, in bytes."""


def fused_logprobs(
    request: Request, lines: Mapping[Slot, Line | ServerLine], weights: Mapping[int, Weights], texts: Mapping[int, str]
) -> list[float]:
    """The fused log-likelihood of texts, each after a prompt, in nats: token by token if the running members share a
    vocabulary, else by words.

    Args:
        lines: the running members' lines by (member, row), at the end of the row's prompt; they do not move.
        weights, texts: by row.

    Raises:
        OptionError: all of a row's members can only write.
    """
    ids_of: dict[int, list[int]] = {}
    by_words: dict[int, str] = {}
    shared: dict[tuple[int, ...], dict[int, Line]] = {}  # rows may share their lines
    token_lines: dict[Slot, Line] = {}
    for r, text in texts.items():
        running = {k: line for (k, at), line in lines.items() if at == r}
        if all(line.member.kind == "author" for line in running.values()):
            names = ", ".join(repr(line.member.name) for line in running.values())
            raise OptionError(
                f"no member can score a text: {names} can only write; give a judge or a token model a weight"
            )
        row = {k: line for k, line in running.items() if isinstance(line, Line)}
        if len(row) < len(running) or not request.one_vocabulary(list(row)):
            by_words[r] = text
            continue
        same_lines = tuple(map(id, row.values()))
        if same_lines not in shared:
            shared[same_lines], _ = in_one_vocabulary(row)
        token_lines |= {(k, r): line for k, line in shared[same_lines].items()}
        ids_of[r] = request.members[min(row)].encoder.continuation(text)
    if request.mapped and ids_of:
        request.check_room(dict.fromkeys(request.encoded[0], max(map(len, ids_of.values()))))
    results = dict(continuation_logprobs(token_lines, weights, ids_of)) | dict(text_logprobs(lines, weights, by_words))
    return [results[r] for r in texts]


def continuation_logprobs(
    lines: Mapping[Slot, Line], weights: Mapping[int, Weights], continuations: Mapping[int, Sequence[int]]
) -> Iterator[tuple[int, float]]:
    """Σ log p(token) of continuations under the fused members, each after a prompt.

    Args:
        lines: the running members' lines by (member, row), at the end of the row's prompt; they do not move.
        weights: final weights of each row.
        continuations: by row, at least one token id each.

    Yields:
        (row, nats), in order.
    """
    rows = list(continuations)
    for start in range(0, len(rows), TOGETHER):
        for pool, one in (("linear", _mixed), ("log", _multiplied)):
            group = {r: continuations[r] for r in rows[start : start + TOGETHER] if weights[r].pool == pool}
            if group:
                yield from one({slot: line for slot, line in lines.items() if slot[1] in group}, weights, group).items()


def member_logprobs(lines: Mapping[int, Line | ServerLine], texts: Sequence[str]) -> dict[str, list[float]]:
    """log p of each text under each member alone, in its own tokens; -infinity if it cannot score the text. Members
    that can only write are left out."""
    local = {k: line for k, line in lines.items() if isinstance(line, Line)}
    ids_of = {k: [line.member.encoder.continuation(text) for text in texts] for k, line in local.items()}
    by_member = score_rows(local, {k: [ids for ids in rows if ids] for k, rows in ids_of.items()})
    next_score = {k: iter(scores) for k, scores in by_member.items()}
    results = {
        lines[k].member.name: [float(next(next_score[k]).sum()) if ids else -math.inf for ids in rows]
        for k, rows in ids_of.items()
    }
    for line in lines.values():
        if isinstance(line, ServerLine) and line.member.kind == "judge":
            scored = line.spelled(texts)
            results[line.member.name] = [-math.inf if one is None else float(one.logprobs.sum()) for one in scored]
    return results


def _mixed(
    lines: Mapping[Slot, Line], weights: Mapping[int, Weights], rows: Mapping[int, Sequence[int]]
) -> dict[int, float]:
    """Linear pool: the members' probabilities of the tokens themselves suffice (Eq. 8)."""
    scores = score_rows(lines, {slot: [rows[slot[1]]] for slot in lines})
    totals = {}
    for r in rows:
        running = [k for k, row in lines if row == r]
        scale = torch.tensor([weights[r].values[k] for k in running], dtype=torch.float64).log()[:, None]
        totals[r] = float((torch.stack([scores[k, r][0] for k in running]) + scale).logsumexp(0).sum())
    return totals


def _multiplied(
    lines: Mapping[Slot, Line], weights: Mapping[int, Weights], rows: Mapping[int, Sequence[int]]
) -> dict[int, float]:
    """Log pool: needs whole distributions, because it is normalised over the vocabulary (Eq. 1)."""
    running = {r: [k for k, row in lines if row == r] for r in rows}
    totals = {}
    for r, ids in rows.items():
        first = fused_row({k: lines[k, r].next_logprobs for k in running[r]}, weights[r])
        totals[r] = float(first[ids[0]])
    forks = {slot: line.fork() for slot, line in lines.items()}
    step = max(1, BLOCK_BYTES // (4 * len(first) * len(rows)))
    try:
        for at in range(0, max(map(len, rows.values())) - 1, step):
            blocks = {(k, r): rows[r][at : min(at + step, len(rows[r]) - 1)] for k, r in forks if len(rows[r]) - 1 > at}
            answers: dict[Slot, Tensor] = {}
            for slot, answer in read_lines(forks, blocks).items():
                if isinstance(answer, MemberError):
                    raise answer
                answers[slot] = answer
            for r in {r for _, r in blocks}:
                fused = fused_row({k: answers[k, r] for k in running[r]}, weights[r])
                targets = torch.tensor(rows[r][at + 1 : at + 1 + len(fused)], device=fused.device)
                totals[r] += float(fused.gather(-1, targets[:, None]).double().sum())
    finally:
        for fork in forks.values():
            fork.close()
    return totals
