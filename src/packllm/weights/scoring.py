"""From what members read to weights: what each gave the scored text, in a common unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from packllm.align.shared import Shared
from packllm.chat.prompt import Encoded
from packllm.engines import base
from packllm.engines.base import KeepsHidden, Read
from packllm.engines.member import Member
from packllm.errors import blamed_on
from packllm.options import Options
from packllm.weights import Problem, Weights, find, weigh
from packllm.weights.common import in_common
from packllm.weights.result import Unit

BLOCK_BYTES = 48 * 2**20
"""Most bytes of logits of all members that an optimiser's block holds: products of fewer rows are slow."""

READ_TOKENS = 256
"""Tokens that are read at once where logits have to be made again."""


@dataclass(frozen=True)
class Behind:
    """Where the logits behind a member's scores can be had again.

    Attributes:
        member: whose they are.
        sequence: what it has read.
        places: int64 (t,), ascending: the index of the id before each scored token.
    """

    member: Member
    sequence: base.Sequence
    places: Tensor

    def hidden(self, which: Tensor) -> Tensor | None:
        """(n, d), what the head made the logits at some of the places of; None where that is not kept."""
        engine = self.sequence.engine
        return engine.hidden(self.sequence, self.places[which]) if isinstance(engine, KeepsHidden) else None

    def logits(self, which: Tensor, step: int) -> Iterator[Tensor]:
        """float32 (step, V) at some of the places (ascending), block by block; log-probabilities, which differ from
        logits by a constant, where the text has to be read again."""
        engine = self.sequence.engine
        if isinstance(engine, KeepsHidden) and (hidden := engine.hidden(self.sequence, self.places[which])) is not None:
            for part in hidden.split(step):
                yield engine.logits(part)
            return
        places, held = self.places[which].tolist(), torch.empty(0)
        again = self.member.open()
        again.gate = self.sequence.gate
        try:
            while places:
                start = len(again.ids)
                (answer,) = engine.read([Read(again, self.sequence.ids[start : start + READ_TOKENS], "all")])
                if isinstance(answer, Exception):
                    raise self.member.failed(answer)
                inside = [place - start for place in places if place < len(again.ids)]
                places = places[len(inside) :]
                held = torch.cat([held.to(answer), answer[inside]])
                while len(held) >= step or (len(held) and not places):
                    yield held[:step]
                    held = held[step:]
        finally:
            again.close()


