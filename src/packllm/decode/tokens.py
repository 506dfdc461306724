"""Token-by-token fusion of members that share a vocabulary (PackLLM Eq. 1, cBTM Eq. 8)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from packllm.errors import MemberError
from packllm.member import Session
from packllm.pool import fuse
from packllm.sampling import Sampler
from packllm.weights.result import Weights

log = logging.getLogger("packllm")


@dataclass
class Row:
    """One prompt of a batch while it is decoded.

    Attributes:
        weights: final weights; members at 0 do not run.
        sample: chooses a token from the fused log-probabilities.
        done: set by whoever reads the tokens, to end this row.
    """

    weights: Weights
    sample: Sampler
    done: bool = False


class Ensemble:
    """The sessions of the members that run, each over the rows where its weight is not 0.

    Args:
        sessions: open, prefilled sessions by member index, each over all rows of the batch.
        rows: the batch; a row's weights may lose a member that fails.
        drop: go on without a member that fails, instead of raising.
    """

    def __init__(self, sessions: dict[int, Session], rows: Sequence[Row], drop: bool = False) -> None:
        self._rows, self._drop = rows, drop
        self._sessions = dict(sessions)
        self._members = {k: list(range(len(rows))) for k in sessions}  # rows of each session, in its order
        self._retire()

    def _retire(self) -> None:
        """Let go of rows that are done or give a member no weight, and of members without rows."""
        for k, session in list(self._sessions.items()):
            here = self._members[k]
            keep = [r for r in here if not self._rows[r].done and self._rows[r].weights.values[k] != 0]
            if not keep:
                session.close()
                del self._sessions[k], self._members[k]
            elif len(keep) < len(here):
                session.select([here.index(r) for r in keep])
                self._members[k] = keep

    def running(self, row: int) -> list[int]:
        """Indices of the members that run for a row."""
        return [k for k in self._sessions if row in self._members[k]]

    def fused(self, row: int) -> Tensor:
        """The fused next-token distribution of a row: float32 (V,) log-probabilities."""
        running = self.running(row)
        parts = [self._sessions[k].logprobs[self._members[k].index(row)] for k in running]
        size = min(part.shape[0] for part in parts)  # rows that one member lacks carry no mass
        values = self._rows[row].weights.values
        stacked = torch.stack([part[:size].to(parts[0].device) for part in parts])
        return fuse(stacked, [values[k] for k in running], self._rows[row].weights.pool)

    def step(self, tokens: dict[int, int]) -> None:
        """Append a token to each of the given rows; rows not named must be done."""
        self._retire()
        for k, session in list(self._sessions.items()):
            try:
                session.step([tokens[r] for r in self._members[k]])
            except MemberError as error:
                self._lose(k, error)

    def _lose(self, member: int, error: MemberError) -> None:
        affected = self._members[member]
        if not self._drop or any(len(self.running(r)) == 1 for r in affected):
            raise error
        log.warning("going on without a member: %s", error)
        for r in affected:
            self._rows[r].weights = without(self._rows[r].weights, member)
        self._sessions.pop(member).close()
        del self._members[member]

    def close(self) -> None:
        for session in self._sessions.values():
            session.close()


def generate_ids(ensemble: Ensemble, rows: Sequence[Row]) -> Iterator[tuple[int, int]]:
    """Fuse, choose, step: yield (row, token id), each token as soon as it is chosen.

    A row ends when the reader sets its `done`; the next tokens are computed when they are asked for.
    """
    while True:
        tokens = {}
        for r, row in enumerate(rows):
            if not row.done:
                tokens[r] = row.sample(ensemble.fused(r))
                yield r, tokens[r]
        if all(row.done for row in rows):
            return
        ensemble.step(tokens)


def without(weights: Weights, member: int) -> Weights:
    """Weights with a member at 0 and the others renormalised."""
    values = [0.0 if k == member else value for k, value in enumerate(weights.values)]
    return replace(weights, values=_normalised(values), fused_nll=None, gap=None)


def drop_small(weights: Weights, minimum: float) -> Weights:
    """Weights with members below `minimum` at 0 and the others renormalised.

    In the linear pool, dropping a total weight of δ moves every next-token distribution by at most δ in
    total variation. Weights outside the simplex (DExperts) are left alone: their size is no measure there.
    """
    values = weights.values
    if min(values) < 0:
        return weights
    floor = min(minimum, max(values))  # the largest weight always stays
    kept = [value if value >= floor else 0.0 for value in values]
    return weights if kept == list(values) else replace(weights, values=_normalised(kept))


def _normalised(values: Sequence[float]) -> tuple[float, ...]:
    total = math.fsum(values)
    return tuple(value / total for value in values)
