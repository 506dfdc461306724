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
from packllm.decode.sampling import Sampler
from packllm.engines.member import Author
from packllm.errors import MemberError
from packllm.results import TokenLogprob
from packllm.weights.result import Weights


@dataclass
class Row:
    """One prompt of a batch while it is decoded.

    Attributes:
        weights: of what comes next; members at 0 do not run.
        sample: chooses a token from the fused log-probabilities.
        limit: most tokens that will be read.
        done: set by whoever reads the tokens, to end this row.
        drafted, accepted: tokens that one member proposed ahead of the others, and those of them that the answer
            took over.
        recorder: keeps the log-probabilities of the tokens, where they are asked for.
        moving: what moves the weights; None: they stay.
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
        """A token was chosen from log-probabilities (V,) that members' (V_k,), by index, fuse to."""
        if self.recorder is not None:
            self.recorder.note(token, fused, parts)

    def told(self) -> tuple[TokenLogprob, ...] | None:
        """Log-probabilities of the tokens since the last time; None where nobody asks."""
        return None if self.recorder is None else self.recorder.take()

    def fork(self) -> Row:
        """The same once more; this one stays as it is."""
        return replace(self, moving=self.moving and self.moving.fork())

    @property
    def room(self) -> int:
        """Tokens before members fall asleep or wake."""
        return 2**31 if self.moving is None else self.moving.room

    def observe(self, token: int, parts: Mapping[int, Tensor]) -> None:
        """A token was chosen where members expected `parts`, log-probabilities (V_k,); weights that move, do."""
        if self.moving is not None:
            given = {k: math.exp(float(logprobs[token])) for k, logprobs in parts.items()}
            self.weights = self.moving.observe(self.weights, given, [token])

    def hear(self, logprobs: Mapping[int, float], tokens: int) -> None:
        """As observe(), for a segment of several tokens that members gave these log-likelihoods."""
        if self.moving is not None:
            most = max(logprobs.values(), default=0.0)
            given = {k: math.exp(value - most) if most > -math.inf else 0.0 for k, value in logprobs.items()}
            self.weights = self.moving.observe(self.weights, given, [0] * max(tokens, 1))


Slot = tuple[int, int]
"""(member, row of the batch)."""


