"""Computes a prompt's weights from the members' scores of its text, in a common unit."""

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
"""Bytes of all members' logits in a block of an optimiser, at most; smaller blocks make matrix products slow."""

READ_TOKENS = 256
"""Tokens read in one pass where logits have to be computed again."""


@dataclass(frozen=True)
class Behind:
    """A member's sequence, from which the logits behind its scores can be computed again.

    Attributes:
        member: the member.
        sequence: the ids that it has read.
        places: int64 (t,), ascending: the index of the id before each scored token.
    """

    member: Member
    sequence: base.Sequence
    places: Tensor

    def hidden(self, which: Tensor) -> Tensor | None:
        """The hidden states at places[which], float (n, d); None if the engine did not keep them."""
        engine = self.sequence.engine
        return engine.hidden(self.sequence, self.places[which]) if isinstance(engine, KeepsHidden) else None

    def logits(self, which: Tensor, step: int) -> Iterator[Tensor]:
        """Blocks float32 (step, V) of logits at places[which] (ascending). If the text has to be read again they are
        log-probabilities, which differ from logits by a constant."""
        engine = self.sequence.engine
        if isinstance(engine, KeepsHidden) and (hidden := engine.hidden(self.sequence, self.places[which])) is not None:
            for part in hidden.split(step):
                yield engine.logits(part)
            return
        places, rows = self.places[which].tolist(), torch.empty(0)
        rereading = self.member.open()
        rereading.gate = self.sequence.gate
        try:
            while places:
                start = len(rereading.ids)
                (answer,) = engine.read([Read(rereading, self.sequence.ids[start : start + READ_TOKENS], "all")])
                if isinstance(answer, Exception):
                    raise self.member.failed(answer)
                inside = [place - start for place in places if place < len(rereading.ids)]
                places = places[len(inside) :]
                rows = torch.cat([rows.to(answer), answer[inside]])
                while len(rows) >= step or (len(rows) and not places):
                    yield rows[:step]
                    rows = rows[step:]
        finally:
            rereading.close()


