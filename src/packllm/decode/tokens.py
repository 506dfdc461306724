"""Token-by-token fusion of members that share a vocabulary (PackLLM Eq. 1, cBTM Eq. 8)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from packllm.align.shared import Shared
from packllm.decode.failures import Failures, normalised
from packllm.decode.line import Line, read_lines
from packllm.decode.logprobs import Recorder
from packllm.decode.moving import Moving
from packllm.decode.pool import fuse
from packllm.decode.sampling import Greedy, Sampler
from packllm.engines.member import Author
from packllm.errors import MemberError
from packllm.results import TokenLogprob
from packllm.weights.result import Weights


@dataclass
class Row:
    """One answer of a batch while it is decoded.

    Attributes:
        weights: for the next token; members at 0 do not run.
        sample: chooses a token from the fused log-probabilities.
        limit: maximum number of tokens.
        done: set by the consumer of the tokens to end this row.
        drafted, accepted: how many draft tokens were proposed and accepted.
        recorder: records the tokens' log-probabilities, if they are requested.
        moving: the adaptive weights; None: weights are fixed.
    """

    weights: Weights
    sample: Sampler
    limit: int = 2**31
    done: bool = False
    drafted: int = 0
    accepted: int = 0
    recorder: Recorder | None = None
    moving: Moving | None = None

    def note(self, token: int, fused: Tensor, parts: Mapping[int, Tensor]) -> None:
        """Record a chosen token with the fused log-probabilities (V,) and each member's (V_k,), by index."""
        if self.recorder is not None:
            self.recorder.note(token, fused, parts)

    def take_logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """Log-probabilities of the tokens since the last call; None if they are not requested."""
        return None if self.recorder is None else self.recorder.take()

    def fork(self) -> Row:
        """A copy that decodes independently of this one."""
        return replace(self, moving=self.moving and self.moving.fork())

    @property
    def room(self) -> int:
        """Tokens until the end of the block in which members sleep (see moving.py)."""
        return 2**31 if self.moving is None else self.moving.room

    def observe(self, token: int, parts: Mapping[int, Tensor]) -> None:
        """Adapt the weights to a chosen token, by the members' log-probabilities `parts` (V_k,)."""
        if self.moving is not None:
            likelihoods = {k: math.exp(float(logprobs[token])) for k, logprobs in parts.items()}
            self.weights = self.moving.observe(self.weights, likelihoods, [token])

    def observe_segment(self, logprobs: Mapping[int, float], tokens: int) -> None:
        """As observe(), for a segment of several tokens with these log-likelihoods."""
        if self.moving is not None:
            peak = max(logprobs.values(), default=0.0)
            likelihoods = {k: math.exp(value - peak) if peak > -math.inf else 0.0 for k, value in logprobs.items()}
            self.weights = self.moving.observe(self.weights, likelihoods, [0] * max(tokens, 1))


LIKELIEST = 64
"""Entries of a row that greedy decoding asks for. Of 2,387 tokens of SmolLM2 and an expert, 6 rows were read again."""

Slot = tuple[int, int]
"""(member, row of the batch)."""


