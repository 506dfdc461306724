"""Token-by-token fusion of members that share a vocabulary (PackLLM Eq. 1, cBTM Eq. 8)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from packllm.decode.devices import across_devices
from packllm.decode.failures import Failures, blamed, normalised
from packllm.decode.pool import fuse
from packllm.decode.sampling import Sampler
from packllm.engines.transformers.session import Session
from packllm.errors import MemberError, blamed_on
from packllm.weights.result import Weights


@dataclass
class Row:
    """One prompt of a batch while it is decoded.

    Attributes:
        weights: final weights; members at 0 do not run.
        sample: chooses a token from the fused log-probabilities.
        limit: most tokens that will be read.
        done: set by whoever reads the tokens, to end this row.
        drafted, accepted: tokens that one member proposed ahead of the others, and those of them that the answer
            took over.
    """

    weights: Weights
    sample: Sampler
    limit: int = 2**31
    done: bool = False
    drafted: int = 0
    accepted: int = 0


Slot = tuple[int, int]
"""(member, row of the batch)."""


@dataclass(eq=False)
class Lane:
    """A session of the ensemble, the slot that each of its rows stands for, and the role they play."""

    session: Session
    slots: list[Slot]
    role: Hashable = None

    def keep(self, slots: Sequence[Slot]) -> None:
        """Go on with these slots only, of which there is at least one."""
        if len(slots) < len(self.slots):
            self.session.select([self.slots.index(slot) for slot in slots])
            self.slots = list(slots)

    def extend(self, tokens: Tensor) -> None:
        """Session.extend, whose every failure is its members'."""
        with blamed(self.session):
            self.session.extend(tokens)

    def divided(self, role: Callable[[Slot], Hashable]) -> list[Lane]:
        """A lane for each role among the slots."""
        roles = dict.fromkeys(map(role, self.slots))
        if len(roles) == 1:
            return [Lane(self.session, self.slots, *roles)]
        rows = {one: [at for at, slot in enumerate(self.slots) if role(slot) == one] for one in roles}
        lanes = [Lane(self.session.take(at), [self.slots[i] for i in at], one) for one, at in rows.items()]
        self.session.close()
        return lanes


class Ensemble:
    """The sessions of the members that run, each over the rows where its weight is not 0. Members that share
    an engine run as rows of one session, in one pass.

    Args:
        sessions: open, prefilled sessions by member index, each over all rows of the batch; used up.
        rows: the batch; a row's weights may lose a member that fails.
        failures: what becomes of a member that fails; None: it ends the work.
    """

    def __init__(self, sessions: dict[int, Session], rows: Sequence[Row], failures: Failures | None = None) -> None:
        self._rows, self._failures = rows, failures
        self._lanes = [Lane(session, [(k, r) for r in range(len(rows))]) for k, session in sessions.items()]
        self.arrange()

    @property
    def lanes(self) -> Sequence[Lane]:
        """What runs in one pass each."""
        return self._lanes

    def arrange(self, role: Callable[[Slot], Hashable] = lambda slot: None) -> None:
        """Group the slots: those of one engine and one role run in one pass. What is done leaves."""
        self._retire()
        groups: dict[tuple[int, Hashable], list[Lane]] = {}
        with blamed_on(*(owner.name for lane in self._lanes for owner in lane.session.owners)):
            for lane in self._lanes:
                for part in lane.divided(role):
                    key = id(part.session.engine if part.session.joinable() else lane), part.role
                    groups.setdefault(key, []).append(part)
            self._lanes = [
                Lane(
                    Session.join([part.session for part in parts]),
                    [slot for part in parts for slot in part.slots],
                    kind,
                )
                for (_, kind), parts in groups.items()
            ]

    def _retire(self) -> None:
        """Let go of rows that are done or give a member no weight, and of sessions without rows."""
        for lane in list(self._lanes):
            rows = self._rows
            left = [(k, r) for k, r in lane.slots if not rows[r].done and rows[r].weights.values[k] != 0]
            if left:
                lane.keep(left)
            else:
                lane.session.close()
                self._lanes.remove(lane)

    def running(self, row: int) -> list[int]:
        """Indices of the members that run for a row, ascending."""
        return sorted(k for lane in self._lanes for k, r in lane.slots if r == row)

    def top(self, row: int) -> int:
        """The running member with the largest weight, the first of equals."""
        return max(self.running(row), key=self._rows[row].weights.values.__getitem__)

    def parts(self, row: int) -> dict[int, Tensor]:
        """float32 (V_k,), each running member's next-token log-probabilities for a row."""
        return {
            k: lane.session.logprobs[at] for lane in self._lanes for at, (k, r) in enumerate(lane.slots) if r == row
        }

    def fused(self, row: int) -> Tensor:
        """The fused next-token distribution of a row: float32 (V,) log-probabilities."""
        return fused_row(self.parts(row), self._rows[row].weights)

    def step(self, tokens: Mapping[int, int]) -> None:
        """Append a token to each of the given rows; rows not named must be done."""
        self._retire()
        self.extend({r: [token] for r, token in tokens.items()})

    def extend(
        self, blocks: Mapping[int, Sequence[int]], among: Callable[[Lane], object] = lambda lane: True
    ) -> dict[Slot, Tensor]:
        """Append a block of tokens to each slot of some lanes, in one pass a lane.

        Args:
            blocks: tokens of each row that these lanes have slots of, of one length.
            among: the lanes to run.

        Returns:
            float32 (n, V_k) for each slot that did not fail, the log-probabilities after each token.
        """
        lanes = [lane for lane in self._lanes if among(lane)]
        runs = [partial(lane.extend, torch.tensor([blocks[r] for _, r in lane.slots])) for lane in lanes]
        go_on = self._failures is not None and self._failures.drop
        failures = across_devices([lane.session.engine.device for lane in lanes], runs, go_on)
        for lane, failure in zip(lanes, failures, strict=True):
            if failure is not None and lane in self._lanes:
                self._lose(lane, failure)
        return {
            slot: part
            for lane in lanes
            if lane in self._lanes
            for slot, part in zip(lane.slots, lane.session.block, strict=True)
        }

    def forget(self, counts: Mapping[int, int]) -> None:
        """Drop the last tokens of each row again, so many as given; rows not named must be done."""
        common = min(counts.values())
        for lane in self._lanes:
            lane.session.forget([counts.get(r, common) for _, r in lane.slots], common)

    def _lose(self, lane: Lane, error: Exception) -> None:
        """Go on without the members of a lane that failed, in the whole batch, or raise."""
        if self._failures is None:
            raise error
        among = {k for k, _ in lane.slots}
        rows = [row for row in self._rows if not row.done and any(row.weights.values[k] for k in among)]
        _, left = self._failures.lose(error, among, [row.weights for row in rows])
        for row, weights in zip(rows, left, strict=True):
            row.weights = weights
        self._retire()
        if lane in self._lanes:
            try:
                lane.session.check()
            except MemberError as another:
                self._lose(lane, another)

    def close(self) -> None:
        for lane in self._lanes:
            lane.session.close()


def fused_row(parts: dict[int, Tensor], weights: Weights) -> Tensor:
    """Log-probabilities (..., V) by member index, fused under a row's weights; ids that one member lacks carry
    no mass."""
    members = sorted(parts)
    size = min(parts[k].shape[-1] for k in members)
    device = parts[members[0]].device
    with blamed_on(*(weights.names[k] for k in members)):
        stacked = torch.stack([parts[k][..., :size].to(device) for k in members])
        return fuse(stacked, [weights.values[k] for k in members], weights.pool)


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
    return weights if kept == list(values) else replace(weights, values=normalised(kept))