class SequenceSource:
    """A LogitSource over the sequences that scored a prompt; only their hidden states are stored.

    Args:
        behind: the sequences of K members, with the same t scored positions.
        shared: the shared ids of the members; None: they have the same ids.
    """

    def __init__(self, behind: Sequence[Behind], shared: Shared | None = None) -> None:
        self._behind, self._shared = behind, shared
        self._size = shared.size if shared else min(one.member.vocabulary_size for one in behind)

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self._behind), len(self._behind[0].places), self._size

    def blocks(self, positions: Tensor, members: Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        indices = range(len(self._behind)) if members is None else members
        step = self._step(len(indices))
        streams = [self._behind[k].logits(positions, step) for k in indices]
        buffer: Tensor | None = None
        for part in positions.split(step):
            for at, (k, stream) in enumerate(zip(indices, streams, strict=True)):
                with blamed_on(self._behind[k].member.name):
                    logits = next(stream)
                    logits = logits[..., : self._size] if self._shared is None else self._shared.rows(k, logits)
                if buffer is None:
                    buffer = torch.empty(len(indices) * step * self._size, device=logits.device)
                block = buffer[: len(indices) * len(part) * self._size].view(len(indices), len(part), self._size)
                block[at] = logits
            yield part, block

    def _step(self, rows: int) -> int:
        """Positions per block, with so many rows of logits for each position."""
        return max(1, BLOCK_BYTES // (4 * self._size * rows))


class OneHeadSource(SequenceSource):
    """A SequenceSource for members with a common LM head, logits W h_k + b: one product for all members."""

    def __init__(self, behind: Sequence[Behind]) -> None:
        super().__init__(behind)
        head = _head(behind[0])
        assert head is not None
        weight, bias, _ = head
        self._matrix = weight[: self._size]
        self._bias = None if bias is None else bias[: self._size]
        unused = {i for one in behind for i in one.member.vocabulary.unused if i < self._size}
        self._unused = torch.tensor(sorted(unused), dtype=torch.long, device=weight.device)
        self._names = [one.member.name for one in behind]  # all are named if the common head fails

    @staticmethod
    def fits(behind: Sequence[Behind]) -> bool:
        """Whether all members' hidden states are kept, and the same float32 matrix turns them into logits."""
        heads = [_head(one) for one in behind]
        if any(head is None for head in heads) or any(
            one.hidden(torch.arange(len(one.places))) is None for one in behind
        ):
            return False
        available = [head for head in heads if head is not None]
        return (
            len({(_place(weight), _place(bias)) for weight, bias, _ in available}) == 1
            and available[0][0].dtype
            == torch.float32  # in 16 bits W Σ λ_k h_k and Σ λ_k W h_k differ by more than 1e-4
        )

    def blocks(self, positions: Tensor, members: Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        indices = range(len(self._behind)) if members is None else members
        step = self._step(len(indices))
        with blamed_on(*self._names):
            buffer = self._buffer(len(indices) * min(step, len(positions)))
            for part in positions.split(step):
                hidden = self._hidden(part, indices)
                yield part, self._logits(hidden.flatten(0, 1), buffer).view(len(indices), len(part), self._size)

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
        """The gradient h_k · Wᵀ(p − e_x), with p = chances / total."""
        with blamed_on(*self._names):
            expected = chances[rows] @ self._matrix / total[rows, None]
            return (hidden[:, rows] * (expected - self._matrix[observed[rows]])).sum(-1)

    def _hidden(self, part: Tensor, members: Sequence[int]) -> Tensor:
        """The head's input at the scored positions: (len(members), b, d)."""
        states = [self._behind[k].hidden(part) for k in members]
        return torch.stack([hidden for hidden in states if hidden is not None])

    def _buffer(self, rows: int) -> Tensor:
        return torch.empty(rows, self._size, device=self._matrix.device)

    def _logits(self, hidden: Tensor, buffer: Tensor) -> Tensor:
        """Logits (n, V), stored in the buffer's first rows."""
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
    """The logits behind `count` scored tokens of each member, without its first `skip` tokens; as shared ids, if
    `shared` is given."""
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
    """Compute the weights of one prompt.

    Args:
        members, sequences, encoded, logprobs: of K members: the member, the sequence that read the prompt, its encoding
            of the prompt, and its log-probabilities of the scored tokens, float64 (t_k,), or None if they were not
            computed.
        options: of the request.
    """
    common = in_common(members, encoded, logprobs)
    matrix, text = common.matrix, encoded[0].text
    source, targets = None, None
    reads_logits = isinstance(options.weighting, str) and find(options.weighting).needs_logits
    if common.tokens is not None and reads_logits and matrix.shape[1]:
        skip = [len(own.ids) - matrix.shape[1] for own in common.own]
        source = source_of(members, sequences, encoded, skip, matrix.shape[1], common.shared)
        targets = torch.tensor(common.tokens[0].ids)
    unit, units = _unit(options, common.tokens is not None, text, common.spans)
    nll = None
    if unit == "token" and common.tokens is None:  # by request: each member per token of its own, not comparable
        nll = torch.stack([-own.logprobs.mean() for own in common.own])
    column_logprobs = None if source is not None and any(p is None for p in logprobs) else matrix
    problem = Problem(tuple(m.name for m in members), column_logprobs, nll, source, targets, text, units)
    weights = weigh(problem, options, unit)
    columns = matrix.shape[1]
    if columns and units != columns:  # weightings report means over columns, that is, tokens or words
        scale = columns / units
        weights = replace(
            weights,
            scored=units,
            fused_nll=None if weights.fused_nll is None else weights.fused_nll * scale,
            gap=None if weights.gap is None else weights.gap * scale,
        )
    return weights


def _unit(options: Options, same_tokens: bool, text: str, spans: Sequence[tuple[int, int]]) -> tuple[Unit, int]:
    """The unit of the NLLs, and the number of units in the scored spans."""
    if options.unit == "token" or (options.unit is None and same_tokens):
        return "token", len(spans)
    if options.unit is None and options.weighting == "em":
        return "word", len(spans)
    count = 0
    last_end = 0
    for start, end in spans:  # the bytes of one character may share a span
        count += len(text[max(start, last_end) : end].encode())
        last_end = max(last_end, end)
    return "byte", count
