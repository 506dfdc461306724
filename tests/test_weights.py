"""Weightings against hand-worked numbers, slow plain-loop versions of the papers' formulas, and scipy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from packllm.errors import MemberError, OptionError, PackError, WeightsError
from packllm.options import Options, make_options
from packllm.weights import WEIGHTINGS, Problem, Weights, blocks, em, exact, fixed, minorant, solve, weigh
from packllm.weights.exhaustive import simplex_grid
from packllm.weights.problem import TensorSource
from packllm_eval.bench.speed import _naive_weights

INF = math.inf
LOG2 = math.log(2)
LOG_POOL = ("opt", "exhaustive", "exact", "map")
ALONE = [n for n in WEIGHTINGS if n not in ("dexperts", "dexperts-opt", "cbtm", "router")]  # any members, no fitting
GRID = [step / 20 for step in range(21)]


# Slow versions, float64 and plain loops, written from the papers.


def slow_loss(logits: Tensor, targets: Tensor, weights: tuple[float, ...]) -> float:
    """PackLLM Eq. 1-3: mean over i of −log softmax(Σ_k λ_k s_k)(x_i); rows that any member lacks do not count."""
    members, positions, vocabulary = logits.shape
    values = logits.double().tolist()
    total = 0.0
    for i in range(positions):
        fused = {}
        for v in range(vocabulary):
            row = [values[k][i][v] for k in range(members)]
            if min(row) > -INF:
                fused[v] = sum(weight * s for weight, s in zip(weights, row, strict=True))
        top = max(fused.values())
        total += top + math.log(sum(math.exp(s - top) for s in fused.values())) - fused[int(targets[i])]
    return total / positions


def unit(members: int, k: int) -> tuple[float, ...]:
    return tuple(float(j == k) for j in range(members))


def slow_opt(logits: Tensor, targets: Tensor) -> tuple[float, ...]:
    """Algorithm 1, line by line, with METHODS' stop at λ = 1; equal losses (1e-6) go to the larger λ."""
    members = logits.shape[0]
    order = sorted(range(members), key=lambda k: slow_loss(logits, targets, unit(members, k)))
    weights = unit(members, order[0])
    for member in order[1:]:
        losses = {}
        for grid in GRID:
            mixed = tuple(grid * w + (1 - grid) * (k == member) for k, w in enumerate(weights))
            losses[grid] = slow_loss(logits, targets, mixed)
        best = max(grid for grid in GRID if losses[grid] <= min(losses.values()) + 1e-6)
        if best == 1:
            break
        weights = tuple(best * w + (1 - best) * (k == member) for k, w in enumerate(weights))
    return weights


def slow_em(logprobs: np.ndarray, alpha: float, rounds: int = 3000) -> list[float]:
    """METHODS §3: r_ik ∝ λ_k p_k(x_i); λ_k = (Σ_i r_ik + α/K) / (t + α)."""
    members, positions = logprobs.shape
    weights = [1 / members] * members
    for _ in range(rounds):
        counts = [alpha / members] * members
        for i in range(positions):
            joint = [weights[k] * math.exp(logprobs[k, i]) for k in range(members)]
            for k in range(members):
                counts[k] += joint[k] / sum(joint)
        weights = [count / (positions + alpha) for count in counts]
    return weights


def em_objective(logprobs: np.ndarray, weights: np.ndarray, alpha: float) -> np.ndarray:
    """log likelihood plus log prior of each row of `weights` (P, K), which must be positive."""
    return np.log(weights @ np.exp(logprobs)).sum(axis=1) + alpha / len(logprobs) * np.log(weights).sum(axis=1)


def scipy_minimum(logits: Tensor, targets: Tensor, prior: float = 0.0) -> tuple[float, ...]:
    """Minimum over the simplex of f + prior · KL(λ ‖ uniform), by SLSQP."""
    members = logits.shape[0]

    def objective(weights: np.ndarray) -> float:
        positive = np.maximum(weights, 1e-12)
        penalty = prior * float(positive @ np.log(positive * members))
        return slow_loss(logits, targets, tuple(weights.tolist())) + penalty

    found = minimize(
        objective,
        np.full(members, 1 / members),
        method="SLSQP",
        bounds=[(0, 1)] * members,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-12, "maxiter": 200},
    )
    return tuple(np.clip(found.x, 0, 1).tolist())


def make_problem(seed: int, members: int = 3, positions: int = 12, vocabulary: int = 7) -> tuple[Tensor, Tensor]:
    """Members that share much of what they say and are better than chance, to different degrees."""
    random = torch.Generator().manual_seed(seed)
    targets = torch.randint(vocabulary, (positions,), generator=random)
    shared = torch.randn(1, positions, vocabulary, generator=random)
    own = torch.randn(members, positions, vocabulary, generator=random)
    skill = 2 * torch.rand(members, 1, 1, generator=random)
    return 2 * (shared + own) + skill * torch.nn.functional.one_hot(targets, vocabulary), targets


seeds = st.integers(0, 10**6)
few = settings(max_examples=20, deadline=None)


