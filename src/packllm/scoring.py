"""From prefilled sessions to weights: what each member gave the scored text, in a common unit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from packllm.align.words import Scored, common_tokens, common_words
from packllm.member import Session
from packllm.options import Options
from packllm.prompt import Encoded
from packllm.weights import Problem, Weights, find, weigh
from packllm.weights.result import Unit

BLOCK_BYTES = 32 * 2**20
"""Most bytes of logits of all members that an optimiser's block holds."""


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

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self._sessions), self._count, self._size

    def blocks(self, positions: Tensor, members: Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        chosen = range(len(self._sessions)) if members is None else members
        step = max(1, BLOCK_BYTES // (4 * self._size * len(chosen)))
        streams = [self._sessions[k].logits(self._row, positions + self._skip[k], step) for k in chosen]
        block = torch.empty(len(chosen), step, self._size, device=self._sessions[0].logprobs.device)
        for part in positions.split(step):
            for k, stream in enumerate(streams):
                block[k, : len(part)] = next(stream)[..., : self._size]
            yield part, block[:, : len(part)]


def scored(encoded: Encoded, logprobs: Tensor) -> Scored:
    """One member's tokens of the scored text, with what the prefill gave them."""
    ids = [encoded.ids[at] for at in encoded.positions]
    return Scored(ids, encoded.starts, encoded.ends, encoded.positions, logprobs)


def weights_of(
    sessions: Sequence[Session],
    row: int,
    encoded: Sequence[Encoded],
    logprobs: Sequence[Tensor],
    options: Options,
) -> Weights:
    """Weights of one prompt from what each member gave its scored text.

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
            source = SessionSource(sessions, row, skip, matrix.shape[1])
            targets = torch.tensor(common[0].ids)
    else:
        matrix, spans = common_words(text, tokens)
    unit, units = _unit(options, common is not None, text, spans)
    nll = -matrix.sum(1) / max(units, 1)
    if unit == "token" and common is None:  # asked for: each member per token of its own, not comparable
        nll = torch.stack([-t.logprobs.mean() for t in tokens])
    problem = Problem(tuple(m.name for m in members), matrix, nll, source, targets)
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