class Ensemble:
    """The running members, each at the end of the rows in which it has weight.

    Args:
        lines: by slot, at the ends of the prompts; lines without weight are closed.
        rows: the batch; a failed member may be dropped from a row's weights.
        failures: decides whether a failed member is dropped; None: any failure is raised.

    Attributes:
        again: rows that were read again, because their likeliest tokens were not enough.
    """

    def __init__(self, lines: Mapping[Slot, Line], rows: Sequence[Row], failures: Failures | None = None) -> None:
        self.lines, self._rows = dict(lines), rows
        members = {k for k, _ in lines}
        self.again = 0
        self._failures = failures or Failures(rows[0].weights.names, members, False)
        self.retire()

    def retire(self) -> None:
        """Close the lines of rows that are done and of members without weight."""
        for k, r in list(self.lines):
            if self._rows[r].done or self._rows[r].weights.values[k] == 0:
                self.lines.pop((k, r)).close()

    def running(self, row: int) -> list[int]:
        """Indices of the members that run for a row, ascending."""
        return sorted(k for k, r in self.lines if r == row)

    def awake(self, row: int) -> list[int]:
        """Indices of the running members that read this block, that is, do not sleep (see moving.py)."""
        moving = self._rows[row].moving
        return [k for k in self.running(row) if moving is None or k not in moving.asleep]

    def top(self, row: int) -> int:
        """The awake member with the largest weight, the first among equals."""
        return max(self.awake(row), key=self._rows[row].weights.values.__getitem__)

    def parts(self, row: int) -> dict[int, Tensor]:
        """The next-token log-probabilities of each awake member: float32 (V_k,)."""
        return {k: self.lines[k, row].next_logprobs for k in self.awake(row)}

    def spare(self) -> None:
        """Ask for the likeliest tokens only, in rows where only the fused argmax matters. The other entries are upper
        bounds, so the argmax is right if its own entries are exact."""
        for (_, r), line in self.lines.items():
            row = self._rows[r]
            plain = isinstance(row.sample, Greedy) and row.recorder is None and row.room == 2**31
            line.sequence.top = LIKELIEST if plain and min(row.weights.values) >= 0 else None

    def fused(self, row: int, parts: dict[int, Tensor], back: int = 0) -> Tensor:
        """Fuse the members' log-probabilities (V_k,) of `back` tokens ago: float32 (V,). If bounds leave the argmax
        open, rows with all entries are read, and replace those in `parts`."""
        asked: set[int] = set()
        while True:
            fused = fused_row(parts, self._rows[row].weights)
            best, vague = int(fused.argmax()), []
            for k in parts.keys() - asked:
                found = self.lines.get((k, row))
                if found is not None and -math.inf < found.bound(back) >= float(parts[k][best]):
                    vague.append(k)
            if not vague:
                return fused
            asked.update(vague)
            self.again += len(vague)
            for k in vague:
                line = self.lines[k, row]
                if line.sequence.top is not None:  # ask for more from now on, or for all
                    more = 4 * line.sequence.top
                    line.sequence.top = more if 8 * more < line.member.vocabulary_size else None
                try:
                    parts[k] = line.whole(back)
                except MemberError as error:
                    self._lose(k, error)
                    del parts[k]

    def step(self, tokens: Mapping[int, int]) -> None:
        """Append a token to each of these rows; the other rows must be done."""
        self.retire()
        self.end_blocks(tokens)
        done: set[Slot] = set()
        while blocks := {(k, r): [t] for r, t in tokens.items() for k in self.awake(r) if (k, r) not in done}:
            self.read(blocks)
            done |= blocks.keys()

    def end_blocks(self, rows: Iterable[int]) -> None:
        """At the end of a block, let members that slept read it, except its last token, which is still unread."""
        self._wake([r for r in rows if (moving := self._rows[r].moving) is not None and moving.ends], again=True)

    def _moving(self, row: int) -> Moving:
        moving = self._rows[row].moving
        assert moving is not None
        return moving

    def _wake(self, rows: Sequence[int], again: bool) -> None:
        """Let sleeping members read the block that they skipped, and update the weights with it.

        Args:
            again: whether members may sleep through the next block too.
        """
        current: dict[Slot, Tensor] = {}
        missed: dict[Slot, list[int]] = {}
        for r in rows:
            moving = self._moving(r)
            for k in moving.asleep.intersection(self.running(r)):
                current[k, r] = self.lines[k, r].next_logprobs[None]
                if len(moving.unread) > 1:
                    missed[k, r] = moving.unread[:-1]
            moving.asleep = set()
        answers = self.read(missed) if missed else {}
        for r in rows:
            slept = {
                slot[0]: torch.cat([here, answers[slot]]) if slot in answers else here
                for slot, here in current.items()
                if slot[1] == r and slot in self.lines
            }
            self._rows[r].weights = self._moving(r).wake(self._rows[r].weights, slept, again)

    def read(self, blocks: Mapping[Slot, Sequence[int]]) -> dict[Slot, Tensor]:
        """Let slots read on, in common passes where possible. Failed members are dropped, or their error raised.

        Returns:
            The log-probabilities after each token, float32 (n, V_k), for each slot that did not fail.
        """
        answers: dict[Slot, Tensor] = {}
        failed: dict[int, MemberError] = {}
        for slot, answer in read_lines(self.lines, blocks).items():
            if isinstance(answer, MemberError):
                failed.setdefault(slot[0], answer)
            else:
                answers[slot] = answer
        for k, error in failed.items():
            self._lose(k, error)
        if failed and (without_awake := [r for r in sorted({r for _, r in self.lines}) if not self.awake(r)]):
            self._wake(without_awake, again=False)
        return {slot: answer for slot, answer in answers.items() if slot in self.lines}

    def forget(self, counts: Mapping[int, int], parts: Mapping[int, Mapping[int, Tensor]]) -> None:
        """Drop the last tokens of each row.

        Args:
            counts: how many, by row; the other rows must be done.
            parts: by row and member, float32 (n, V_k): the log-probabilities after the last n tokens.
        """
        for (k, r), line in self.lines.items():
            if counts.get(r) and k in parts[r]:
                line.crop(len(line) - counts[r], parts[r][k][-1 - counts[r]])

    def _lose(self, k: int, error: MemberError) -> None:
        """Continue without a member, in all rows, or raise the error."""
        rows = [r for member, r in self.lines if member == k]
        _, weights = self._failures.lose(error, [k], [self._rows[r].weights for r in rows])
        for r, remaining in zip(rows, weights, strict=True):
            self._rows[r].weights = remaining
            self.lines.pop((k, r)).close()

    def close(self) -> None:
        for line in self.lines.values():
            line.close()


