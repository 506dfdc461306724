"""Fused log-likelihood of given continuations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from packllm.pool import fuse
from packllm.session import BLOCK_BYTES, Session
from packllm.weights.result import Weights


def continuation_logprobs(
    sessions: dict[int, Session], weights: Weights, continuations: Sequence[Sequence[int]]
) -> Iterator[float]:
    """Σ log p(token) of each continuation under the fused members, given the sessions' prompt.

    Args:
        sessions: prefilled sessions of one row, by index of the members that run.
        weights: final weights; those of the running members are used.
        continuations: token ids, each at least one.

    Yields:
        Nats, one number per continuation, in order.
    """
    values = [weights.values[k] for k in sessions]
    size = min(session.logprobs.shape[-1] for session in sessions.values())
    first = fuse(torch.stack([s.logprobs[0, :size].cpu() for s in sessions.values()]), values, weights.pool)
    together = max(1, min(8, BLOCK_BYTES // (4 * size * 8)))
    for start in range(0, len(continuations), together):
        group = continuations[start : start + together]
        totals = [float(first[ids[0]]) for ids in group]
        width = max(len(ids) for ids in group) - 1
        # Padding on the right is never looked at by what comes before it.
        padded = torch.tensor([list(ids[:-1]) + [0] * (width - len(ids) + 1) for ids in group])
        forks = [session.fork(len(group)) for session in sessions.values()] if width else []
        columns = max(1, BLOCK_BYTES // (4 * size * len(group)))
        for at in range(0, width, columns):
            blocks = [fork.extend(padded[:, at : at + columns])[..., :size].cpu() for fork in forks]
            fused = fuse(torch.stack(blocks), values, weights.pool)
            for row, ids in enumerate(group):
                targets = torch.tensor(ids[at + 1 : at + 1 + fused.shape[1]], dtype=torch.long)
                totals[row] += float(fused[row, : len(targets)].gather(-1, targets[:, None]).double().sum())
        yield from totals


def read(session: Session, here: Tensor, rows: Sequence[Sequence[int]]) -> tuple[list[Tensor], list[Tensor]]:
    """Put one continuation a row through a session of that many rows, all in one batched forward (in blocks of
    columns, where their logits take more than BLOCK_BYTES).

    Shorter rows are padded on the right; what comes before does not look at it. The padding stays in the cache.

    Args:
        session: one row per continuation, all at the same point of the same text.
        here: float32 (V,), distribution of the next token at that point.
        rows: token ids, each at least one.

    Returns:
        Per row, float64 (n,) log-probabilities of its tokens, on the CPU, and float32 (V,), the distribution
        of the token after them.
    """
    width = max(map(len, rows))
    padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in rows])
    logprobs = [[float(here[ids[0]])] for ids in rows]
    after: list[Tensor] = [here] * len(rows)
    step = max(1, BLOCK_BYTES // (4 * here.shape[0] * len(rows)))
    for at in range(0, width, step):
        block = session.extend(padded[:, at : at + step])
        for row, ids in enumerate(rows):
            targets = torch.tensor(ids[at + 1 : at + step + 1], dtype=torch.long, device=block.device)
            logprobs[row] += block[row, : len(targets)].gather(-1, targets[:, None])[:, 0].tolist()
            if at < len(ids) <= at + step:
                after[row] = block[row, len(ids) - 1 - at].clone()  # the rest of the block may go
    return [torch.tensor(row, dtype=torch.float64) for row in logprobs], after
