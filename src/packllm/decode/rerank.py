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
from packllm.decode.tokens import Slot
from packllm.decode.writer import Segment
from packllm.engines.member import Member
from packllm.errors import MemberError
from packllm.results import FinishReason
from packllm.weights.result import Weights

TOGETHER = 8
"""Most texts that a member reads in one forward."""


def text_logprobs(
    lines: Mapping[Slot, Line | ServerLine], weights: Mapping[int, Weights], texts: Mapping[int, str]
) -> Iterator[tuple[int, float]]:
    """log p(text) of texts, each after a prompt, under members of any vocabularies, fused word by word (METHODS §4).

    Each member scores a text with its own tokenizer. The text is cut where a word ends at token boundaries of
    all members, and every word fused: log Σ λ_k p_k(word) in the linear pool, Σ λ_k log p_k(word) in the log pool
    (whose normaliser over all words nobody can compute; it is at most 1, so this is a lower bound). A member
    whose tokenizer does not know the text, or that can only write, is left out, and the others' weights renormalised.

    Args:
        lines: by (member, row), at the end of the row's prompt, of the members that run; they stay there.
        weights: final weights of each row; those of the running members are used.
        texts: of each row, at least one character.

    Yields:
        (row, nats), in order; -infinity for a text that no member's tokenizer knows.
    """
    rows = list(texts)
    for start in range(0, len(rows), TOGETHER):
        group = rows[start : start + TOGETHER]
        here = {slot: line for slot, line in lines.items() if isinstance(line, Line) and slot[1] in group}
        asked = {(k, r): _known(line.member, texts[r]) for (k, r), line in here.items()}
        known = {slot: ids for slot, ids in asked.items() if ids}
        scores = score_rows(here, {slot: [ids] for slot, ids in known.items()})
        read_by: dict[int, dict[int, Scored]] = {r: {} for r in group}
        for (k, r), ids in known.items():
            read_by[r][k] = spelled(here[k, r].member, texts[r], ids, scores[k, r][0])
        for (k, r), told in _spelled_far(lines, {r: texts[r] for r in group}).items():
            read_by[r][k] = told
        for r in group:
            yield r, _fused(texts[r], read_by[r], weights[r])


def _known(member: Member, text: str) -> list[int]:
    """A text as a member's ids; none for one that it cannot spell."""
    ids = member.encoder.continuation(text)
    return [] if member.vocabulary.special.get("unk") in ids else ids


def _spelled_far(lines: Mapping[Slot, Line | ServerLine], texts: Mapping[int, str]) -> dict[Slot, Scored]:
    """What members on servers give texts; each is asked once for all that follow one prompt."""
    by_line: dict[int, list[Slot]] = {}
    for slot, line in lines.items():
        if isinstance(line, ServerLine) and slot[1] in texts:
            by_line.setdefault(id(line), []).append(slot)
    found: dict[Slot, Scored] = {}
    for slots in by_line.values():
        line = lines[slots[0]]
        assert isinstance(line, ServerLine)
        for slot, told in zip(slots, line.spelled([texts[r] for _, r in slots]), strict=False):
            if told is not None:
                found[slot] = told
    return found


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