def fused_row(parts: dict[int, Tensor], weights: Weights) -> Tensor:
    """Fuse members' log-probabilities (..., V), by index, with a row's weights; ids that a member lacks get no mass."""
    members = sorted(parts)
    size = min(parts[k].shape[-1] for k in members)
    device = parts[members[0]].device
    stacked = torch.stack([parts[k][..., :size].to(device) for k in members])
    values = [weights.values[k] for k in members]
    if len(members) < len(weights.values) - weights.values.count(0.0):  # some members sleep
        values = list(normalised(values))
    return fuse(stacked, values, weights.pool)


def in_one_vocabulary(lines: Mapping[int, Line]) -> tuple[dict[int, Line], Shared | None]:
    """The lines of members of one family, by index, with shared ids; and the Shared, None if all ids are shared."""
    members = [line.member for line in lines.values()]
    shared = shared_by(members)
    if shared is None:
        return dict(lines), None
    return {k: line.speaking(shared, at) for at, (k, line) in enumerate(lines.items())}, shared


def shared_by(members: Sequence[Author]) -> Shared | None:
    """The shared tokens of members of one family, as ids of the first member; None if all ids and ends are equal."""
    vocabularies, ends = [m.vocabulary for m in members], [m.end_ids for m in members]
    return Shared.of(vocabularies, ends, [m.vocabulary_size for m in members])


def generate_ids(ensemble: Ensemble, rows: Sequence[Row]) -> Iterator[tuple[int, int]]:
    """Fuse, choose, step: yield (row, token id) as soon as each token is chosen.

    A row ends when the consumer sets its `done`. The next tokens are computed when they are requested.
    """
    while True:
        tokens = {}
        for r, row in enumerate(rows):
            if not row.done:
                parts = ensemble.parts(r)
                fused = ensemble.fused(r, parts)
                tokens[r] = row.sample(fused)
                row.note(tokens[r], fused, parts)
                row.observe(tokens[r], parts)
                yield r, tokens[r]
        if all(row.done for row in rows):
            return
        ensemble.step({r: token for r, token in tokens.items() if not rows[r].done})


def drop_small(weights: Weights, minimum: float) -> Weights:
    """Weights with members below `minimum` at 0 and the others renormalised.

    In the linear pool, dropping a total weight of δ changes every next-token distribution by at most δ in total
    variation. Weights outside the simplex (DExperts) are not changed: their size does not measure influence.
    """
    values = weights.values
    if min(values) < 0:
        return weights
    floor = min(minimum, max(values))  # the largest weight always remains
    large = [value if value >= floor else 0.0 for value in values]
    return weights if large == list(values) else replace(weights, values=normalised(large))
