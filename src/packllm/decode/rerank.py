"""Fused likelihoods of whole texts across vocabularies, and the best of several answers."""

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
from packllm.decode.tokens import Slot
from packllm.decode.writer import Segment
from packllm.engines.member import Member
from packllm.errors import MemberError
from packllm.results import FinishReason
from packllm.weights.result import Weights

TOGETHER = 8
"""How many texts a member reads in one forward pass, at most."""


def text_logprobs(
    lines: Mapping[Slot, Line | ServerLine], weights: Mapping[int, Weights], texts: Mapping[int, str]
) -> Iterator[tuple[int, float]]:
    """log p of texts, each after a prompt, under members with any vocabularies, fused word by word (METHODS §4).

    Each member scores a text with its own tokenizer. The text is split at the word ends that are token boundaries of
    all members, and every word is fused: log Σ λ_k p_k(word) in the linear pool, Σ λ_k log p_k(word) in the log pool.
    (The log pool's normaliser over all words cannot be computed; it is at most 1, so the sum is a lower bound.)
    Members that can only write, or whose tokenizer cannot spell the text, are left out, and the other weights
    renormalised.

    Args:
        lines: the running members' lines by (member, row), at the end of the row's prompt; they do not move.
        weights: final weights of each row.
        texts: by row, each at least one character.

    Yields:
        (row, nats), in order; -infinity for a text that no member's tokenizer can spell.
    """
    rows = list(texts)
    for start in range(0, len(rows), TOGETHER):
        group = rows[start : start + TOGETHER]
        local = {slot: line for slot, line in lines.items() if isinstance(line, Line) and slot[1] in group}
        ids_of = {(k, r): _ids_of(line.member, texts[r]) for (k, r), line in local.items()}
        spellable = {slot: ids for slot, ids in ids_of.items() if ids}
        scores = score_rows(local, {slot: [ids] for slot, ids in spellable.items()})
        read_by: dict[int, dict[int, Scored]] = {r: {} for r in group}
        for (k, r), ids in spellable.items():
            read_by[r][k] = spelled(local[k, r].member, texts[r], ids, scores[k, r][0])
        for (k, r), tokens in _spelled_far(lines, {r: texts[r] for r in group}).items():
            read_by[r][k] = tokens
        for r in group:
            yield r, _fused(texts[r], read_by[r], weights[r])


def _ids_of(member: Member, text: str) -> list[int]:
    """The member's ids of a text; [] if its tokenizer cannot spell it."""
    ids = member.encoder.continuation(text)
    return [] if member.vocabulary.special.get("unk") in ids else ids


def _spelled_far(lines: Mapping[Slot, Line | ServerLine], texts: Mapping[int, str]) -> dict[Slot, Scored]:
    """Scores of texts by members on servers; each member gets one request for all texts after one prompt."""
    by_line: dict[int, list[Slot]] = {}
    for slot, line in lines.items():
        if isinstance(line, ServerLine) and slot[1] in texts:
            by_line.setdefault(id(line), []).append(slot)
    results: dict[Slot, Scored] = {}
    for slots in by_line.values():
        line = lines[slots[0]]
        assert isinstance(line, ServerLine)
        for slot, tokens in zip(slots, line.spelled([texts[r] for _, r in slots]), strict=False):
            if tokens is not None:
                results[slot] = tokens
    return results


def spelled(member: Member, text: str, ids: list[int], logprobs: Tensor) -> Scored:
    """A text's tokens with their offsets and log-probabilities. If the tokenizer changes the text (to lower case,
    say), all of it counts as one token."""
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
) -> tuple[str, FinishReason, int, int]:
    """Cool+Rerank: let several teams write an answer each (the whole pack, and each member alone); the pack rates them
    and the best one is returned (Cool-Fusion §3.3).

    Args:
        teams: the members of each team; the first team rates all answers.
        writers: makes the writers of a team, at the end of the prompt; they are closed here.
        limit: maximum number of tokens of an answer.
        stream: makes an object that turns an answer's pieces into text.
        failures: the members that failed.

    Returns:
        Text, finish reason, number of tokens, and how many of them are reasoning.
    """
    answers: dict[Segment, tuple[str, FinishReason, int, int]] = {}
    raters: Sequence[int] = ()
    for team in teams:
        raters = raters or team
        remaining = [k for k in team if k not in failures.members]
        pieces = stream()
        try:
            steps = list(_steps(writers(remaining), limit, pieces)) if remaining else []
        except MemberError:
            if not failures.members.issuperset(team):
                raise
            continue  # a team of one that failed: the other teams continue
        if not steps:
            continue
        text = "".join(piece for piece, _, _ in steps)
        _, reason, count = steps[-1]
        assert reason is not None
        answer = text, reason, count, pieces.reasoning_tokens
        answers.setdefault(Segment(text, reason == "stop" and not pieces.stopped), answer)
    if len(answers) == 1:
        return next(iter(answers.values()))
    segments = list(answers)
    with closing(writers([k for k in raters if k not in failures.members])) as judging:
        ratings = judging.rate(segments)
    return answers[segments[max(range(len(segments)), key=ratings.__getitem__)]]


def _steps(team: Writers, limit: int, pieces: TextStream) -> Iterator[tuple[str, FinishReason | None, int]]:
    with closing(team):
        yield from team.answer(limit, pieces)
