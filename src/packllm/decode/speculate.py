"""Speculative fusion: one member drafts a block of tokens, and each other member reads it in one pass (METHODS §6).

In a round of γ places, the member with the largest weight (the drafter) reads the last token of the answer and drafts
γ - 1 more tokens, one by one. Every other member reads them all in one pass. Then all members have a distribution at
each of the γ places. Let q be the drafter's and r the fused one. A draft token is accepted with probability
min(1, r/q); otherwise a token is drawn from max(0, r - q) and the round ends (arXiv 2211.17192, 2302.01318). Greedy
decoding accepts a draft token if it is argmax r. Caches drop rejected tokens. The answer has the same distribution as
plain fusion, for both pools; γ = 1 is plain fusion.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from packllm.decode.sampling import Greedy, Random
from packllm.decode.tokens import Ensemble, Row, Slot, generate_ids
from packllm.engines.base import Engine

log = logging.getLogger("packllm")

MOST_PLACES = 8
"""Largest γ that is chosen automatically."""

FIRST_RATE, FIRST_COUNT, MEMORY = 0.8, 8.0, 0.97
"""Start of the estimate of the acceptance rate: the rate, and how many tokens it counts as. MEMORY multiplies the count
of each token at every later one, so that recent tokens count more."""


@dataclass
class Round:
    """The members' predictions since the last final token, by row.

    Attributes:
        parts: float32 (γ, V_k) of each running member, its log-probabilities at γ places.
        drafted: the γ - 1 draft tokens; the last place has none.
        drawn_from: the distributions that they were drawn from.
    """

    parts: dict[int, dict[int, Tensor]]
    drafted: dict[int, list[int]]
    drawn_from: dict[int, list[Tensor]]

    @property
    def places(self) -> int:
        return 1 + max(map(len, self.drafted.values()))


def speculative_ids(ensemble: Ensemble, rows: Sequence[Row], fixed: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield (row, token id) as generate_ids does: the same tokens if greedy, otherwise the same distribution.

    Args:
        ensemble, rows: as for generate_ids.
        fixed: γ, places per round; None: the γ that costs least by the acceptance rate so far.
    """
    live = [r for r, row in enumerate(rows) if not row.done]
    ensemble.spare()
    pace = Pace(ensemble, fixed)
    if not pace.can_pay(live) or _hindered(ensemble, [rows[r] for r in live]):
        yield from generate_ids(ensemble, rows)
        return
    remaining = {r: rows[r].limit for r in live}
    parts = {r: {k: logprobs[None] for k, logprobs in ensemble.parts(r).items()} for r in live}
    block = Round(parts, {r: [] for r in live}, {r: [] for r in live})
    while True:
        chosen = yield from _verified(block, ensemble, rows, pace)
        live = [r for r in live if not rows[r].done]
        if not live:
            return
        ensemble.forget({r: len(block.drafted[r]) + 1 - len(chosen[r]) for r in live}, block.parts)
        remaining = {r: remaining[r] - len(chosen[r]) for r in live}
        ensemble.retire()
        ensemble.end_blocks(live)
        places = pace.places(live)
        sizes = {
            r: max(1, min(places, remaining[r], rows[r].room)) for r in live
        }  # independent of other rows, for reproducible seeds
        block = _read(ensemble, rows, {r: chosen[r][-1] for r in live}, sizes)


def _hindered(ensemble: Ensemble, rows: Sequence[Row]) -> bool:
    """Whether drafting is impossible; logs the reason."""
    if not all(isinstance(row.sample, Greedy | Random) for row in rows):
        log.info("decoding without draft tokens: penalties, biases and grammars need every token once and in order")
        return True
    for line in ensemble.lines.values():
        if not line.sequence.engine.rewinds:
            log.info(
                "decoding without draft tokens: member %r has a cache that cannot be rolled back", line.member.name
            )
            return True
    return False


def _verified(
    block: Round, ensemble: Ensemble, rows: Sequence[Row], pace: Pace
) -> Generator[tuple[int, int], None, dict[int, list[int]]]:
    """Yield the pack's token at each place, up to the first one that is not the draft token.

    Returns:
        The tokens of each row; the last of them is not read yet.
    """
    chosen: dict[int, list[int]] = {r: [] for r in block.parts}
    active = list(block.parts)
    for place in range(block.places):
        for r in list(active):
            row = rows[r]
            assert isinstance(row.sample, Greedy | Random)
            parts = {k: p[place] for k, p in block.parts[r].items()}
            fused = ensemble.fused(r, parts, len(next(iter(block.parts[r].values()))) - 1 - place)
            target = row.sample.distribution(fused)
            if place < len(block.drafted[r]):
                drafted, draft = block.drafted[r][place], block.drawn_from[r][place]
                token = row.sample.judge(drafted, draft, target)
                accepted = token == drafted
                row.drafted, row.accepted = row.drafted + 1, row.accepted + accepted
                pace.note(accepted)
            else:
                token, accepted = row.sample.draw(target), False
                if pace.learns and (top_part := block.parts[r].get(ensemble.top(r))) is not None:
                    pace.note(row.sample.overlap(row.sample.distribution(top_part[place, : len(target)]), target))
            chosen[r].append(token)
            row.note(token, fused, parts)
            row.observe(token, parts)
            yield r, token
            if row.done or not accepted:
                active.remove(r)
        if not active:
            break
    return chosen


