"""Speculative fusion: one member drafts a block, the others read it in one pass each (METHODS §6).

In a round of γ tokens the member with the largest weight reads the last token of the answer and drafts γ - 1 more, one
by one; every other member reads them all in one pass. Then all have a distribution at each of γ places. Where the
drafter's is q and the fused one r, a drafted token is taken over with probability min(1, r/q), and else replaced by a
draw from max(0, r - q), which ends the round (arXiv 2211.17192, 2302.01318); greedily it is taken over where argmax r
is the same. Caches forget the rest. The answer is then distributed as that of plain fusion, for either pool; γ = 1 is
plain fusion.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from packllm.decode.sampling import Greedy, Random
from packllm.decode.tokens import Ensemble, Row, Slot, fused_row, generate_ids
from packllm.engines.base import Engine

log = logging.getLogger("packllm")

MOST_PLACES = 8
"""Largest γ that is chosen by itself."""

FIRST_RATE, FIRST_COUNT, MEMORY = 0.8, 8.0, 0.97
"""Share of drafted tokens taken over that is assumed at first, how many tokens that counts like, and what each
token's count is multiplied by at every later one."""


@dataclass
class Round:
    """What was read since the last token that is sure, by row.

    Attributes:
        parts: float32 (γ, V_k) of each running member, its log-probabilities at γ places.
        drafted: the γ - 1 tokens at all places but the last.
        drawn_from: the distributions that these were drawn from.
    """

    parts: dict[int, dict[int, Tensor]]
    drafted: dict[int, list[int]]
    drawn_from: dict[int, list[Tensor]]

    @property
    def places(self) -> int:
        return 1 + max(map(len, self.drafted.values()))


