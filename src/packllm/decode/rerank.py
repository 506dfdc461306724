"""Whole texts instead of segments: their fused likelihood across vocabularies, and the best of several answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing

import torch
from torch import Tensor

from packllm.align.words import Scored, common_words, offsets
from packllm.decode.failures import Failures
from packllm.decode.line import Line, score_rows
from packllm.decode.remote import ServerLine
from packllm.decode.segments import Writers
from packllm.decode.text import TextStream
from packllm.decode.writer import Segment
from packllm.engines.member import Member
from packllm.errors import MemberError
from packllm.results import FinishReason
from packllm.weights.result import Weights

TOGETHER = 8
"""Most texts that a member reads in one forward."""


def text_logprobs(lines: Mapping[int, Line | ServerLine], weights: Weights, texts: Sequence[str]) -> Iterator[float]:
    """log p(text) of each text under members of any vocabularies, fused word by word (METHODS §4).

    Each member scores a text with its own tokenizer. The text is cut where a word ends at token boundaries of
    all members, and every word fused: log Σ λ_k p_k(word) in the linear pool, Σ λ_k log p_k(word) in the log pool
    (whose normaliser over all words nobody can compute; it is at most 1, so this is a lower bound). A member
    whose tokenizer does not know the text, or that can only write, is left out, and the others' weights renormalised.

    Args:
        lines: at the end of the prompt, by index of the members that run; they stay there.
        weights: final weights; those of the running members are used.
        texts: each at least one character.

    Yields:
        Nats, one number per text, in order; -infinity for a text that no member's tokenizer knows.
    """
    for start in range(0, len(texts), TOGETHER):
        group = texts[start : start + TOGETHER]
        here = {k: line for k, line in lines.items() if isinstance(line, Line)}
        known = {k: _known(line.member, group) for k, line in here.items()}
        scores = score_rows(here, {k: list(ids.values()) for k, ids in known.items()})
        read_by: list[dict[int, Scored]] = [{} for _ in group]
        for k, ids in known.items():
            for row, given in zip(ids, scores[k], strict=True):
                read_by[row][k] = spelled(here[k].member, group[row], ids[row], given)
        for k, line in lines.items():
            for by, told in zip(read_by, line.spelled(group) if isinstance(line, ServerLine) else (), strict=False):
                if told is not None:
                    by[k] = told
        for text, by in zip(group, read_by, strict=True):
            yield _fused(text, by, weights)


def _known(member: Member, texts: Sequence[str]) -> dict[int, list[int]]:
    """Texts as a member's ids, by index; none of texts that it cannot spell."""
    ids = {row: member.encoder.continuation(text) for row, text in enumerate(texts)}
    return {row: ids[row] for row in ids if ids[row] and member.vocabulary.special.get("unk") not in ids[row]}


def spelled(member: Member, text: str, ids: list[int], logprobs: Tensor) -> Scored:
    """Tokens of a text with their places in it; one token that is all of it, where the tokenizer writes it in
    another form (lower case, say)."""
    places = offsets(text, [member.vocabulary.text_bytes(i) for i in ids])
    if places is None:
        return Scored([0], [0], [len(text)], [0], logprobs.sum()[None])
    return Scored(ids, *places, list(range(len(ids))), logprobs)


def _fused(text: str, by: dict[int, Scored], weights: Weights) -> float:
    if not by:
        return -math.inf
    matrix, spans = common_words(text, list(by.values()))
    assert sum(end - start for start, end in spans) == len(text)
    values = torch.tensor([weights.values[k] for k in by], dtype=torch.float64)
    values = values / values.sum()
    if weights.pool == "linear":
        return float((values.log()[:, None] + matrix).logsumexp(0).sum())
    return float(values @ matrix.sum(1).clamp_min(-1e30))


def best_answer(
    teams: Iterable[Sequence[int]],
    writers: Callable[[Sequence[int]], Writers],
    limit: int,
    stream: Callable[[], TextStream],
    failures: Failures,
) -> tuple[str, FinishReason, int]:
    """Cool+Rerank: the best of what several teams write (the whole pack, and each member alone), as the pack
    rates it (Cool-Fusion §3.3).

    Args:
        teams: the members of each; the first one's rate, once the answers are written.
        writers: makes writers of members, at the end of the prompt; closed here.
        limit: most tokens of each answer.
        stream: makes what turns an answer's pieces into text.
        failures: who takes no part any more.

    Returns:
        Text, why it ends, and its tokens.
    """
    answers: dict[Segment, tuple[str, FinishReason, int]] = {}
    everybody: Sequence[int] = ()
    for team in teams:
        everybody = everybody or team
        left = [k for k in team if k not in failures.members]
        pieces = stream()
        try:
            steps = list(_steps(writers(left), limit, pieces)) if left else []
        except MemberError:
            if not failures.members.issuperset(team):
                raise
            continue  # a member that wrote alone: the others go on
        if not steps:
            continue
        text = "".join(piece for piece, _, _ in steps)
        _, reason, count = steps[-1]
        assert reason is not None
        answers.setdefault(Segment(text, reason == "stop" and not pieces.stopped), (text, reason, count))
    if len(answers) == 1:
        return next(iter(answers.values()))
    segments = list(answers)
    with closing(writers([k for k in everybody if k not in failures.members])) as judging:
        ratings = judging.rate(segments)
    return answers[segments[max(range(len(segments)), key=ratings.__getitem__)]]


def _steps(team: Writers, limit: int, pieces: TextStream) -> Iterator[tuple[str, FinishReason | None, int]]:
    with closing(team):
        yield from team.answer(limit, pieces)