def coin(first: float, second: float) -> tuple[Tensor, Tensor]:
    """Two members that say the same at each of three positions, where tokens 0, 0, 1 occur.

    Their log-odds of token 0 against token 1 are first·ln 2 and second·ln 2; token 2 is a padded row. The
    log pool's log-odds are (λ first + (1 − λ) second) ln 2, and best at σ(log-odds) = 2/3, log-odds = ln 2.
    """
    logits = torch.tensor([[first * LOG2, 0.0, -INF], [second * LOG2, 0.0, -INF]])
    return logits[:, None].repeat(1, 3, 1), torch.tensor([0, 0, 1])


ENTROPY = math.log(3) - 2 / 3 * LOG2  # of (2/3, 1/3): the lowest loss that any log-odds reach on `coin`


# Hand-worked cases.


def table(*rows: list[float]) -> Problem:
    """A problem from each member's probabilities of the observed tokens, without logits."""
    logprobs = torch.tensor(rows, dtype=torch.float64).log()
    return Problem(tuple("abcdefg"[: len(rows)]), logprobs, -logprobs.mean(dim=1))


def weights_of(problem: Problem, weighting: str | dict[str, float], **options: object) -> Weights:
    return weigh(problem, make_options({"weighting": weighting, **options}))


# a's NLL is (ln 2 + ln 2 + ln 4)/3 = 4/3 ln 2 and b's (ln 4 + ln 4 + ln 2)/3 = 5/3 ln 2.
HALVES = table([0.5, 0.5, 0.25], [0.25, 0.25, 0.5])


def test_uniform_by_hand() -> None:
    assert weights_of(HALVES, "uniform").values == (0.5, 0.5)


def test_top1_by_hand() -> None:
    found = weights_of(HALVES, "top1")
    assert found.values == (1.0, 0.0)
    assert found.nll == pytest.approx((4 / 3 * LOG2, 5 / 3 * LOG2))
    assert found.top == "a"
    assert weights_of(table([0.25, 0.25, 0.5], [0.5, 0.5, 0.25]), "top1").values == (0.0, 1.0)


@pytest.mark.parametrize(
    ("options", "first"),
    # λ_a/λ_b = exp((5/3 − 4/3) ln 2 / τ) = 2^(1/(3τ)): 2^(10/3) = 10.0794 for τ = 0.1, 2^(1/3) = 1.259921 for τ = 1
    [({}, 10.0794 / 11.0794), ({"tau": 0.1}, 10.0794 / 11.0794), ({"tau": 1}, 1.259921 / 2.259921)],
)
def test_sim_by_hand(options: dict[str, float], first: float) -> None:
    assert weights_of(HALVES, "sim", **options).values == pytest.approx((first, 1 - first), abs=1e-5)


def test_em_by_hand() -> None:
    # Mixture probabilities .5 + .3λ (twice) and .5 − .3λ: the best is 2/3 and 1/3, so .3λ = 1/6, λ = 5/9.
    likelihood = table([0.8, 0.8, 0.2], [0.5, 0.5, 0.5])
    found = weights_of(likelihood, "em", alpha=0)
    assert found.values == pytest.approx((5 / 9, 4 / 9), abs=1e-6)
    assert found.fused_nll == pytest.approx(ENTROPY)
    # Every token belongs to one member alone, so the counts are whole: (2 + α/2)/(3 + α), (1 + α/2)/(3 + α).
    apart = table([0.9, 0.1, 0.0], [0.0, 0.0, 0.3])
    assert weights_of(apart, "em").values == pytest.approx((2.5 / 4, 1.5 / 4))
    assert weights_of(apart, "em", alpha=0).values == pytest.approx((2 / 3, 1 / 3))
    assert weights_of(apart, "em", alpha=5).values == pytest.approx((4.5 / 8, 3.5 / 8))


@pytest.mark.parametrize("name", ["opt", "exhaustive"])
def test_grid_weightings_by_hand(name: str) -> None:
    # log-odds (4λ − (1 − λ)) ln 2 = (5λ − 1) ln 2 = ln 2 at λ = 0.4, a grid point
    found = solve(name, *coin(4, -1))
    assert found.values == pytest.approx((0.4, 0.6))
    assert found.fused_nll == pytest.approx(ENTROPY, abs=1e-6)
    assert found.gap is None
    # (2λ − (1 − λ)) ln 2 = (3λ − 1) ln 2 = ln 2 at λ = 2/3: 0.65 (0.95 ln 2) is nearer than 0.7 (1.1 ln 2)
    assert solve(name, *coin(2, -1)).values == pytest.approx((0.65, 0.35))


def test_exact_by_hand() -> None:
    found = solve("exact", *coin(2, -1))  # λ = 2/3 as above; f'' = σ'(ln 2) (3 ln 2)² = 0.96 bounds the error
    assert found.values == pytest.approx((2 / 3, 1 / 3), abs=math.sqrt(2e-4 / 0.96))
    assert found.gap is not None
    assert found.fused_nll is not None
    assert ENTROPY - 1e-6 <= found.fused_nll <= ENTROPY + found.gap + 1e-6
    assert found.gap <= 1e-4