class SequenceSource:
    """LogitSource over the sequences that scored a prompt: nothing is stored but their hidden states.

    Args:
        behind: K members' logits, at the same t scored positions.
        shared: the ids that they are told in; None: the members' own, which are the same.
    """

    def __init__(self, behind: Sequence[Behind], shared: Shared | None = None) -> None:
        self._behind, self._shared = behind, shared
        self._size = shared.size if shared else min(one.member.vocabulary_size for one in behind)

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self._behind), len(self._behind[0].places), self._size

    def blocks(self, positions: Tensor, members: Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        chosen = range(len(self._behind)) if members is None else members
        step = self._step(len(chosen))
        streams = [self._behind[k].logits(positions, step) for k in chosen]
        buffer: Tensor | None = None
        for part in positions.split(step):
            for at, (k, stream) in enumerate(zip(chosen, streams, strict=True)):
                with blamed_on(self._behind[k].member.name):
                    logits = next(stream)
                    logits = logits[..., : self._size] if self._shared is None else self._shared.rows(k, logits)
                if buffer is None:
                    buffer = torch.empty(len(chosen) * step * self._size, device=logits.device)
                block = buffer[: len(chosen) * len(part) * self._size].view(len(chosen), len(part), self._size)
                block[at] = logits
            yield part, block

    def _step(self, rows: int) -> int:
        """Positions a block of so many rows of logits each."""
        return max(1, BLOCK_BYTES // (4 * self._size * rows))


class OneHeadSource(SequenceSource):
    """The same where all members have one LM head, logits W h_k + b: products of all members' hidden states."""

    def __init__(self, behind: Sequence[Behind]) -> None:
        super().__init__(behind)
        found = _head(behind[0])
        assert found is not None
        weight, bias, _ = found
        self._matrix = weight[: self._size]
        self._bias = None if bias is None else bias[: self._size]
        unused = {i for one in behind for i in one.member.vocabulary.unused if i < self._size}
        self._unused = torch.tensor(sorted(unused), dtype=torch.long, device=weight.device)
        self._names = [one.member.name for one in behind]  # who fails where the one head does

    @staticmethod
    def fits(behind: Sequence[Behind]) -> bool:
        """Whether hidden states are kept, and the same float32 matrix makes logits of them."""
        heads = [_head(one) for one in behind]
        if any(head is None for head in heads) or any(
            one.hidden(torch.arange(len(one.places))) is None for one in behind
        ):
            return False
        known = [head for head in heads if head is not None]
        return (
            len({(_place(weight), _place(bias)) for weight, bias, _ in known}) == 1
            and known[0][0].dtype == torch.float32  # in halves W Σ λ_k h_k is not Σ λ_k W h_k, by more than 1e-4
        )

    def blocks(self, positions: Tensor, members: Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        chosen = range(len(self._behind)) if members is None else members
        step = self._step(len(chosen))
        with blamed_on(*self._names):
            buffer = self._buffer(len(chosen) * min(step, len(positions)))
            for part in positions.split(step):
                hidden = self._hidden(part, chosen)
                yield part, self._logits(hidden.flatten(0, 1), buffer).view(len(chosen), len(part), self._size)

    def losses(
        self, weights: np.ndarray, positions: Tensor, targets: Tensor, members: Sequence[int]
    ) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
        with blamed_on(*self._names):
            step = self._step(1)
            buffer = self._buffer(min(step, len(positions)))
            for part in positions.split(step):
                hidden = self._hidden(part, members)
                fused = self._logits(torch.tensordot(torch.from_numpy(weights).to(hidden), hidden, 1), buffer)
                observed = targets[part].to(self._matrix.device)
                score = fused.gather(-1, observed[:, None])[:, 0].clone()
                peak = fused.amax(-1, keepdim=True)
                chances = fused.sub_(peak).exp_()
                total = chances.sum(-1)
                yield total.log() + peak[:, 0] - score, partial(self._gradient, hidden, chances, total, observed)

    def _gradient(self, hidden: Tensor, chances: Tensor, total: Tensor, observed: Tensor, rows: Tensor) -> Tensor:
        """Of h_k · Wᵀ(p − e_x), with p = chances / total."""
        with blamed_on(*self._names):
            expected = chances[rows] @ self._matrix / total[rows, None]
            return (hidden[:, rows] * (expected - self._matrix[observed[rows]])).sum(-1)

    def _hidden(self, part: Tensor, members: Sequence[int]) -> Tensor:
        """(len(members), b, d), what the head reads at the scored positions."""
        found = [self._behind[k].hidden(part) for k in members]
        return torch.stack([hidden for hidden in found if hidden is not None])

    def _buffer(self, rows: int) -> Tensor:
        return torch.empty(rows, self._size, device=self._matrix.device)

    def _logits(self, hidden: Tensor, buffer: Tensor) -> Tensor:
        """(n, V), in the buffer's first rows."""
        logits = buffer[: len(hidden)]
        with torch.no_grad():
            torch.mm(hidden, self._matrix.T, out=logits)
            if self._bias is not None:
                logits += self._bias
            if len(self._unused):
                logits.index_fill_(-1, self._unused, -torch.inf)
        return logits


def _head(one: Behind) -> tuple[Tensor, Tensor | None, Tensor] | None:
    engine = one.sequence.engine
    return engine.head() if isinstance(engine, KeepsHidden) else None


def _place(tensor: Tensor | None) -> tuple | None:
    return None if tensor is None else (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device)


def source_of(
    members: Sequence[Member],
    sequences: Sequence[base.Sequence],
    encoded: Sequence[Encoded],
    skip: Sequence[int],
    count: int,
    shared: Shared | None = None,
) -> SequenceSource:
    """The logits behind `count` scored tokens of each member, without its first `skip` ones; in shared ids, if
    given."""
    behind = [
        Behind(member, sequence, torch.tensor(e.positions[begin : begin + count], dtype=torch.long) - 1)
        for member, sequence, e, begin in zip(members, sequences, encoded, skip, strict=True)
    ]
    return OneHeadSource(behind) if shared is None and OneHeadSource.fits(behind) else SequenceSource(behind, shared)


def weights_of(
    members: Sequence[Member],
    sequences: Sequence[base.Sequence],
    encoded: Sequence[Encoded],
    logprobs: Sequence[Tensor | None],
    options: Options,
) -> Weights:
    """Weights of one prompt from what each member gave its scored text; None where the reading left that out.

    Args:
        members, sequences, encoded, logprobs: K members, what each has read of the prompt, how it is encoded for it,
            and float64 (t_k,) of its scored tokens.
        options: of the request.
    """
    found = in_common(members, encoded, logprobs)
    matrix, text = found.matrix, encoded[0].text
    source, targets = None, None
    reads = isinstance(options.weighting, str) and find(options.weighting).needs_logits
    if found.tokens is not None and reads and matrix.shape[1]:
        skip = [len(own.ids) - matrix.shape[1] for own in found.own]
        source = source_of(members, sequences, encoded, skip, matrix.shape[1], found.shared)
        targets = torch.tensor(found.tokens[0].ids)
    unit, units = _unit(options, found.tokens is not None, text, found.spans)
    nll = None
    if unit == "token" and found.tokens is None:  # asked for: each member per token of its own, not comparable
        nll = torch.stack([-own.logprobs.mean() for own in found.own])
    known = None if source is not None and any(p is None for p in logprobs) else matrix
    problem = Problem(tuple(m.name for m in members), known, nll, source, targets, text, units)
    weights = weigh(problem, options, unit)
    columns = matrix.shape[1]
    if columns and units != columns:  # weightings report the mean over columns: tokens or words
        scale = columns / units
        weights = replace(
            weights,
            scored=units,
            fused_nll=None if weights.fused_nll is None else weights.fused_nll * scale,
            gap=None if weights.gap is None else weights.gap * scale,
        )
    return weights


def _unit(options: Options, same_tokens: bool, text: str, spans: Sequence[tuple[int, int]]) -> tuple[Unit, int]:
    """What NLLs are means over, and how many of them the scored spans hold."""
    if options.unit == "token" or (options.unit is None and same_tokens):
        return "token", len(spans)
    if options.unit is None and options.weighting == "em":
        return "word", len(spans)
    covered = 0
    reached = 0
    for start, end in spans:  # bytes of one character may share a span
        covered += len(text[max(start, reached) : end].encode())
        reached = max(reached, end)
    return "byte", covered
