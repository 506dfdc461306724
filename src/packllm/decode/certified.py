"""Exact greedy fusion, token by token, with members on servers that report only their most likely tokens.

A token that a server does not report has at most the probability of the last one that it does. This bounds each token's
fused probability from below and above. A token is proved to be the most likely one if its lower bound is above the
upper bounds of all others. Otherwise the servers are asked for the tokens that are still in question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from packllm.align.shared import Shared
from packllm.decode.failures import Failures
from packllm.decode.line import Line
from packllm.decode.remote import ServerLine, each_at_once
from packllm.decode.tokens import Row
from packllm.engines.server.tops import NAMED, Top
from packllm.errors import MemberError

T = TypeVar("T")

_ROUNDS = 12
"""How many times servers are asked for one token, at most."""


class Far:
    """A member on a server, at the end of a text of token ids.

    Args:
        line: its line in the request.
        shared: the shared ids that it uses, and its index among their members; None: its own ids.
    """

    def __init__(self, line: ServerLine, shared: tuple[Shared, int] | None) -> None:
        self.member, self._line, self._shared = line.member, line, shared
        assert line.member.tops is not None
        self._tops = line.member.tops
        self.ids = list(line.asked.ids)
        self._top = Top({}, 0.0)

    def close(self) -> None:
        """Cancel the requests that its server is answering."""
        self._line.close()

    def own(self, token: int) -> int:
        """The member's own id of a shared id; one of its end ids for END."""
        if self._shared is None:
            return token
        shared, at = self._shared
        return min(self.member.end_ids) if token == shared.end else shared.own(at, [token])[0]

    def look(self) -> None:
        """Ask the server for the most likely next tokens."""
        self._top = self._tops.top(self.ids, self._line.bill, self._line.gate)

    def look_for(self, tokens: Sequence[int]) -> bool:
        """Ask the server for these tokens too; return whether anything new is known."""
        own = [self.own(token) for token in tokens]
        if self._shared is not None and self._shared[0].end in tokens:
            own += self.member.end_ids
        top = self._tops.further(self.ids, self._top, own, self._line.bill, self._line.gate)
        if top is None or top == self._top:
            return False
        self._top = top
        return True

    def bounds(self) -> tuple[Tensor, Tensor]:
        """float64 (V,) twice: the lower and upper bounds of each token's log-probability."""
        size = len(self.member.vocabulary)
        low, high = torch.full((size,), -torch.inf).double(), torch.full((size,), self._top.rest).double()
        places = torch.tensor(list(self._top.known))
        low[places] = high[places] = torch.tensor(list(self._top.known.values()), dtype=torch.float64)
        if self._shared is None:
            return low, high
        shared, at = self._shared
        return shared.rows(at, low), shared.rows(at, high)


class Certified:
    """The members that run for one prompt, some of them on servers.

    Args:
        lines: by index of the member.
        shared: the ids that they share; None: all members have the same ids.
        row: the prompt's weights; a member that fails may be dropped from them.
        failures: decides whether a failed member is dropped.

    Attributes:
        rounds: how many times servers were asked.
        at_once: how many tokens the first round proved.
    """

    def __init__(
        self, lines: Mapping[int, Line | ServerLine], shared: Shared | None, row: Row, failures: Failures
    ) -> None:
        self._row, self._failures = row, failures
        self._lines: dict[int, Line] = {}
        self._far: dict[int, Far] = {}
        for at, (k, line) in enumerate(lines.items()):
            if isinstance(line, ServerLine):
                self._far[k] = Far(line.fork(), None if shared is None else (shared, at))
            else:
                self._lines[k] = line if shared is None else line.speaking(shared, at)
        self.rounds = self.at_once = 0

    @property
    def top(self) -> int:
        """The member with the largest weight."""
        return max([*self._lines, *self._far], key=self._row.weights.values.__getitem__)

    def ids(self) -> Iterator[int]:
        """Yield tokens without end."""
        while True:
            token = self._choose()
            yield token
            self._each(partial(self._read, token))

    def close(self) -> None:
        """Cancel the requests that servers are answering."""
        for far in self._far.values():
            far.close()

    def _read(self, token: int, k: int) -> None:
        if k in self._far:
            self._far[k].ids.append(self._far[k].own(token))
        else:
            self._lines[k].read([token], "last")

    def _look(self, k: int) -> None:
        if k in self._far:
            self._far[k].look()

    def _look_for(self, tokens: Sequence[int], k: int) -> bool:
        return k in self._far and self._far[k].look_for(tokens)

    def _give_up(self, k: int) -> None:
        if k in self._far:
            reason = "its server reports too little to prove which token is the most likely; use decoding='cool'"
            raise MemberError(self._far[k].member.name, reason)

    def _choose(self) -> int:
        """The most likely token of the fused distribution; the smallest id among equals."""
        self._each(self._look)
        rounds = 0
        while True:
            self.rounds += 1
            rounds += 1
            low, high = self._fused()
            best = int((low == low.max()).nonzero()[0])
            rivals = high > low[best]
            rivals[:best] |= high[:best] == low[best]
            rivals[best] = False
            if not rivals.any() and low[best] > -1e29:
                self.at_once += rounds == 1
                return best
            count = min(NAMED - 1, int(rivals.sum()))
            questioned = [best, *torch.where(rivals, high, -torch.inf).topk(count).indices.tolist()]
            if rounds == _ROUNDS or not any(self._each(partial(self._look_for, questioned)).values()):
                self._each(self._give_up)

    def _fused(self) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of each token's fused score, which orders tokens as their probabilities do."""
        weights = self._row.weights
        rows = {k: line.next_logprobs.double().cpu() for k, line in self._lines.items()}
        bounds = {k: (row, row) for k, row in rows.items()} | {k: far.bounds() for k, far in self._far.items()}
        size = min(len(low) for low, _ in bounds.values())
        scale = torch.tensor([weights.values[k] for k in bounds], dtype=torch.float64)

        def fuse(side: int) -> Tensor:
            stacked = torch.stack([both[side][:size] for both in bounds.values()])
            if weights.pool == "linear":
                return (stacked + scale.log()[:, None]).logsumexp(0)
            return torch.tensordot(scale, stacked.clamp_min(-1e30), 1)

        return fuse(0), fuse(1)

    def _each(self, act: Callable[[int], T]) -> dict[int, T]:
        which = [*self._lines, *self._far]
        results = each_at_once(act, which, self._far, self._failures, self._row)
        for k in set(which) - set(results):
            self._lines.pop(k, None)
            self._far.pop(k, None)
        return results
