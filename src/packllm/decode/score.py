"""Fused log-likelihood of given continuations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from packllm.decode.failures import blamed
from packllm.decode.tokens import fused_row
from packllm.engines.transformers.session import BLOCK_BYTES, Session
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
    size = min(session.logprobs.shape[-1] for session in sessions.values())
    first = fused_row({k: session.logprobs[0].cpu() for k, session in sessions.items()}, weights)
    together = max(1, min(8, BLOCK_BYTES // (4 * size * 8)))
    for start in range(0, len(continuations), together):
        group = continuations[start : start + together]
        totals = [float(first[ids[0]]) for ids in group]
        width = max(len(ids) for ids in group) - 1
        # Padding on the right is never looked at by what comes before it.
        padded = torch.tensor([list(ids[:-1]) + [0] * (width - len(ids) + 1) for ids in group])
        forks = {k: session.fork(len(group)) for k, session in sessions.items()} if width else {}
        columns = max(1, BLOCK_BYTES // (4 * size * len(group)))
        for at in range(0, width, columns):
            fused = fused_row({k: _block(fork, padded[:, at : at + columns]) for k, fork in forks.items()}, weights)
            for row, ids in enumerate(group):
                targets = torch.tensor(ids[at + 1 : at + 1 + fused.shape[1]], dtype=torch.long)
                totals[row] += float(fused[row, : len(targets)].gather(-1, targets[:, None]).double().sum())
        yield from totals


def _block(fork: Session, tokens: Tensor) -> Tensor:
    with blamed(fork):
        return fork.extend(tokens).cpu()


class Reading:
    """What a member gives several continuations of one text, in one batched forward on a copy of its cache (in
    blocks of columns, where their logits take more than BLOCK_BYTES).

    Shorter rows are padded on the right; what comes before does not look at it. A cache that cannot be rolled
    back cannot be rid of padding: it is copied for each row, and each read by itself, token by token.

    Args:
        session: one row; it stays as it is.
        here: float32 (V,), distribution of the next token where the continuations begin.
        rows: token ids of each continuation, at least one.
        back: tokens that the session holds after that point.

    Attributes:
        logprobs: per row, log-probabilities of its tokens.
        after: per row, float32 (V,), distribution of the token after them.
    """

    def __init__(self, session: Session, here: Tensor, rows: Sequence[Sequence[int]], back: int = 0) -> None:
        self._rows = rows
        self._width = max(map(len, rows))
        self._batched = session.rewindable()
        if self._batched:
            self._forks = [session.fork(len(rows))]
            self._forks[0].rewind(back)
            step = max(1, BLOCK_BYTES // (4 * here.shape[0] * len(rows)))
            self.logprobs, self.after = _read(self._forks[0], here, rows, step)
        else:
            self._forks = [session.fork() for _ in rows]
            # Token by token: recurrent layers may begin a block of several from an empty state.
            parts = [_read(fork, here, [ids], 1) for fork, ids in zip(self._forks, rows, strict=True)]
            self.logprobs, self.after = [p[0][0] for p in parts], [p[1][0] for p in parts]

    def take(self, row: int) -> Session:
        """The session that has read this row and no more; the reading is used up."""
        if not self._batched:
            return self._forks.pop(row)
        session = self._forks.pop()
        session.select([row])
        session.rewind(self._width - len(self._rows[row]))
        return session

    def close(self) -> None:
        """Free the copies that were not taken."""
        for fork in self._forks:
            fork.close()


def _read(
    session: Session, here: Tensor, rows: Sequence[Sequence[int]], step: int
) -> tuple[list[list[float]], list[Tensor]]:
    """Feed padded rows in blocks of `step` columns; see Reading."""
    width = max(map(len, rows))
    padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in rows])
    logprobs = [[float(here[ids[0]])] for ids in rows]
    after = [here] * len(rows)
    for at in range(0, width, step):
        block = session.extend(padded[:, at : at + step])
        for row, ids in enumerate(rows):
            targets = torch.tensor(ids[at + 1 : at + step + 1], dtype=torch.long, device=block.device)
            logprobs[row] += block[row, : len(targets)].gather(-1, targets[:, None])[:, 0].tolist()
            if at < len(ids) <= at + step:
                after[row] = block[row, len(ids) - 1 - at].clone()  # the rest of the block may go
    return logprobs, after
