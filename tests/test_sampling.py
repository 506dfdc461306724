"""Samplers on distributions small enough to work out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packllm.decode.sampling import filtered, make_sampler

FOUR = [0.1, 0.4, 0.2, 0.3]
DRAWS = 4000
MARGIN = 0.06
"""Hoeffding: a frequency is off by more than this with odds below 2 exp(-2 · 4000 · 0.06²) < 7e-13."""


def logs(probabilities) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float32).log()


def remaining(probabilities, temperature=1.0, top_p=1.0, top_k=None) -> dict[int, float]:
    """{token id: probability} after the filters."""
    scaled, ids = filtered(logs(probabilities), temperature, top_p, top_k)
    order = range(len(scaled)) if ids is None else ids.tolist()
    return dict(zip(order, scaled.softmax(-1).tolist(), strict=True))


def close(expected: dict[int, float]):
    return pytest.approx(expected, abs=1e-6)


def test_without_filters_nothing_changes():
    assert remaining(FOUR) == close({0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3})


def test_temperature_sharpens_and_flattens():
    # 1/2: squares .01 .16 .04 .09, sum .30. 2: square roots.
    assert remaining(FOUR, temperature=0.5) == close({0: 1 / 30, 1: 16 / 30, 2: 4 / 30, 3: 9 / 30})
    roots = [math.sqrt(p) for p in FOUR]
    assert remaining(FOUR, temperature=2.0) == close({i: r / sum(roots) for i, r in enumerate(roots)})


def test_top_k_keeps_the_likeliest():
    assert remaining(FOUR, top_k=2) == close({1: 4 / 7, 3: 3 / 7})
    assert remaining(FOUR, top_k=1) == close({1: 1.0})
    assert remaining(FOUR, top_k=4) == close({0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3})
    assert remaining(FOUR, top_k=99) == close({0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3})


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, [1]), (0.39, [1]), (0.45, [1, 3]), (0.69, [1, 3]), (0.75, [1, 3, 2]), (0.95, [1, 3, 2, 0])],
)
def test_top_p_keeps_the_token_that_crosses(top_p, kept):
    total = sum(FOUR[i] for i in kept)
    result = remaining(FOUR, top_p=top_p)
    assert list(result) == kept
    assert result == close({i: FOUR[i] / total for i in kept})


def test_top_p_stops_where_the_sum_is_reached_exactly():
    # Binary fractions, so that the sums are exact: .5 reaches .5, the next token does not count.
    assert remaining([0.25, 0.5, 0.125, 0.125], top_p=0.5) == close({1: 1.0})
    assert remaining([0.25, 0.5, 0.125, 0.125], top_p=0.75) == close({1: 2 / 3, 0: 1 / 3})


def test_all_filters_together():
    # Temperature 1/2: .01 .16 .04 .09 .0025. top_k 3 leaves .16 .09 .04 (of .29: .5517 .3103 .1379); top_p .6
    # of that keeps the first two. (Without top_k, or on the unsharpened numbers, three would stay.)
    five = [0.1, 0.4, 0.2, 0.3, 0.05]
    assert remaining(five, temperature=0.5, top_p=0.6, top_k=3) == close({1: 16 / 25, 3: 9 / 25})
    # top_p counts what top_k left: .4/.7 = .571 of the top two, so .55 keeps one; of all four .55 would keep two.
    assert remaining(FOUR, top_p=0.55, top_k=2) == close({1: 1.0})
    assert remaining(FOUR, top_p=0.55) == close({1: 4 / 7, 3: 3 / 7})


def test_filters_keep_the_smaller_id_of_equals():
    many = torch.zeros(300)
    assert filtered(many, 1.0, 1.0, 3)[1].tolist() == [0, 1, 2]
    assert filtered(many, 1.0, 4.5 / 300, None)[1].tolist() == [0, 1, 2, 3, 4]
    assert make_sampler(1.0, 1.0, 1, seed=0)(many) == make_sampler(0.0, 1.0, None, None)(many) == 0


@pytest.mark.parametrize(
    "filters",
    [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.65}, {"temperature": 2.0, "top_k": 3, "top_p": 0.8}],
)
def test_frequencies_follow_the_filtered_distribution(filters):
    settings_ = {"temperature": 1.0, "top_p": 1.0, "top_k": None} | filters
    sample = make_sampler(**settings_, seed=7)
    counts = torch.bincount(torch.tensor([sample(logs(FOUR)) for _ in range(DRAWS)]), minlength=4)
    expected = remaining(FOUR, **filters)
    for token, count in enumerate(counts.tolist()):
        assert abs(count / DRAWS - expected.get(token, 0.0)) < MARGIN
        assert count == 0 or token in expected


@pytest.mark.parametrize("filters", [{}, {"temperature": 0.5, "top_k": 3}, {"top_p": 0.65}])
def test_the_distribution_is_that_of_the_draws(filters):
    sample = make_sampler(**({"temperature": 1.0, "top_p": 1.0, "top_k": None} | filters), seed=7)
    expected = remaining(FOUR, **filters)
    assert sample.distribution(logs(FOUR)).tolist() == pytest.approx([expected.get(token, 0.0) for token in range(4)])
    greedy = make_sampler(0.0, 1.0, None, None)
    assert greedy.draw(greedy.distribution(logs(FOUR))) == greedy(logs(FOUR)) == 1


def test_a_draft_is_judged_by_both_distributions():
    # draft .1 .4 .2 .3, target .4 .1 .2 .3: tokens 0, 2, 3 are always taken over, 1 with .1/.4, else 0 is drawn.
    draft, target = torch.tensor(FOUR), torch.tensor([0.4, 0.1, 0.2, 0.3])
    sample = make_sampler(1.0, 1.0, None, 3)
    assert sample.overlap(draft, target) == pytest.approx(0.7)
    for token in (0, 2, 3):
        assert {sample.judge(token, draft, target) for _ in range(200)} == {token}
    judged = [sample.judge(1, draft, target) for _ in range(DRAWS)]
    assert set(judged) == {0, 1}
    assert abs(judged.count(1) / DRAWS - 0.25) < MARGIN
    greedy = make_sampler(0.0, 1.0, None, None)
    assert (greedy.judge(1, draft, target), greedy.overlap(draft, target)) == (0, 0.0)


def test_same_seed_same_draws():
    def draws(seed):
        sample = make_sampler(1.0, 0.99, 60, seed)
        return [sample(torch.zeros(64)) for _ in range(40)]

    assert draws(3) == draws(3)
    # Two runs of 40 draws of 60 equals agree with odds 60^-40.
    assert draws(3) != draws(4)
    assert draws(None) != draws(None)


def test_samplers_do_not_share_or_touch_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, two = (make_sampler(1.0, 1.0, None, 5) for _ in range(2))
    interleaved = [(one(torch.zeros(50)), two(torch.zeros(50))) for _ in range(20)]
    assert all(a == b for a, b in interleaved)
    assert torch.equal(torch.get_rng_state(), before)


def test_greedy_takes_the_smallest_id_of_equals():
    greedy = make_sampler(0.0, 1.0, None, None)
    assert greedy(logs([0.1, 0.4, 0.1, 0.4])) == 1
    assert greedy(torch.zeros(1000)) == 0


def test_impossible_tokens_are_never_drawn():
    probabilities = [0.0, 0.5, 0.0, 0.5, 0.0]
    for filters in ({}, {"top_k": 4}, {"top_p": 1.0 - 1e-7}, {"temperature": 50.0}):
        sample = make_sampler(**({"temperature": 1.0, "top_p": 1.0, "top_k": None, "seed": 1} | filters))
        assert {sample(logs(probabilities)) for _ in range(500)} == {1, 3}  # one of them missing: odds 2^-499


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature):
    for top_p, top_k in ((1.0, None), (0.9, None), (1.0, 2)):
        assert make_sampler(temperature, top_p, top_k, 0)(logs(FOUR)) == 1


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.floats(-8, 0, width=32) | st.just(-math.inf), min_size=1, max_size=9),
    temperature=st.sampled_from([0.25, 1.0, 3.0]),
    top_p=st.floats(0.01, 1.0),
    top_k=st.none() | st.integers(1, 10),
)
def test_filters_against_plain_loops(values, temperature, top_p, top_k):
    values[0] = 0.0  # at least one token is possible
    powers = [math.exp(v / temperature) for v in values]
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))[:top_k]
    total = sum(powers[i] for i in order)
    kept, reached = [], 0.0
    for i in order:
        if kept and reached >= top_p:
            break
        kept.append(i)
        reached += powers[i] / total
        if abs(reached - top_p) < 1e-5:
            return  # float32 may round to either side
    scaled, ids = filtered(torch.tensor(values), temperature, top_p, top_k)
    got = list(range(len(values))) if ids is None else ids.tolist()
    possible = [i for i in got if values[i] > -math.inf]
    assert sorted(possible) == sorted(i for i in kept if values[i] > -math.inf)
    remaining_total = sum(powers[i] for i in kept)
    for i, p in zip(got, scaled.softmax(-1).tolist(), strict=True):
        assert p == pytest.approx(powers[i] / remaining_total, abs=1e-5)
