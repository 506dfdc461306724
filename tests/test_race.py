"""Members that explain the first part of a prompt too badly to count stop reading it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from conftest import TextPack as Pack
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import follows, llama3_like, phi3_like

from packllm import MemberError, OptionError
from packllm.decode.race import CONFIDENCE, FEWEST, hopeless
from packllm.weights import em

WORDS = [" red", " green", " blue"]
ROUND = dict(itertools.pairwise([*WORDS, WORDS[0]]))
BACK = {b: a for a, b in ROUND.items()}
RIGHT, LEFT = "a" + "".join(WORDS) * 100, "a" + "".join(reversed(WORDS)) * 100


def speaker(name: str, goes: dict[str, str], probability: float, tokenizer=llama3_like):
    return follows(tokenizer(WORDS), {a: {b: probability} for a, b in goes.items()}, name, window=2048)


@pytest.fixture(scope="module")
def members():
    """One for each direction, one that knows neither well."""
    return [speaker("right", ROUND, 0.9), speaker("left", BACK, 0.9), speaker("vague", ROUND, 0.5)]


def read(pack, prompt, **options):
    """Tokens that each member reads of a prompt, and its weights."""
    before = [member.engine.tokens for member in pack.members]
    weights = pack.weigh(prompt, prefix_cache_mb=0, **options)
    return [member.engine.tokens - b for member, b in zip(pack.members, before, strict=True)], weights


def test_who_falls_behind_reads_no_more(members):
    pack = Pack(members, min_weight=0.1, prefix_cache_mb=0)
    everything, full = read(pack, RIGHT)
    some, raced = read(pack, RIGHT, race=32)
    assert everything == [301] * 3 or len(set(everything)) == 1
    assert some[0] == everything[0]  # the last token is read, as without
    assert some[1] == 32
    assert 32 <= some[2] < everything[2]
    assert raced.top == full.top == "right"
    assert raced.nll[0] == pytest.approx(full.nll[0])
    assert raced.nll[1] is None
    assert raced.values[1] == full.values[1] == 0
    assert raced.values == pytest.approx(full.values, abs=1e-3)


def test_chunks_double(members):
    """While nobody falls behind, the ends of the chunks are 32, 64, 128 and 256 scored tokens."""
    twin = speaker("twin", ROUND, 0.9)
    pack = Pack([members[0], twin], min_weight=0.1, prefix_cache_mb=0)
    before = [member.engine.forwards for member in pack.members]
    tokens, _ = read(pack, RIGHT, race=32)
    passes = [member.engine.forwards - b for member, b in zip(pack.members, before, strict=True)]
    assert tokens[0] == tokens[1] == read(pack, RIGHT)[0][0]
    assert passes == [5, 5]


def test_rows_of_a_batch_race_by_themselves(members):
    pack = Pack(members, min_weight=0.1, max_tokens=6, race=32, prefix_cache_mb=0)
    plain = pack.generate_batch([RIGHT, LEFT], race=0)
    raced = pack.generate_batch([RIGHT, LEFT])
    assert [g.weights.top for g in raced] == ["right", "left"]
    assert (
        [g.text for g in raced]
        == [g.text for g in plain]
        == [" red green blue red green blue", " blue green red blue green red"]
    )
    assert [pack.generate(prompt).weights for prompt in (RIGHT, LEFT)] == [g.weights for g in raced]


def test_at_threshold_0_nobody_stops(members):
    pack = Pack(members, min_weight=0.0, prefix_cache_mb=0)
    assert read(pack, RIGHT, race=16) == read(pack, RIGHT)


def test_a_short_prompt_is_read_as_ever(members):
    pack = Pack(members, min_weight=0.1, prefix_cache_mb=0)
    assert read(pack, RIGHT[:30], race=32) == read(pack, RIGHT[:30])


def test_members_of_other_vocabularies_race_by_words(members):
    other = speaker("other", ROUND, 0.9, phi3_like)
    pack = Pack([members[1], other, members[0]], min_weight=0.1, prefix_cache_mb=0)
    everything, full = read(pack, RIGHT)
    some, raced = read(pack, RIGHT, race=32)
    assert some[0] == 32
    assert some[1] == everything[1]
    assert raced.values[0] == full.values[0] == 0
    assert raced.top == full.top


def test_a_second_prompt_starts_from_what_was_read(members):
    pack = Pack(members, min_weight=0.1, race=32, max_tokens=3)
    first = pack.generate(RIGHT)
    again = pack.generate(RIGHT)
    assert again.text == first.text
    assert again.weights.values == pytest.approx(first.weights.values)
    assert pack.generate(RIGHT, race=0).weights.values == pytest.approx(first.weights.values, abs=1e-3)


def test_a_member_that_fails_while_it_races(members):
    bad = speaker("bad", ROUND, 0.8)
    left = [1]

    def fail(*_):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("out of memory")

    pack = Pack([members[0], bad], min_weight=0.0001, race=FEWEST - 1, max_tokens=3, prefix_cache_mb=0)
    bad.engine.model.get_decoder().register_forward_pre_hook(fail)
    with pytest.raises(MemberError, match="bad"):
        pack.generate(RIGHT)
    left[0] = 1
    assert pack.generate(RIGHT, on_member_error="drop").weights.values == (1.0, 0.0)


def test_the_evidence_by_hand():
    # A quarter of the tokens favour the second member (.9 against .3), the others the first (.2 against .6). At weight
    # .1 the slope of a token is then .6 / .36 or -.4 / .56: -.119 on average, with a standard deviation of 1.031.
    needed = (CONFIDENCE * 1.031 / 0.119) ** 2
    for count, stops in ((needed * 0.95, []), (needed * 1.05, [1])):
        quarters = int(count / 4)
        matrix = np.log(np.array([[0.3, 0.6, 0.6, 0.6] * quarters, [0.9, 0.2, 0.2, 0.2] * quarters]))
        assert hopeless(matrix, 0.1) == stops
    for count, stops in ((FEWEST - 1, []), (FEWEST, [1])):
        assert hopeless(np.log(np.array([[0.8] * count, [0.4] * count])), 0.1) == stops
    assert hopeless(np.log(np.array([[0.8] * 500] * 2)), 0.4) == []  # twins: each may have all of the weight


matrices = st.integers(2, 4).flatmap(
    lambda count: st.lists(
        st.lists(st.floats(1e-12, 1.0) | st.just(0.0), min_size=count, max_size=count), min_size=1, max_size=90
    )
)


@given(matrices, st.sampled_from([0.01, 0.05, 0.1, 0.3]))
@settings(max_examples=150, derandomize=True, deadline=None)
def test_nobody_stops_whom_the_text_so_far_supports(rows, minimum):
    with np.errstate(divide="ignore"):
        matrix = np.log(np.array(rows).T)
    found, weights = hopeless(matrix, minimum), em(matrix, alpha=0.0)
    assert int(np.argmax(em(matrix))) not in found
    assert all(weights[k] < minimum + 1e-6 for k in found)


@pytest.mark.parametrize(
    "options",
    [
        {"weighting": "opt"},
        {"weighting": {"right": 1.0}},
        {"prior": {"right": 0.2, "left": 0.4, "vague": 0.4}},
        {"race": -1},
        {"race": 2.5},
    ],
)
def test_what_cannot_race_is_refused(members, options):
    with pytest.raises(OptionError, match="race"):
        Pack(members).weigh(RIGHT, **{"race": 32, **options})
