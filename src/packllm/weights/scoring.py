"""From prefilled sessions to weights: what each member gave the scored text, in a common unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from packllm.align.words import Scored, common_tokens, common_words
from packllm.chat.prompt import Encoded
from packllm.engines.transformers.engine import Engine
from packllm.engines.transformers.session import Session
from packllm.errors import blamed_on
from packllm.options import Options
from packllm.weights import Problem, Weights, find, weigh
from packllm.weights.result import Unit

BLOCK_BYTES = 48 * 2**20
"""Most bytes of logits of all members that an optimiser's block holds: products of fewer rows are slow."""


def prefill(
    session: Session, positions: Sequence[Sequence[int]], keep: bool, late: bool
) -> Sequence[Tensor] | Sequence[None]:
    """Session.prefill; with `late`, which takes `keep`, a session that keeps hidden states leaves the scores, None
    then, to the weighting, which reads all logits anyway: one pass over the LM head instead of two."""
    if not late or session.engine.body is None:
        return session.prefill(positions, keep)
    session.prefill([[]] * session.rows, keep)
    session._scored = [torch.tensor(row, dtype=torch.long) for row in positions]
    return [None] * session.rows


class SessionSource:
    """LogitSource over the sessions that scored a prompt: nothing is stored but their hidden states.

    Args:
        sessions: K sessions, prefilled with keep=True.
        row: row of their batch.
        skip: scored positions of each session before the first common one.
        count: common scored positions.
    """

    def __init__(self, sessions: Sequence[Session], row: int, skip: Sequence[int], count: int) -> None:
        self._sessions, self._row, self._skip, self._count = sessions, row, skip, count
        self._size = min(session.member.vocabulary_size for session in sessions)
        self._device = sessions[0].logprobs.device

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self._sessions), self._count, self._size

    def blocks(self, positions: Tensor, members: Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        chosen = range(len(self._sessions)) if members is None else members
        step = self._step(len(chosen))
        streams = [self._sessions[k].logits(self._row, positions + self._skip[k], step) for k in chosen]
        buffer = torch.empty(len(chosen) * min(step, len(positions)) * self._size, device=self._device)
        for part in positions.split(step):
            block = buffer[: len(chosen) * len(part) * self._size].view(len(chosen), len(part), self._size)
            for k, stream in enumerate(streams):
                with blamed_on(self._sessions[chosen[k]].member.name):
                    block[k] = next(stream)[..., : self._size]
            yield part, block

    def _step(self, rows: int) -> int:
        """Positions a block of so many rows of logits each."""
        return max(1, BLOCK_BYTES // (4 * self._size * rows))


class OneHeadSource(SessionSource):
    """The same where all members have one LM head, logits W h_k + b: products of all members' hidden states."""

    def __init__(self, sessions: Sequence[Session], row: int, skip: Sequence[int], count: int) -> None:
        super().__init__(sessions, row, skip, count)
        head = sessions[0].engine.head
        self._matrix = head.weight[: self._size]
        self._bias = None if head.bias is None else head.bias[: self._size]
        unused = {i for session in sessions for i in session.member.vocabulary.unused if i < self._size}
        self._unused = torch.tensor(sorted(unused), dtype=torch.long, device=self._device)
        self._names = [session.member.name for session in sessions]  # who fails where the one head does

    @staticmethod
    def fits(sessions: Sequence[Session]) -> bool:
        """Whether the sessions hold hidden states, and the same float32 matrix makes logits of them."""
        engines = [session.engine for session in sessions]
        heads = [engine.head for engine in engines]
        return (
            all(session._hidden is not None for session in sessions)
            and all(type(engine) is Engine for engine in engines)  # others turn logits into what no matrix gives
            and all(type(head) is torch.nn.Linear for head in heads)
            and len({(_place(head.weight), _place(head.bias)) for head in heads}) == 1
            and heads[0].weight.dtype == torch.float32  # in halves W Σ λ_k h_k is not Σ λ_k W h_k, by more than 1e-4
        )

    def blocks(self, positions: Tensor, members: Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        chosen = range(len(self._sessions)) if members is None else members
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
                observed = targets[part].to(self._device)
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
        return torch.stack([_hidden(self._sessions[k], self._row, part + self._skip[k]) for k in members])

    def _buffer(self, rows: int) -> Tensor:
        return torch.empty(rows, self._size, device=self._device)

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


def _hidden(session: Session, row: int, which: Tensor) -> Tensor:
    """(n, d), what the head made Session.logits of."""
    assert session._hidden is not None
    columns = session._scored[row][which] - 1  # the index of the token before each
    return session._hidden[row, -session._prompt_lengths[row] :][columns.to(session._hidden.device)]


def _place(tensor: Tensor | None) -> tuple | None:
    return None if tensor is None else (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device)


def _source(sessions: Sequence[Session], row: int, skip: Sequence[int], count: int) -> SessionSource:
    kind = OneHeadSource if OneHeadSource.fits(sessions) else SessionSource
    return kind(sessions, row, skip, count)


def scored(encoded: Encoded, logprobs: Tensor | None) -> Scored:
    """One member's tokens of the scored text, with what the prefill gave them; NaN if it left that out."""
    if logprobs is None:
        logprobs = torch.full((len(encoded.positions),), torch.nan, dtype=torch.float64)
    ids = [encoded.ids[at] for at in encoded.positions]
    return Scored(ids, encoded.starts, encoded.ends, encoded.positions, logprobs)


def weights_of(
    sessions: Sequence[Session],
    row: int,
    encoded: Sequence[Encoded],
    logprobs: Sequence[Tensor | None],
    options: Options,
) -> Weights:
    """Weights of one prompt from what each member gave its scored text; None where the prefill left that out.

    Members that split the text into the same tokens are compared token by token; others by the words that
    end at boundaries of all of them (METHODS §4).
    """
    members = [session.member for session in sessions]
    tokens = [scored(e, p) for e, p in zip(encoded, logprobs, strict=True)]
    text = encoded[0].text
    same = all(member.vocabulary.same_as(members[0].vocabulary) for member in members[1:])
    common = common_tokens(tokens) if same else None
    source, targets = None, None
    if common is not None:
        matrix = torch.stack([member.logprobs for member in common])
        spans = list(zip(common[0].starts, common[0].ends, strict=True))
        if isinstance(options.weighting, str) and find(options.weighting).needs_logits and matrix.shape[1]:
            skip = [len(t.ids) - matrix.shape[1] for t in tokens]
            source = _source(sessions, row, skip, matrix.shape[1])
            targets = torch.tensor(common[0].ids)
    else:
        matrix, spans = common_words(text, tokens)
    unit, units = _unit(options, common is not None, text, spans)
    nll = None
    if unit == "token" and common is None:  # asked for: each member per token of its own, not comparable
        nll = torch.stack([-t.logprobs.mean() for t in tokens])
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
