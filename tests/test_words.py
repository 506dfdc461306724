"""Common tokens and words of several segmentations, against a slow definition over sets of characters."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packllm.align.words import Scored, common_tokens, common_words, is_word_boundary

INF = math.inf


def scored(*tokens: tuple[int, int, float], ids: list[int] | None = None) -> Scored:
    """Tokens given as (start, end, log-probability)."""
    starts, ends, logprobs = ([t[i] for t in tokens] for i in range(3))
    ids = ids or list(range(len(tokens)))
    return Scored(ids, starts, ends, list(range(1, len(tokens) + 1)), torch.tensor(logprobs, dtype=torch.float64))


def test_by_hand():
    #       0123456789
    text = "a big sea"
    one = scored((0, 1, -1.0), (1, 5, -2.0), (5, 7, -0.25), (7, 9, -0.5))  # a| big| s|ea
    two = scored((0, 1, -0.5), (1, 3, -1.0), (3, 5, -1.5), (5, 9, -4.0))  # a| b|ig| sea
    matrix, spans = common_words(text, [one, two])
    assert spans == [(0, 1), (1, 5), (5, 9)]
    assert matrix.tolist() == [[-1.0, -2.0, -0.75], [-0.5, -2.5, -4.0]]
    assert matrix.dtype == torch.float64


def test_a_token_across_a_boundary_joins_the_words():
    text = "in the sea"
    one = scored((0, 2, -1.0), (2, 6, -1.0), (6, 10, -1.0))
    two = scored((0, 6, -3.0), (6, 10, -2.0))
    matrix, spans = common_words(text, [one, two])
    assert spans == [(0, 6), (6, 10)]
    assert matrix.tolist() == [[-2.0, -1.0], [-3.0, -2.0]]


def test_a_member_without_bos_loses_its_first_word_for_all():
    text = "ab cd ef"
    whole = scored((0, 2, -1.0), (2, 5, -2.0), (5, 8, -3.0))
    late = scored((1, 2, -0.5), (2, 5, -1.0), (5, 8, -1.5))  # "a" came first, unpredicted
    matrix, spans = common_words(text, [whole, late])
    assert spans == [(2, 5), (5, 8)]
    assert matrix.tolist() == [[-2.0, -3.0], [-1.0, -1.5]]


def test_bytes_of_one_character_share_its_span():
    text = "日本 x"
    one = scored((0, 1, -1.0), (0, 1, -1.0), (0, 1, -1.0), (1, 2, -2.0), (2, 4, -3.0))
    two = scored((0, 2, -5.0), (2, 3, -0.5), (3, 4, -0.5))
    matrix, spans = common_words(text, [one, two])
    assert spans == [(0, 2), (2, 4)]
    assert matrix.tolist() == [[-5.0, -3.0], [-5.0, -1.0]]


def test_an_impossible_token_does_not_spoil_the_words_after_it():
    text = "a b c"
    one = scored((0, 1, -1.0), (1, 3, -INF), (3, 5, -2.0))
    matrix, spans = common_words(text, [one])
    assert spans == [(0, 1), (1, 3), (3, 5)]
    assert matrix.tolist() == [[-1.0, -INF, -2.0]]


def test_nothing_in_common_and_nothing_at_all():
    matrix, spans = common_words("ab", [scored((0, 2, -1.0)), scored()])
    assert (matrix.shape, spans) == ((2, 0), [])
    matrix, spans = common_words("", [scored(), scored()])
    assert (matrix.shape, spans) == ((2, 0), [])


@pytest.mark.parametrize(
    ("text", "boundaries"),
    [
        ("ab cd", [0, 2, 3, 5]),
        ("x1 y", [0, 2, 3, 4]),
        ("it's", [0, 2, 3, 4]),
        ("日本x", [0, 1, 2, 3]),
        ("한국 어", [0, 2, 3, 4]),
        ("e\u0301te\u0301", [0, 5]),  # a combining mark belongs to its letter
        ("हिन्दी है", [0, 6, 7, 9]),
        ("ไม่ได้", [0, 1, 3, 4, 6]),
        ("Ωμέγα", [0, 5]),
    ],
)
def test_word_boundaries(text, boundaries):
    assert [at for at in range(len(text) + 1) if is_word_boundary(text, at)] == boundaries


def test_common_tokens_takes_the_last_of_each():
    one = scored((0, 2, -1.0), (2, 5, -2.0), (5, 8, -3.0), ids=[7, 8, 9])
    two = scored((2, 5, -4.0), (5, 8, -5.0), ids=[8, 9])
    common = common_tokens([one, two])
    assert [c.ids for c in common] == [[8, 9], [8, 9]]
    assert [c.logprobs.tolist() for c in common] == [[-2.0, -3.0], [-4.0, -5.0]]
    assert [c.positions for c in common] == [[2, 3], [1, 2]]
    assert [(c.starts, c.ends) for c in common] == [([2, 5], [5, 8])] * 2


@pytest.mark.parametrize(
    "other",
    [
        scored((2, 5, -4.0), (5, 8, -5.0), ids=[8, 7]),  # another token
        scored((2, 4, -4.0), (5, 8, -5.0), ids=[8, 9]),  # it ends elsewhere
        scored((3, 5, -4.0), (5, 8, -5.0), ids=[8, 9]),  # it starts elsewhere
    ],
)
def test_common_tokens_must_agree(other):
    assert common_tokens([scored((2, 5, -2.0), (5, 8, -3.0), ids=[8, 9]), other]) is None


def slow_words(text: str, members: list[Scored]) -> tuple[list[list[float]], list[tuple[int, int]]]:
    """A cut is a place where, for every member, a token starts or its last one ends, and none goes across."""

    def spans(member: Scored) -> list[tuple[int, int]]:
        return list(zip(member.starts, member.ends, strict=True))

    def is_cut(member: Scored, at: int) -> bool:
        if any(start < at < end for start, end in spans(member)):
            return False
        return any(start == at for start, _ in spans(member)) or at == max((e for _, e in spans(member)), default=None)

    cuts = [at for at in range(len(text) + 1) if is_word_boundary(text, at) and all(is_cut(m, at) for m in members)]
    columns, words = [], []
    for begin, end in pairwise(cuts):
        column = []
        for member in members:
            inside = [i for i, (s, e) in enumerate(spans(member)) if begin <= s and e <= end]
            covered = {at for i in inside for at in range(member.starts[i], member.ends[i])}
            if covered == set(range(begin, end)):
                column.append(sum(member.logprobs[i].item() for i in inside))
        if len(column) == len(members):
            columns.append(column)
            words.append((begin, end))
    return columns, words


@st.composite
def segmentations(draw) -> tuple[str, list[Scored]]:
    """A text as several members split it: tokens of characters and of bytes, gaps, a missing first token."""
    text = draw(st.text(st.sampled_from("ab1 .日한é\u0301😀"), max_size=14))
    members = []
    for _ in range(draw(st.integers(1, 3))):
        tokens: list[tuple[int, int, float]] = []
        at = 0
        while at < len(text):
            size = draw(st.integers(1, 3))
            kind = draw(st.sampled_from(["token", "token", "token", "bytes", "across", "gap"]))
            end = min(len(text), at + size)
            value = -float(draw(st.integers(0, 40))) / 8
            if kind == "token":
                tokens.append((at, end, value))
            elif kind == "bytes":  # a character in several tokens
                end = at + 1
                tokens += [(at, end, value)] * size
            elif kind == "across":  # a token that ends inside a character, and one with its other bytes
                tokens += [(at, end, value), (end - 1, end, -0.5)]
            at = end
        if draw(st.booleans()):
            tokens = tokens[1:]
        members.append(scored(*tokens))
    return text, members


@settings(max_examples=500, deadline=None)
@given(segmentations())
def test_words_of_any_segmentations(case):
    text, members = case
    matrix, spans = common_words(text, members)
    columns, words = slow_words(text, members)
    assert spans == words
    assert matrix.shape == (len(members), len(words))
    assert matrix.T.tolist() == columns  # eighths: the sums are exact


@settings(max_examples=300, deadline=None)
@given(segmentations(), st.lists(st.integers(0, 3), min_size=3, max_size=3), st.booleans())
def test_common_tokens_of_any_segmentations(case, missing, one_text):
    _, members = case
    if one_text:  # the same tokens for all, some without the first ones
        ids, starts, ends = members[0].ids, members[0].starts, members[0].ends
        members = [
            Scored(
                ids[m:],
                starts[m:],
                ends[m:],
                list(range(len(ids) - min(m, len(ids)))),
                torch.randn(len(ids)).double()[m:],
            )
            for m in missing
        ]
    tokens = [list(zip(m.ids, m.starts, m.ends, strict=True)) for m in members]
    count = min(len(t) for t in tokens)
    ends = [t[len(t) - count :] for t in tokens]
    common = common_tokens(members)
    if any(end != ends[0] for end in ends):
        assert common is None
        return
    assert common is not None
    for got, member, expected in zip(common, members, ends, strict=True):
        assert list(zip(got.ids, got.starts, got.ends, strict=True)) == expected
        assert got.logprobs.tolist() == member.logprobs.tolist()[len(member.ids) - count :]
        assert got.positions == member.positions[len(member.ids) - count :]
    if one_text:
        assert count == max(0, len(ids) - max(missing))
