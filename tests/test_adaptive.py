"""Weights that go on learning, against the sum over all hidden paths."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packllm.errors import WeightsError
from packllm.weights import Adaptive, Weights
from packllm.weights.adaptive import RATES, TRUST


def path_probability(path: tuple[int, ...], prior: list[float], rate: float) -> float:
    total = prior[path[0]]
    for before, after in itertools.pairwise(path):
        total *= (1 - rate) * (before == after) + rate * prior[after]
    return total


def brute_force(prior: list[float], seen: list[list[float]]) -> list[float]:
    """P(member of the next token | tokens so far), over every rate and every path of members."""
    found = [0.0] * len(prior)
    for rate, trust in zip(RATES, TRUST, strict=True):
        for path in itertools.product(range(len(prior)), repeat=len(seen) + 1):
            likelihood = math.prod(p[k] for p, k in zip(seen, path, strict=False))
            found[path[-1]] += trust * path_probability(path, prior, rate) * likelihood
    return [value / sum(found) for value in found]


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_sum_over_hidden_paths(seed):
    rng = np.random.default_rng(seed)
    prior, seen = rng.dirichlet(np.ones(3)).tolist(), (rng.random((5, 3)) ** 3).tolist()
    adaptive = Adaptive(tuple(prior))
    assert adaptive.weights() == pytest.approx(prior)
    for count, p in enumerate(seen, 1):
        adaptive.observe(p)
        assert adaptive.weights() == pytest.approx(brute_force(prior, seen[:count]), rel=1e-9)
    moved = np.abs(adaptive.weights() - prior).max()
    assert moved > 0.02


def test_the_rates_are_those_of_the_page():
    assert (RATES, TRUST) == ((0.05, 0.3, 1.0), (0.25, 0.25, 0.5))
    # One token by hand: rates .05 and .3 keep 95 % and 70 % of (.9, .1), the third none; the evidence is equal for all.
    adaptive = Adaptive([0.5, 0.5])
    adaptive.observe([0.9, 0.1])
    assert adaptive.weights() == pytest.approx(
        [0.25 * 0.88 + 0.25 * 0.78 + 0.5 * 0.5, 0.25 * 0.12 + 0.25 * 0.22 + 0.25]
    )


def log_mean(weights, p) -> float:
    with np.errstate(divide="ignore"):
        return float(np.logaddexp.reduce(np.log(weights) + np.log(p)))


probabilities = st.one_of(st.floats(0, 1), st.floats(0, 1e-200), st.sampled_from([0.0, 1.0]))
members, some = st.integers(1, 4), st.floats(1e-9, 1)


@st.composite
def sequences(draw):
    count = draw(members)
    raw = draw(
        st.lists(some | st.sampled_from([0.0, 1e-200]), min_size=count, max_size=count).filter(lambda r: sum(r) > 1e-3)
    )
    tokens = draw(st.lists(st.lists(probabilities, min_size=count, max_size=count), max_size=40))
    repeats = draw(st.integers(1, 12))  # long runs of the same, where a rate's trust would run out of floats
    return np.array(raw) / sum(raw), tokens * repeats


@given(sequences())
@settings(max_examples=200, derandomize=True, deadline=None)
def test_no_sequence_loses_more_than_a_factor_of_two(case):
    prior, tokens = case
    adaptive, gain = Adaptive(prior), 0.0
    for p in tokens:
        weights = adaptive.weights()
        assert weights.sum() == pytest.approx(1.0)
        assert (weights >= 0).all()
        if (prior * (np.array(p) > 0)).any():
            gain += log_mean(weights, p) - log_mean(prior, p)
        adaptive.observe(p)
        assert gain > -math.log(2) - 1e-6


def test_rows_are_independent():
    rng = np.random.default_rng(0)
    priors, seen = rng.dirichlet(np.ones(4), 3), rng.random((10, 3, 4))
    seen[4, 1] = 0.0  # a token that nobody expected, in one row
    together, alone = Adaptive(priors), [Adaptive(prior) for prior in priors]
    for p in seen:
        together.observe(p)
        for row, one in zip(p, alone, strict=True):
            one.observe(row)
    assert together.weights() == pytest.approx(np.stack([one.weights() for one in alone]))


def test_forks_go_their_own_way():
    adaptive = Adaptive([0.5, 0.5])
    adaptive.observe([0.9, 0.2])
    twin, before = adaptive.fork(), adaptive.weights()
    twin.observe([0.0, 1.0])
    assert adaptive.weights() == pytest.approx(before)
    assert twin.weights()[1] > before[1]


def test_who_leaves_is_never_drawn_again():
    adaptive = Adaptive([0.5, 0.3, 0.2])
    for p in ([0.1, 0.5, 0.3], [0.2, 0.9, 0.1]):
        adaptive.observe(p)
    before = adaptive.weights()
    adaptive.lose([1])
    assert adaptive.weights() == pytest.approx([before[0] / (1 - before[1]), 0, before[2] / (1 - before[1])])
    adaptive.observe([0.1, 1.0, 0.1])
    assert adaptive.weights()[1] == 0
    with pytest.raises(WeightsError, match="no member"):
        adaptive.lose([0, 2])


def test_only_proportions_count():
    one, other = Adaptive([0.7, 0.3]), Adaptive(Weights((0.7, 0.3), ("a", "b"), "linear", (None, None), "token", "em"))
    for p in ([0.2, 0.8], [1e-3, 1e-5]):
        one.observe(p)
        other.observe([value * 1e-250 for value in p])
    assert one.weights() == pytest.approx(other.weights())


@pytest.mark.parametrize("weights", [(1.0, 1.0, -1.0), (0.5, 0.6), (), (float("nan"), 1.0), 1.0])
def test_weights_that_are_no_distribution(weights):
    with pytest.raises(WeightsError, match="weights="):
        Adaptive(weights)


@pytest.mark.parametrize("p", [[0.5], [0.5, -0.1], [0.5, float("nan")], [float("inf"), 0.5], [[0.5, 0.5]]])
def test_what_is_no_probability(p):
    with pytest.raises(WeightsError, match="p"):
        Adaptive([0.5, 0.5]).observe(p)