def test_map_by_hand() -> None:
    # Stationary where t f'(λ) + β ln(λ/(1 − λ)) = 0, f' = (σ − 2/3) 3 ln 2. At λ = 0.6 the log-odds are
    # 0.8 ln 2, σ = 2^0.8/(1 + 2^0.8) = 0.635161, so β = 9 ln 2 (0.666667 − 0.635161)/ln 1.5 = 0.48474.
    found = solve("map", *coin(2, -1), beta=0.48474)
    assert found.values == pytest.approx((0.6, 0.4), abs=0.011)  # curvature 1.67: √(2e-4/1.67)
    assert solve("map", *coin(2, -1), beta=1e6).values == pytest.approx((0.5, 0.5), abs=1e-3)
    assert solve("map", *coin(2, -1), beta=0).values == pytest.approx((2 / 3, 1 / 3), abs=0.015)


def test_dexperts_by_hand() -> None:
    problem = table([0.5], [0.5], [0.5])
    assert weights_of(problem, "dexperts").values == (1.0, 1.0, -1.0)
    found = weights_of(problem, "dexperts", alpha=0.25)
    assert (found.values, found.pool) == ((1.0, 0.25, -0.25), "log")
    with pytest.raises(WeightsError, match=r"exactly 3 members.*got 2: a, b"):
        weights_of(HALVES, "dexperts")


# em.


@given(seeds, st.integers(1, 4), st.integers(1, 9), st.sampled_from([0.5, 1.0, 4.0]))
@few
def test_em_matches_the_slow_loop(seed: int, members: int, positions: int, alpha: float) -> None:
    logprobs = -np.random.default_rng(seed).exponential(2.0, (members, positions))
    assert em(logprobs, alpha=alpha) == pytest.approx(slow_em(logprobs, alpha), abs=1e-6)


@given(seeds, st.integers(1, 40), st.sampled_from([0.3, 1.0, 5.0]))
@few
def test_em_reaches_the_maximum_of_its_posterior(seed: int, positions: int, alpha: float) -> None:
    logprobs = -np.random.default_rng(seed).exponential(2.0, (3, positions))
    hundredths = [(a, b, 100 - a - b) for a in range(1, 99) for b in range(1, 100 - a)]
    found = em_objective(logprobs, np.array([em(logprobs, alpha=alpha)]), alpha)[0]
    assert found >= em_objective(logprobs, np.array(hundredths) / 100, alpha).max() - 1e-9


logprob = st.one_of(st.floats(-30, 0), st.just(-INF), st.floats(-1e6, -700))


@given(st.data(), st.integers(1, 4), st.integers(0, 8))
@settings(max_examples=60, deadline=None)
def test_em_ignores_member_order_and_survives_anything(data: st.DataObject, members: int, positions: int) -> None:
    rows = data.draw(st.lists(st.lists(logprob, min_size=positions, max_size=positions), min_size=members, max_size=4))
    order = data.draw(st.permutations(range(len(rows))))
    matrix = np.array(rows).reshape(len(rows), positions)
    found = em(matrix)
    assert math.fsum(found) == pytest.approx(1)
    assert min(found) >= 0
    assert em(matrix[order]) == pytest.approx([found[k] for k in order], abs=1e-6)


def test_em_skips_what_no_member_thinks_possible() -> None:
    column = np.full((2, 1), -INF)
    assert em(column) == (0.5, 0.5)
    seen = np.log([[0.8, 0.8, 0.2], [0.5, 0.5, 0.5]])
    assert em(np.hstack([seen, column])) == pytest.approx(em(seen))
    assert em(torch.from_numpy(seen)) == em(seen)


def test_em_gives_a_member_without_evidence_its_prior_only() -> None:
    # b gave every token probability 0: its count is α/K alone
    assert em(np.array([[-1.0] * 3, [-INF] * 3])) == pytest.approx((3.5 / 4, 0.5 / 4))


# The log-pool optimisers.


@given(seeds, st.integers(1, 4), st.integers(1, 8))
@few
def test_opt_is_algorithm_1(seed: int, members: int, positions: int) -> None:
    logits, targets = make_problem(seed, members, positions)
    found = solve("opt", logits, targets)
    assert found.values == pytest.approx(slow_opt(logits, targets), abs=1e-9)
    assert found.fused_nll == pytest.approx(slow_loss(logits, targets, found.values), abs=1e-5)


def test_the_loop_that_the_benchmark_compares_with_solves_algorithm_1() -> None:
    found = {seed: slow_opt(*make_problem(seed)) for seed in range(20)}
    used = {seed: weights for seed, weights in found.items() if min(weights) > 0}  # no early stop: the loop has none
    assert len(used) >= 5
    for seed, weights in used.items():
        assert _naive_weights(*make_problem(seed)) == pytest.approx(weights, abs=1e-6)