def _read(ensemble: Ensemble, rows: Sequence[Row], last: Mapping[int, int], sizes: Mapping[int, int]) -> Round:
    """Read the last token of each row and draft size - 1 more; fewer if a drafter fails."""
    tops = {r: ensemble.top(r) for r in last}
    blocks = {r: [token] for r, token in last.items()}
    drawn_from: dict[int, list[Tensor]] = {r: [] for r in last}
    rows_of: dict[Slot, list[Tensor]] = defaultdict(list)

    def note(answers: dict[Slot, Tensor]) -> dict[Slot, Tensor]:
        for slot, logprobs in answers.items():
            rows_of[slot].append(logprobs)
        return answers

    next_: dict[Slot, list[int]] = {
        (k, r): [token] for r, token in last.items() for k in (ensemble.awake(r) if sizes[r] == 1 else [tops[r]])
    }
    while next_:
        answers = note(ensemble.read(next_))
        next_ = {}
        for r, block in blocks.items():
            if len(block) < sizes[r] and (slot := (tops[r], r)) in answers:
                sample, common = rows[r].sample, min(len(part) for part in ensemble.parts(r).values())
                assert isinstance(sample, Greedy | Random)
                drawn_from[r].append(sample.distribution(answers[slot][0, :common]))
                block.append(sample.draw(drawn_from[r][-1]))
                next_[slot] = block[-1:]
    while others := {(k, r): block for r, block in blocks.items() for k in ensemble.awake(r) if (k, r) not in rows_of}:
        note(ensemble.read(others))
    parts = {r: {k: torch.cat(rows_of[k, r]) for k in ensemble.awake(r)} for r in last}
    return Round(parts, {r: block[1:] for r, block in blocks.items()}, drawn_from)


class Pace:
    """Chooses how many places a round has.

    A round of γ places costs γ passes of the drafters, and one pass of the other members over γ times the tokens. With
    an acceptance rate of p it gives 1 + p + ... + p^(γ-1) tokens. γ depends on the acceptance so far and on the running
    members, never on time: a seed reproduces its answer.

    Args:
        ensemble: the running members.
        fixed: γ; None: choose it.

    Attributes:
        learns: whether note() has an effect.
    """

    def __init__(self, ensemble: Ensemble, fixed: int | None) -> None:
        self._ensemble, self._fixed = ensemble, fixed
        self._accepted, self._verified = FIRST_RATE * FIRST_COUNT, FIRST_COUNT
        self.learns = fixed is None

    def note(self, accepted: float) -> None:
        """Record that a draft token was accepted (1) or not (0), or the probability that it would have been."""
        self._accepted = self._accepted * MEMORY + accepted
        self._verified = self._verified * MEMORY + 1

    def can_pay(self, rows: Collection[int]) -> bool:
        """Whether drafting could save time if every draft token were accepted."""
        return bool(rows) and self._best(rows, 1.0) > 1

    def places(self, rows: Collection[int]) -> int:
        """γ of the next round of these rows."""
        return self._best(rows, self._accepted / self._verified)

    def _best(self, rows: Collection[int], rate: float) -> int:
        if self._fixed is not None:
            return self._fixed
        cost = self._costs(rows)
        return min(range(1, MOST_PLACES + 1), key=lambda n: cost[n] / sum(rate**place for place in range(n)))

    def _costs(self, rows: Collection[int]) -> dict[int, float]:
        """The cost of a round by γ, in bytes of weights read."""
        tops = {r: self._ensemble.top(r) for r in rows}
        awake = {r: self._ensemble.awake(r) for r in rows}
        drafts, others = defaultdict[Engine, int](int), defaultdict[Engine, int](int)
        for (k, r), line in self._ensemble.lines.items():
            if k in awake.get(r, ()):
                (drafts if k == tops[r] else others)[line.sequence.engine] += 1
        all_members = {engine: drafts[engine] + others[engine] for engine in {*drafts, *others}}
        costs = {1: _cost(all_members)}
        for n in range(2, MOST_PLACES + 1):
            costs[n] = n * _cost(drafts) + _cost({engine: n * count for engine, count in others.items()})
        return costs


def _cost(tokens: Mapping[Engine, int]) -> float:
    """Cost of one pass of each engine over so many tokens. Requests share the cost; places run at the same time."""
    busy: dict[Hashable, float] = defaultdict(float)
    for engine, count in tokens.items():
        if count:
            busy[engine.place] += engine.size * (1 / engine.requests + engine.packing * (count - 1))
    return max(busy.values(), default=0.0)