class Ensemble:
    """The members that run, each at the end of the rows in which its weight is not 0.

    Args:
        lines: by slot, at the ends of the prompts; closed where a member does not run.
        rows: the batch; a row's weights may lose a member that fails.
        failures: what becomes of a member that fails; None: it ends the work.
    """

    def __init__(self, lines: Mapping[Slot, Line], rows: Sequence[Row], failures: Failures | None = None) -> None:
        self.lines, self._rows = dict(lines), rows
        members = {k for k, _ in lines}
        self._failures = failures or Failures(rows[0].weights.names, members, False)
        self.retire()

    def retire(self) -> None:
        """Let go of rows that are done or give a member no weight."""
        for k, r in list(self.lines):
            if self._rows[r].done or self._rows[r].weights.values[k] == 0:
                self.lines.pop((k, r)).close()

    def running(self, row: int) -> list[int]:
        """Indices of the members that run for a row, ascending."""
        return sorted(k for k, r in self.lines if r == row)

    def awake(self, row: int) -> list[int]:
        """Those of them that do not sleep through this block of tokens."""
        moving = self._rows[row].moving
        return [k for k in self.running(row) if moving is None or k not in moving.asleep]

    def top(self, row: int) -> int:
        """The member with the largest weight of those that are awake, the first of equals."""
        return max(self.awake(row), key=self._rows[row].weights.values.__getitem__)

    def parts(self, row: int) -> dict[int, Tensor]:
        """float32 (V_k,), the next-token log-probabilities of each member that is awake for a row."""
        return {k: self.lines[k, row].here for k in self.awake(row)}

    def fused(self, row: int) -> Tensor:
        """The fused next-token distribution of a row: float32 (V,) log-probabilities."""
        return fused_row(self.parts(row), self._rows[row].weights)

    def step(self, tokens: Mapping[int, int]) -> None:
        """Append a token to each of the given rows; rows not named must be done."""
        self.retire()
        self.end_blocks(tokens)
        read: set[Slot] = set()
        while asked := {(k, r): [t] for r, t in tokens.items() for k in self.awake(r) if (k, r) not in read}:
            self.read(asked)
            read |= asked.keys()

    def end_blocks(self, rows: Iterable[int]) -> None:
        """Where a block is over, those who slept read it but for its last token, which nobody has read yet."""
        self._wake([r for r in rows if (moving := self._rows[r].moving) is not None and moving.ends], anew=True)

    def _moving(self, row: int) -> Moving:
        moving = self._rows[row].moving
        assert moving is not None
        return moving

    def _wake(self, rows: Sequence[int], anew: bool) -> None:
        """Let those who sleep read what they missed, and learn from it; `anew`: some sleep on."""
        before: dict[Slot, Tensor] = {}
        missed: dict[Slot, list[int]] = {}
        for r in rows:
            moving = self._moving(r)
            for k in moving.asleep.intersection(self.running(r)):
                before[k, r] = self.lines[k, r].here[None]
                if len(moving.unread) > 1:
                    missed[k, r] = moving.unread[:-1]
            moving.asleep = set()
        read = self.read(missed) if missed else {}
        for r in rows:
            heard = {
                slot[0]: torch.cat([here, read[slot]]) if slot in read else here
                for slot, here in before.items()
                if slot[1] == r and slot in self.lines
            }
            self._rows[r].weights = self._moving(r).wake(self._rows[r].weights, heard, anew)

    def read(self, blocks: Mapping[Slot, Sequence[int]]) -> dict[Slot, Tensor]:
        """Let slots read on, together where they can; members that fail are done without, or raise.

        Returns:
            float32 (n, V_k) for each slot that did not fail, the log-probabilities after each token.
        """
        found: dict[Slot, Tensor] = {}
        failed: dict[int, MemberError] = {}
        for slot, answer in read_lines(self.lines, blocks).items():
            if isinstance(answer, MemberError):
                failed.setdefault(slot[0], answer)
            else:
                found[slot] = answer
        for k, error in failed.items():
            self._lose(k, error)
        if failed and (alone := [r for r in sorted({r for _, r in self.lines}) if not self.awake(r)]):
            self._wake(alone, anew=False)
        return {slot: answer for slot, answer in found.items() if slot in self.lines}

    def forget(self, counts: Mapping[int, int], parts: Mapping[int, Mapping[int, Tensor]]) -> None:
        """Drop the last tokens of each row again, so many as given.

        Args:
            counts: by row; rows not named must be done.
            parts: by row and member, float32 (n, V_k): the log-probabilities after the last n tokens.
        """
        for (k, r), line in self.lines.items():
            if counts.get(r) and k in parts[r]:
                line.crop(len(line) - counts[r], parts[r][k][-1 - counts[r]])

    def _lose(self, k: int, error: MemberError) -> None:
        """Go on without a member, in all rows, or raise."""
        rows = [r for member, r in self.lines if member == k]
        _, weights = self._failures.lose(error, [k], [self._rows[r].weights for r in rows])
        for r, left in zip(rows, weights, strict=True):
            self._rows[r].weights = left
            self.lines.pop((k, r)).close()

    def close(self) -> None:
        for line in self.lines.values():
            line.close()


def fused_row(parts: dict[int, Tensor], weights: Weights) -> Tensor:
    """Log-probabilities (..., V) by member index, fused under a row's weights; ids that one member lacks carry
    no mass."""
    members = sorted(parts)
    size = min(parts[k].shape[-1] for k in members)
    device = parts[members[0]].device
    stacked = torch.stack([parts[k][..., :size].to(device) for k in members])
    values = [weights.values[k] for k in members]
    if len(members) < len(weights.values) - weights.values.count(0.0):  # some sleep
        values = list(normalised(values))
    return fuse(stacked, values, weights.pool)


def in_one_vocabulary(lines: Mapping[int, Line]) -> tuple[dict[int, Line], Shared | None]:
    """Lines of members of one family, by index, asked and answering in the ids that they share; None: in all of
    them."""
    members = [line.member for line in lines.values()]
    shared = shared_by(members)
    if shared is None:
        return dict(lines), None
    return {k: line.speaking(shared, at) for at, (k, line) in enumerate(lines.items())}, shared


def shared_by(members: Sequence[Author]) -> Shared | None:
    """What members of one family share, in the ids of the first; None: all ids, and the ends."""
    vocabularies, ends = [m.vocabulary for m in members], [m.end_ids for m in members]
    return Shared.of(vocabularies, ends, [m.vocabulary_size for m in members])


def generate_ids(ensemble: Ensemble, rows: Sequence[Row]) -> Iterator[tuple[int, int]]:
    """Fuse, choose, step: yield (row, token id), each token as soon as it is chosen.

    A row ends when the reader sets its `done`; the next tokens are computed when they are asked for.
    """
    while True:
        tokens = {}
        for r, row in enumerate(rows):
            if not row.done:
                parts = ensemble.parts(r)
                fused = fused_row(parts, row.weights)
                tokens[r] = row.sample(fused)
                row.note(tokens[r], fused, parts)
                row.observe(tokens[r], parts)
                yield r, tokens[r]
        if all(row.done for row in rows):
            return
        ensemble.step({r: token for r, token in tokens.items() if not rows[r].done})


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