def test_opt_stops_folding_at_the_first_member_that_does_not_help() -> None:
    # Log-odds of token 0 against 1 on the text 0, 0, 1, best at ln 2: a has 0.5 ln 2, b one of 0.4 ln 2, and c
    # 5 ln 2. b is second and pulls the wrong way, so folding ends; c alone would have lifted a to ln 2.
    odds = torch.tensor([0.5, 0.4, 5.0]) * LOG2
    logits = torch.stack((odds, torch.zeros(3)), dim=1)[:, None].repeat(1, 3, 1)
    targets = torch.tensor([0, 0, 1])
    assert solve("opt", logits, targets).values == (1.0, 0.0, 0.0)
    assert solve("opt", logits[[0, 2]], targets).values[1] > 0


@given(seeds, st.integers(1, 3), st.integers(1, 6))
@few
def test_exhaustive_is_the_best_point_of_the_grid(seed: int, members: int, positions: int) -> None:
    logits, targets = make_problem(seed, members, positions)
    points = [p for p in itertools.product(range(21), repeat=members) if sum(p) == 20]
    losses = {p: slow_loss(logits, targets, tuple(n / 20 for n in p)) for p in points}
    found = solve("exhaustive", logits, targets)
    assert losses[tuple(round(20 * value) for value in found.values)] <= min(losses.values()) + 2e-6
    assert found.fused_nll == pytest.approx(min(losses.values()), abs=1e-5)


@pytest.mark.parametrize("members", [1, 2, 3, 5])
def test_simplex_grid_holds_every_point_once(members: int) -> None:
    points = [tuple(p) for p in (20 * simplex_grid(members)).round().int().tolist()]
    expected = [p for p in itertools.product(range(20, -1, -1), repeat=members) if sum(p) == 20]
    assert points == expected  # heavier in front first


def test_exhaustive_refuses_a_grid_that_is_too_large() -> None:
    logits, targets = make_problem(0, members=7, positions=1, vocabulary=3)
    with pytest.raises(WeightsError, match=r"K=7 members means 230230 grid points.*use weighting='exact'"):
        solve("exhaustive", logits, targets)  # C(26, 6) = 230230


@given(seeds, st.integers(1, 4), st.integers(1, 15))
@example(11138, 2, 2)  # few positions: near the optimum float32 rounding outweighs what a step gains
@few
def test_exact_is_the_certified_global_minimum(seed: int, members: int, positions: int) -> None:
    logits, targets = make_problem(seed, members, positions)
    found = solve("exact", logits, targets)
    assert found.gap is not None
    assert 0 <= found.gap <= 1e-4
    best = slow_loss(logits, targets, scipy_minimum(logits, targets))
    loss = slow_loss(logits, targets, found.values)
    assert loss - best <= found.gap + 2e-6
    assert found.fused_nll == pytest.approx(loss, abs=1e-5)
    assert loss <= solve("exhaustive", logits, targets).fused_nll + found.gap + 2e-6


@given(seeds, st.integers(1, 4), st.integers(1, 15), st.sampled_from([0.0, 0.3, 1.0, 10.0]))
@few
def test_map_is_the_certified_minimum_with_a_prior(seed: int, members: int, positions: int, beta: float) -> None:
    logits, targets = make_problem(seed, members, positions)
    found = solve("map", logits, targets, beta=beta)

    def objective(weights: tuple[float, ...]) -> float:
        kl = sum(w * math.log(w * members) for w in weights if w > 0)
        return slow_loss(logits, targets, weights) + beta / positions * kl

    assert found.gap is not None
    assert 0 <= found.gap <= 1e-4
    assert objective(found.values) - objective(scipy_minimum(logits, targets, beta / positions)) <= found.gap + 2e-6
    assert found.fused_nll == pytest.approx(slow_loss(logits, targets, found.values), abs=1e-5)
    if beta:
        assert min(found.values) > 0