def speculative_ids(ensemble: Ensemble, rows: Sequence[Row], fixed: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield (row, token id) as generate_ids does: greedily the same tokens, else tokens of the same distribution.

    Args:
        ensemble, rows: as for generate_ids.
        fixed: γ, tokens a round; None: what pays, going by the tokens so far.
    """
    live = [r for r, row in enumerate(rows) if not row.done]
    pace = Pace(ensemble, fixed)
    if not pace.can_pay(live) or _hindered(ensemble, [rows[r] for r in live]):
        yield from generate_ids(ensemble, rows)
        return
    left = {r: rows[r].limit for r in live}
    parts = {r: {k: logprobs[None] for k, logprobs in ensemble.parts(r).items()} for r in live}
    block = Round(parts, {r: [] for r in live}, {r: [] for r in live})
    while True:
        chosen = yield from _judged(block, ensemble, rows, pace)
        live = [r for r in live if not rows[r].done]
        if not live:
            return
        ensemble.forget({r: len(block.drafted[r]) + 1 - len(chosen[r]) for r in live}, block.parts)
        left = {r: left[r] - len(chosen[r]) for r in live}
        ensemble.retire()
        ensemble.end_blocks(live)
        places = pace.places(live)
        sizes = {r: max(1, min(places, left[r], rows[r].room)) for r in live}  # a row's own, for the seed's sake
        block = _read(ensemble, rows, {r: chosen[r][-1] for r in live}, sizes)


def _hindered(ensemble: Ensemble, rows: Sequence[Row]) -> bool:
    """Whether tokens have to come one by one; says why where a member is the reason."""
    if not all(isinstance(row.sample, Greedy | Random) for row in rows):
        log.info("decoding without drafts: penalties, biases and forms must see every token once and in order")
        return True
    for line in ensemble.lines.values():
        if not line.sequence.engine.rewinds:
            log.info("decoding without drafts: the cache of member %r cannot be rolled back", line.member.name)
            return True
    return False


def _judged(
    block: Round, ensemble: Ensemble, rows: Sequence[Row], pace: Pace
) -> Generator[tuple[int, int], None, dict[int, list[int]]]:
    """Yield what the pack says at each place, for as long as it is what was drafted.

    Returns:
        The tokens of each row; the last of them has yet to be read.
    """
    chosen: dict[int, list[int]] = {r: [] for r in block.parts}
    going = list(block.parts)
    for place in range(block.places):
        for r in list(going):
            row = rows[r]
            assert isinstance(row.sample, Greedy | Random)
            parts = {k: p[place] for k, p in block.parts[r].items()}
            fused = fused_row(parts, row.weights)
            target = row.sample.distribution(fused)
            if place < len(block.drafted[r]):
                drafted, draft = block.drafted[r][place], block.drawn_from[r][place]
                token = row.sample.judge(drafted, draft, target)
                agreed = token == drafted
                row.drafted, row.accepted = row.drafted + 1, row.accepted + agreed
                pace.note(agreed)
            else:
                token, agreed = row.sample.draw(target), False
                if pace.learns and (own := block.parts[r].get(ensemble.top(r))) is not None:
                    pace.note(row.sample.overlap(row.sample.distribution(own[place, : len(target)]), target))
            chosen[r].append(token)
            row.note(token, fused, parts)
            row.observe(token, parts)
            yield r, token
            if row.done or not agreed:
                going.remove(r)
        if not going:
            break
    return chosen


def _read(ensemble: Ensemble, rows: Sequence[Row], last: Mapping[int, int], sizes: Mapping[int, int]) -> Round:
    """Read the last token of each row and size - 1 drafted ones, fewer where a drafter fails."""
    tops = {r: ensemble.top(r) for r in last}
    blocks = {r: [token] for r, token in last.items()}
    drawn_from: dict[int, list[Tensor]] = {r: [] for r in last}
    read: dict[Slot, list[Tensor]] = defaultdict(list)

    def note(found: dict[Slot, Tensor]) -> dict[Slot, Tensor]:
        for slot, logprobs in found.items():
            read[slot].append(logprobs)
        return found

    next_: dict[Slot, list[int]] = {
        (k, r): [token] for r, token in last.items() for k in (ensemble.awake(r) if sizes[r] == 1 else [tops[r]])
    }
    while next_:
        found = note(ensemble.read(next_))
        next_ = {}
        for r, block in blocks.items():
            if len(block) < sizes[r] and (slot := (tops[r], r)) in found:
                sample, common = rows[r].sample, min(len(part) for part in ensemble.parts(r).values())
                assert isinstance(sample, Greedy | Random)
                drawn_from[r].append(sample.distribution(found[slot][0, :common]))
                block.append(sample.draw(drawn_from[r][-1]))
                next_[slot] = block[-1:]
    while others := {(k, r): block for r, block in blocks.items() for k in ensemble.awake(r) if (k, r) not in read}:
        note(ensemble.read(others))
    parts = {r: {k: torch.cat(read[k, r]) for k in ensemble.awake(r)} for r in last}
    return Round(parts, {r: block[1:] for r, block in blocks.items()}, drawn_from)


class Pace:
    """How many tokens a round pays for.

    A round of γ costs γ passes of the drafters and one over γ times the tokens of the others, and gives
    1 + p + ... + p^(γ-1) tokens where a share p of what is drafted is taken over. What was seen and what runs settle
    γ, never the clock: a seed gives the same answer again.

    Args:
        ensemble: what runs.
        fixed: γ, if it is not to be chosen.

    Attributes:
        learns: whether note() makes a difference.
    """

    def __init__(self, ensemble: Ensemble, fixed: int | None) -> None:
        self._ensemble, self._fixed = ensemble, fixed
        self._accepted, self._judged = FIRST_RATE * FIRST_COUNT, FIRST_COUNT
        self.learns = fixed is None

    def note(self, accepted: float) -> None:
        """A drafted token was taken over, or the probability that it would have been."""
        self._accepted = self._accepted * MEMORY + accepted
        self._judged = self._judged * MEMORY + 1

    def can_pay(self, rows: Collection[int]) -> bool:
        """Whether drafting would pay if all that is drafted were taken over."""
        return bool(rows) and self._best(rows, 1.0) > 1

    def places(self, rows: Collection[int]) -> int:
        """γ of the next round of these rows."""
        return self._best(rows, self._accepted / self._judged)

    def _best(self, rows: Collection[int], rate: float) -> int:
        if self._fixed is not None:
            return self._fixed
        cost = self._costs(rows)
        return min(range(1, MOST_PLACES + 1), key=lambda n: cost[n] / sum(rate**place for place in range(n)))

    def _costs(self, rows: Collection[int]) -> dict[int, float]:
        """What a round of each γ costs, in bytes of weights read."""
        tops = {r: self._ensemble.top(r) for r in rows}
        awake = {r: self._ensemble.awake(r) for r in rows}
        drafts, others = defaultdict[Engine, int](int), defaultdict[Engine, int](int)
        for (k, r), line in self._ensemble.lines.items():
            if k in awake.get(r, ()):
                (drafts if k == tops[r] else others)[line.sequence.engine] += 1
        everyone = {engine: drafts[engine] + others[engine] for engine in {*drafts, *others}}
        costs = {1: _cost(everyone)}
        for n in range(2, MOST_PLACES + 1):
            costs[n] = n * _cost(drafts) + _cost({engine: n * count for engine, count in others.items()})
        return costs


def _cost(tokens: Mapping[Engine, int]) -> float:
    """Of one pass of each engine over so many tokens, the weights shared with other requests; places run at once."""
    busy: dict[Hashable, float] = defaultdict(float)
    for engine, count in tokens.items():
        if count:
            busy[engine.place] += engine.size * (1 / engine.requests + engine.packing * (count - 1))
    return max(busy.values(), default=0.0)