@given(seeds, st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_simplex_qp_meets_its_optimality_conditions(seed: int, members: int) -> None:
    random = np.random.default_rng(seed)
    root = random.normal(size=(members, random.integers(1, members + 1)))  # often singular
    gradient, hessian = random.normal(size=members), root @ root.T
    start = random.dirichlet(np.ones(members)) if seed % 2 else np.eye(members)[seed % members]
    found = exact.simplex_qp(gradient, hessian, start)
    assert found.sum() == pytest.approx(1)
    assert found.min() >= 0
    slope = gradient + hessian @ (found - start)
    assert slope @ found - slope.min() <= 1e-5  # the ridge moves the optimum by that much at most


@pytest.mark.parametrize(
    ("seed", "members", "positions"), [(343, 4, 1), (371, 2, 1), (686, 2, 1), (854, 5, 1), (1654, 5, 3)]
)
def test_exact_survives_members_so_sure_that_rounding_hides_the_curvature(
    seed: int, members: int, positions: int
) -> None:
    # Moments near 40² hide a covariance of 0 behind 1e-4 of either sign.
    logits, targets = make_problem(seed, members, positions, vocabulary=9)
    found = solve("exact", 6 * logits, targets)
    assert found.gap is not None
    assert found.gap <= 1e-4


def wobbling(wobble: list[float], slowness: float = 1.0) -> exact.Expand:
    """4 (λ_0 − 0.3)², its value off by each number of `wobble` in turn and its Hessian too large."""
    errors = itertools.cycle(wobble)

    def objective(at: np.ndarray) -> blocks.Expansion:
        off = at[0] - 0.3
        return blocks.Expansion(
            4 * off**2 + next(errors), np.array([8 * off, 0.0]), slowness * np.array([[8.0, 0.0], [0.0, 0.0]])
        )

    return objective


def test_a_certificate_counts_more_than_a_value_that_rounding_raised() -> None:
    # The gap is computed apart from the value: where it certifies the optimum, the search is over.
    found, _, gap = exact.minimise(wobbling([0.0, 1.0]), np.array([0.5, 0.5]), 0.0, 0.0, 1e-4, passes=2)
    assert found == pytest.approx([0.3, 0.7], abs=1e-4)
    assert gap <= 1e-4


def test_rounding_does_not_stop_slow_progress() -> None:
    # Started a step of 1e-4 away, with steps of a tenth of what is left: each gains some 1e-8, and values
    # that err by 4e-7 hide it.
    start = np.array([0.3001, 0.6999])
    found, _, gap = exact.minimise(wobbling([0.0, 4e-7], 10.0), start, 0.0, 0.0, 1e-4, passes=30)
    assert gap <= 1e-4
    assert found[0] < start[0]


def test_exact_certifies_on_all_positions_not_on_the_first_read() -> None:
    # a is right at every third position, and on the others b is: the optimum of the text is nearer to b.
    targets = torch.zeros(384, dtype=torch.int64)
    logits = torch.zeros(2, 384, 5)
    sampled = torch.arange(384) % 3 == 0
    logits[0, sampled, 0], logits[0, ~sampled, 1] = 4.0, 1.0
    logits[1, ~sampled, 0], logits[1, sampled, 1] = 4.0, 1.0
    logits[:, 1::2, 2] = 2.0
    found = solve("exact", logits, targets)
    assert found.gap is not None
    assert found.gap <= 1e-4
    assert found.values[1] > 0.5
    losses = [slow_loss(logits, targets, (1 - b, b)) for b in GRID]
    assert slow_loss(logits, targets, found.values) <= min(losses) + 1e-4


@pytest.mark.parametrize("name", ["opt", "exhaustive", "exact"])
@given(seed=seeds, members=st.integers(1, 4))
@few
def test_never_worse_than_the_best_member(name: str, seed: int, members: int) -> None:
    found = solve(name, *make_problem(seed, members, positions=3))
    assert found.fused_nll is not None
    assert found.fused_nll <= min(found.nll)
    assert math.fsum(found.values) == pytest.approx(1)
    assert min(found.values) >= 0


def test_guard_returns_the_best_member_that_exact_stopped_just_short_of() -> None:
    # All members are within 1e-4 of each other, so exact may stop anywhere; the second is best.
    logits, targets = make_problem(1, members=1, positions=20)
    better = logits + 2e-5 * torch.nn.functional.one_hot(targets, 7)
    found = solve("exact", torch.cat((logits, better, logits)), targets)
    assert found.values == (0.0, 1.0, 0.0)
    assert found.fused_nll == found.nll[1]


def test_guard_tightens_the_gap_by_what_it_gains() -> None:
    # b's NLL is 5/3 ln 2 = 1.1552 and a's 0.9242; a loss of 1 within 0.2 of the optimum becomes a's own,
    # within 0.2 − (1 − 0.9242) = 0.1242 of it.
    found = blocks.guarded(HALVES, [0, 1], [0.5, 0.5], 1.0, 0.2)
    assert found.values == (1.0, 0.0)
    assert found.fused_nll == pytest.approx(0.9242, abs=1e-4)
    assert found.gap == pytest.approx(0.1242, abs=1e-4)
    assert blocks.guarded(HALVES, [1, 0], [0.25, 0.75], 0.9, 0.2).values == (0.75, 0.25)


# Ties and degenerate packs.


@pytest.mark.parametrize("name", ["opt", "exhaustive", "top1"])
def test_ties_go_to_the_better_then_the_earlier_member(name: str) -> None:
    logits, targets = make_problem(3, members=1, positions=9)
    worse = logits - 3.0 * torch.nn.functional.one_hot(targets, 7)
    assert solve(name, torch.cat((logits, logits, logits)), targets).values == (1.0, 0.0, 0.0)
    assert solve(name, torch.cat((worse, logits, logits)), targets).values == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("name", ALONE)
def test_identical_members_fuse_to_themselves(name: str) -> None:
    logits, targets = make_problem(4, members=1)
    found = solve(name, logits.repeat(3, 1, 1), targets)
    assert math.fsum(found.values) == pytest.approx(1)
    assert min(found.values) >= 0
    if found.fused_nll is not None:
        assert found.fused_nll == pytest.approx(found.nll[0], abs=1e-5)


@pytest.mark.parametrize("name", ["opt", "exhaustive", "exact", "top1"])
def test_a_dominated_member_gets_nothing(name: str) -> None:
    # b says the reverse of a, which is right everywhere: any weight on it hurts.
    targets = torch.arange(6) % 4
    right = 2.0 * torch.nn.functional.one_hot(targets, 4).float()
    assert solve(name, torch.stack((-right, right)), targets).values == (0.0, 1.0)


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize(("members", "positions"), [(1, 1), (1, 5), (3, 1)])
def test_one_member_or_one_position(name: str, members: int, positions: int) -> None:
    logits, targets = make_problem(5, members, positions)
    found = solve(name, logits, targets)
    assert found.scored == positions
    assert math.fsum(found.values) == pytest.approx(1)
    if members == 1:
        assert found.values == pytest.approx((1.0,))
    elif name in ("exact", "exhaustive"):
        best = slow_loss(logits, targets, scipy_minimum(logits, targets))
        assert slow_loss(logits, targets, found.values) <= best + (2e-4 if name == "exact" else 0.1)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_nothing_scored_gives_uniform_weights(name: str) -> None:
    found = solve(name, torch.zeros(3, 0, 5), torch.zeros(0, dtype=torch.int64))
    assert found.values == pytest.approx((1 / 3,) * 3)
    assert (found.scored, found.fused_nll, found.gap) == (0, None, None)


# Rows at −inf (METHODS §8).


@pytest.mark.parametrize("name", LOG_POOL)
@pytest.mark.parametrize("holders", [[0, 1, 2], [1]])
def test_rows_at_minus_infinity_carry_no_mass(name: str, holders: list[int]) -> None:
    logits, targets = make_problem(6, positions=10)
    padded = torch.cat((logits, torch.full((3, 10, 2), 3.0)), dim=2)
    padded[holders, :, 7:] = -INF
    found = solve(name, padded, targets)
    assert found.values == pytest.approx(solve(name, logits, targets).values, abs=1e-6)
    assert max(found.values) < 1  # a real mixture: the case is not settled by the guard
    assert found.fused_nll == pytest.approx(slow_loss(padded, targets, found.values), abs=1e-5)


@pytest.mark.parametrize("name", LOG_POOL)
def test_a_member_that_finds_the_text_impossible_gets_nothing(name: str) -> None:
    logits, targets = make_problem(7, positions=10)
    logits[1, 4, targets[4]] = -INF
    found = solve(name, logits, targets)
    assert found.values[1] == 0
    assert found.values[::2] == pytest.approx(solve(name, logits[::2], targets).values)
    logits[:, 4, targets[4]] = -INF
    assert solve(name, logits, targets).values == pytest.approx((1 / 3,) * 3)


# Memory (METHODS §3: never t × V × K floats).


class Blocks:
    """A LogitSource that hands out at most `size` positions at a time in one buffer, which it overwrites."""

    def __init__(self, logits: Tensor, size: int) -> None:
        self._logits, self._buffer = logits, torch.empty(logits.shape[0], size, logits.shape[2])
        self.requests: list[Tensor] = []

    @property
    def asked(self) -> list[int]:
        return [len(positions) for positions in self.requests]

    @property
    def shape(self) -> tuple[int, int, int]:
        members, positions, vocabulary = self._logits.shape
        return members, positions, vocabulary

    def blocks(self, positions: Tensor, members: Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        assert bool((positions.diff() > 0).all())
        self.requests.append(positions)
        chosen = list(range(len(self._logits)) if members is None else members)
        for part in positions.split(self._buffer.shape[1]):
            block = self._buffer[: len(chosen), : len(part)]
            block.copy_(self._logits[:, part][chosen])
            yield part, block
            self._buffer.fill_(math.nan)  # whoever kept a view finds out


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("name", LOG_POOL)
def test_logits_are_never_held_all_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    members, positions, vocabulary, size = 3, 200, 512, 20
    logits, targets = make_problem(8, members, positions, vocabulary)
    expected = solve(name, logits, targets)
    monkeypatch.setattr(blocks, "WORKSPACE", members * vocabulary * 4)
    monkeypatch.setattr(minorant, "LIKELY", 32)
    source = Blocks(logits, size)
    with Largest() as largest:
        found = solve(name, source, targets)
    assert found.values == pytest.approx(expected.values, abs=2e-2)
    assert found.fused_nll == pytest.approx(expected.fused_nll, abs=2e-4)
    # The buffer is the largest thing: neither all positions, nor all grid points of a block, at once.
    assert largest.numel <= members * size * vocabulary
    if name in ("exact", "map"):
        # One pass that scores the members too, in parts spread over the text, and a few that certify.
        assert torch.cat(source.requests[:3]).sort().values.tolist() == list(range(positions))
        assert source.asked[:3] == [50, 50, 100]
        assert source.requests[0].tolist() == list(range(0, positions, 4))
        assert 1 <= len(source.asked[3:]) <= 5
        assert set(source.asked[3:]) == {positions}
    else:  # one pass that scores
        assert source.asked == [positions] * (1 + (1 if name == "exhaustive" else members - 1))


def test_margins_are_small_pieces_that_cover_the_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = make_problem(8, positions=20)
    monkeypatch.setattr(blocks, "WORKSPACE", 2 * 7 * 4)  # four positions of two members
    chosen = torch.arange(1, 20, 2)
    pieces = list(blocks.margins(Blocks(logits, 6), targets, [2, 0], chosen))
    assert max(piece.numel() for piece in pieces) == 2 * 7 * 4
    observed = logits[:, torch.arange(20), targets]
    assert torch.cat(pieces, dim=1).equal((logits - observed[..., None])[[2, 0]][:, chosen])


def test_exact_scores_and_certifies_in_two_passes() -> None:
    logits, targets = make_problem(9, positions=60)
    source = Blocks(logits, 16)
    found = solve("exact", source, targets)
    assert found.values == pytest.approx(solve("exact", logits, targets).values, abs=1e-4)
    assert source.asked == [60, 60]
    assert found.nll == pytest.approx(solve("em", logits, targets).nll, abs=1e-6)


@given(seeds, st.integers(1, 4), st.integers(1, 12), st.sampled_from([1, 3, 6]))
@few
def test_the_bound_lies_below_the_loss_and_touches_it(seed: int, members: int, likely: int, positions: int) -> None:
    logits, targets = make_problem(seed, members, positions, vocabulary=12)
    random = np.random.default_rng(seed)
    places = torch.arange(positions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minorant, "LIKELY", likely)
        bound = minorant.Minorant((members, positions, 12), logits.device)
        at = random.dirichlet(np.ones(members))
        observed = logits.gather(-1, targets.expand(members, -1)[..., None])[..., 0]
        bound.add(places, logits.clone(), observed, at)
    gradient = torch.stack([_slow_gradient(logits, targets, i, at) for i in range(positions)], dim=1)
    touched = bound.expand(at)
    assert touched.value == pytest.approx(slow_loss(logits, targets, tuple(at)), abs=1e-5)
    assert touched.gradient == pytest.approx(gradient.mean(1).numpy(), abs=1e-4)
    for _ in range(5):
        other = random.dirichlet(np.ones(members))
        assert bound.expand(other).value <= slow_loss(logits, targets, tuple(other)) + 1e-5
    moved = random.dirichlet(np.ones(members))
    gradient = torch.stack([_slow_gradient(logits, targets, i, moved) for i in range(positions)], dim=1)
    losses = torch.tensor([slow_loss(logits[:, [i]], targets[[i]], tuple(moved)) for i in range(positions)])
    before = bound.losses(slice(None), moved).double()
    assert (before <= losses + 2e-5).all()
    for rows in (places[::2].flip(0), places[1::2]):  # in any order, and no others are changed
        bound.touch(rows, losses[rows].float(), gradient[:, rows].float(), moved)
        before[rows] = losses[rows]
        assert torch.allclose(bound.losses(slice(None), moved).double(), before, atol=2e-5)
    touched = bound.expand(moved)
    assert touched.value == pytest.approx(slow_loss(logits, targets, tuple(moved)), abs=2e-5)
    assert touched.gradient == pytest.approx(gradient.mean(1).numpy(), abs=1e-3)
    assert bound.expand(at).value <= slow_loss(logits, targets, tuple(at)) + 2e-5


@given(seeds, st.integers(1, 40))
@few
def test_gradients_are_taken_at_the_fewest_positions_that_leave_little(seed: int, positions: int) -> None:
    slack = np.random.default_rng(seed).exponential(1e-4, positions).astype(np.float32)
    rows = exact._loosest(torch.from_numpy(slack)).tolist()
    assert slack[rows].min() >= np.delete(slack, rows).max(initial=0.0)
    left = math.fsum(np.delete(slack, rows).tolist())
    assert left <= exact.LEFT * positions + 1e-8
    assert len(rows) == 1 or left + slack[rows].min() > exact.LEFT * positions - 1e-8


def _slow_gradient(logits: Tensor, targets: Tensor, position: int, weights: np.ndarray) -> Tensor:
    """float64 (K,): E_p s_k − s_k(x) at one position."""
    said = logits[:, position].double()
    chances = (torch.from_numpy(weights) @ said).softmax(-1)
    return said @ chances - said[:, targets[position]]


def test_a_member_whose_logits_are_no_numbers_is_named() -> None:
    logits, targets = make_problem(9, positions=80)
    logits[1, 70, 3] = math.nan
    for name in ("exact", "opt", "em"):
        with pytest.raises(MemberError, match=r"'1'.*not finite"):
            solve(name, logits, targets)


# weigh and solve: fixed weights, pools, errors.


def test_fixed_weights_come_in_member_order() -> None:
    found = weights_of(HALVES, {"b": 0.75, "a": 0.25})
    assert (found.values, found.pool, found.strategy) == ((0.25, 0.75), "linear", "fixed")
    assert found.nll == pytest.approx((4 / 3 * LOG2, 5 / 3 * LOG2))
    assert weights_of(HALVES, {"b": 1.0}).values == (0.0, 1.0)
    assert weights_of(HALVES, {"a": 1.5, "b": -0.5}, pool="log").values == (1.5, -0.5)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 0.5, "b": 0.4}, "sums to 0.9; weights must sum to 1"),
        ({"a": 2.0}, "sums to 2"),
        ({}, "sums to 0"),
        ({"a": 0.5, "z": 0.5}, "unknown member 'z'; members: a, b"),
        ({"a": 1.5, "b": -0.5}, "negative weights need pool='log'"),
    ],
)
def test_fixed_weights_that_are_wrong(weights: dict[str, float], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        weights_of(HALVES, weights)


def test_fixed_takes_rounded_weights() -> None:
    assert fixed({"a": 1 / 3, "b": 1 / 3, "c": 0.3333333}, ("a", "b", "c"), "linear")[2] == 0.3333333


def test_unknown_weighting_names_the_valid_ones() -> None:
    with pytest.raises(OptionError, match="'optt' is unknown; valid: em, uniform, top1, sim, opt"):
        weights_of(HALVES, "optt")
    with pytest.raises(OptionError, match="'optt'"):
        solve("optt", torch.zeros(1, 1, 2), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(OptionError, match="unknown option 'taus'"):
        solve("sim", torch.zeros(1, 1, 2), torch.zeros(1, dtype=torch.int64), taus=1)


def test_a_pool_overrides_the_one_that_the_weighting_is_meant_for() -> None:
    logits, targets = make_problem(10)
    own, other = solve("exact", logits, targets), solve("exact", logits, targets, pool="linear")
    assert (own.pool, other.pool) == ("log", "linear")
    assert own.values == other.values
    # What exact knows is about the log pool.
    assert own.gap is not None
    assert (other.gap, other.fused_nll) == (None, None)
    assert solve("em", logits, targets).pool == "linear"
    assert solve("em", logits, targets, pool="log").fused_nll is None
    with pytest.raises(OptionError, match="pool='linear' cannot have the negative weights"):
        solve("dexperts", logits, targets, pool="linear")


@pytest.mark.parametrize("targets", [[0, 1], [0, 1, 2, 3], [[0, 1, 2]]])
def test_solve_refuses_targets_of_another_shape(targets: list) -> None:
    with pytest.raises(WeightsError, match=r"targets have shape .*; with these logits it must be \(3,\)"):
        solve("top1", torch.zeros(2, 3, 4), torch.tensor(targets))


@pytest.mark.parametrize("bad", [-1, 4])
def test_solve_refuses_ids_outside_the_vocabulary(bad: int) -> None:
    with pytest.raises(WeightsError, match=r"token ids in 0\.\.3"):
        solve("top1", torch.zeros(2, 3, 4), torch.tensor([0, bad, 1]))


@pytest.mark.parametrize("name", LOG_POOL)
def test_log_pool_optimisers_need_shared_tokens(name: str) -> None:
    with pytest.raises(WeightsError, match=f"weighting='{name}' needs members that split"):
        weights_of(HALVES, name)


@pytest.mark.parametrize("name", [*ALONE, "dexperts", "dexperts-opt"])
def test_members_do_not_depend_on_float_type(name: str) -> None:
    logits, targets = make_problem(11)
    found = solve(name, logits.bfloat16(), targets)
    assert found.values == pytest.approx(solve(name, logits.bfloat16().float(), targets).values)
    assert found.names == ("0", "1", "2")


@given(seeds, st.integers(2, 5), st.floats(0.0, 0.6))
def test_dropping_weight_moves_a_mixture_by_at_most_that_weight(seed: int, members: int, threshold: float) -> None:
    # METHODS §1: ‖Σλp − Σ_kept λp/(1 − δ)‖_TV = δ ‖dropped mixture − kept mixture‖_TV ≤ δ
    random = np.random.default_rng(seed)
    weights, members_say = random.dirichlet(np.ones(members)), random.dirichlet(np.full(6, 0.3), members)
    kept = np.where(weights >= min(threshold, weights.max()), weights, 0.0)
    moved = np.abs(weights @ members_say - kept / kept.sum() @ members_say).sum() / 2
    assert moved <= 1 - kept.sum() + 1e-12


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_weighting_says_which_options_it_takes(name):
    class Given:
        def __init__(self):
            self.read = set()

        def __getattr__(self, option):
            self.read.add(option)
            return getattr(Options(prior={"a": 0.5, "b": 0.5}), option)

    asked, weighting = Given(), WEIGHTINGS[name]
    source = TensorSource(torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0)))
    problem = Problem(("a", "b", "c"), source=source, targets=torch.tensor([0, 1, 2, 3, 4, 0]))
    try:
        weighting.solve(problem, asked)
    except PackError:  # cbtm and router: nothing is fitted
        assert asked.read == {"fitted"} <= set(weighting.takes)
    else:
        assert asked.read | ({"alpha"} if "prior" in asked.read else set()) == set(weighting.takes)  # one of both holds
    assert set(weighting.takes) <= Options.model_fields.keys()
