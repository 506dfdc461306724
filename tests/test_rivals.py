"""The papers' rivals against hand-worked numbers: cbtm, router, dexperts-opt, weight merging; and the statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from packllm import LoadError, Pack, WeightsError
from packllm.engines.transformers.merge import average
from packllm.errors import DataError
from packllm.options import make_options
from packllm.weights import cbtm, router, solve, tfidf
from packllm.weights.problem import Problem
from packllm_eval.statistics import interval, paired

LAW = ["The court shall order relief.", "The debtor objects to the court.", "A court order binds the debtor."]
FOOD = ["Bread needs flour and yeast.", "Soup needs salt and water.", "Bake the bread, salt the soup."]


def problem_of(text: str | None, names=("law", "food")) -> Problem:
    logprobs = torch.full((len(names), 3), -1.0, dtype=torch.float64)
    return Problem(tuple(names), logprobs, -logprobs.mean(1), text=text)


# tf-idf


def test_tfidf_by_hand():
    features = tfidf.Features({"court": 0, "soup": 1}, np.array([2.0, 1.0]))
    assert features.of("Court, court: SOUP a x") == pytest.approx(np.array([4.0, 1.0]) / math.sqrt(17))
    assert features.of("nothing known") == pytest.approx([0.0, 0.0])


def test_tfidf_is_scikit_learns():
    sklearn = pytest.importorskip("sklearn.feature_extraction.text")
    features, rows = tfidf.fit([*LAW, *FOOD], "a test")
    fresh = sklearn.TfidfVectorizer(max_features=tfidf.TERMS).fit([*LAW, *FOOD])
    for text in [*LAW, "the Court's SOUP, ça 3 x 12", ""]:
        assert features.of(text) == pytest.approx(fresh.transform([text]).toarray()[0])
    assert rows.shape == (6, len(features.idf))


# cbtm


def fitted_by_hand(path, centroids, strategy="cbtm", **arrays):
    features = tfidf.Features({"court": 0, "soup": 1}, np.array([1.0, 1.0]))
    arrays = arrays or {"centroids": np.array(centroids)}
    tfidf.Fitted(strategy, ("law", "food"), features, arrays).save(path)
    return str(path)


def test_cbtm_by_hand(tmp_path):
    """Prompt (1, 0); nearest centroids (1, 0) at d² = 0 and (0, 1) at d² = 2: λ = softmax(0, −2/τ)."""
    path = fitted_by_hand(tmp_path / "c.npz", [[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [-1.0, 1.0]]])
    options = make_options({"weighting": "cbtm", "fitted": path, "tau": 2.0})
    values = cbtm.solve(problem_of("The court"), options).values
    assert values == pytest.approx((math.e / (math.e + 1), 1 / (math.e + 1)))
    assert cbtm.solve(problem_of("The court", ("food", "law")), options).values == pytest.approx(values[::-1])


def test_cbtm_centroids_are_the_corpora_s_means(tmp_path):
    pytest.importorskip("sklearn")
    path = tmp_path / "c.npz"
    cbtm.fit({"law": LAW, "food": FOOD}, path)
    fitted = tfidf.load(str(path), "cbtm")
    expected = [np.mean([fitted.features.of(text) for text in texts], axis=0) for texts in (LAW, FOOD)]
    assert fitted.arrays["centroids"][:, 0] == pytest.approx(np.stack(expected), abs=1e-6)
    options = make_options({"weighting": "cbtm", "fitted": str(path)})
    assert cbtm.solve(problem_of("the court and the debtor"), options).values[0] > 0.9
    assert cbtm.solve(problem_of("salt the bread"), options).values[1] > 0.9
    doubled = {name: [*texts[:2], *texts[:2]] for name, texts in (("law", LAW), ("food", FOOD))}
    cbtm.fit(doubled, path, clusters=2)
    assert tfidf.load(str(path), "cbtm").arrays["centroids"].shape[:2] == (2, 2)


def test_cbtm_refuses_clusters_of_one_document(tmp_path):
    pytest.importorskip("sklearn")
    with pytest.raises(DataError, match="corpus of 'food' has 1 document for 1 cluster:"):
        cbtm.fit({"law": LAW, "food": FOOD[:1]}, tmp_path / "c.npz")
    with pytest.raises(DataError, match="corpus of 'law' has 3 documents for 3 clusters"):
        cbtm.fit({"law": LAW, "food": FOOD}, tmp_path / "c.npz", clusters=3)
    with pytest.raises(DataError, match="clusters=2: one of 'law' holds 1 document"):
        cbtm.fit({"law": [LAW[0]] * 3 + [LAW[1]], "food": FOOD * 2}, tmp_path / "c.npz", clusters=2)
    with pytest.raises(DataError, match="at least two members"):
        cbtm.fit({"law": LAW}, tmp_path / "c.npz")
    with pytest.raises(DataError, match="cannot fit cbtm"):
        cbtm.fit({"law": ["a", "b"], "food": ["c", "d"]}, tmp_path / "c.npz")


def test_fitted_files_are_checked(tmp_path, make_member):
    path = fitted_by_hand(tmp_path / "c.npz", [[[1.0, 0.0]], [[0.0, 1.0]]])
    options = make_options({"weighting": "cbtm", "fitted": path})
    with pytest.raises(WeightsError, match="knows law, food, not member 'drink'"):
        cbtm.solve(problem_of("court", ("law", "drink")), options)
    with pytest.raises(WeightsError, match="reads the prompt's text"):
        cbtm.solve(problem_of(None), options)
    with pytest.raises(WeightsError, match=r"needs fitted=PATH, a file of packllm\.weights\.cbtm\.fit"):
        cbtm.solve(problem_of("court"), make_options({}))
    with pytest.raises(WeightsError, match="was fitted for weighting='cbtm', not 'router'"):
        router.solve(problem_of("court"), options)
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    for bad in ("bad.npz", "absent.npz"):
        with pytest.raises(WeightsError, match="cannot be read"):
            cbtm.solve(problem_of("court"), make_options({"fitted": str(tmp_path / bad)}))
    np.savez(tmp_path / "pickle.npz", strategy=np.array([{}], dtype=object))
    with pytest.raises(WeightsError, match="cannot be read"):  # an array of objects would run code
        cbtm.solve(problem_of("court"), make_options({"fitted": str(tmp_path / "pickle.npz")}))


def test_a_pack_weighs_by_cbtm_from_the_prompt_s_text(tmp_path, make_member):
    path = fitted_by_hand(tmp_path / "c.npz", [[[1.0, 0.0]], [[0.0, 1.0]]])
    pack = Pack([make_member("llama", 0, name="law"), make_member("llama", 1, name="food")])
    weights = pack.weigh("The court", weighting="cbtm", fitted=path, tau=2.0)
    assert weights.values == pytest.approx((math.e / (math.e + 1), 1 / (math.e + 1)))
    assert weights.pool == "linear"
    asked = [{"role": "user", "content": "soup"}]
    assert pack.weigh(asked, weighting="cbtm", fitted=path, tau=2.0).values[1] == pytest.approx(math.e / (math.e + 1))


# router


def test_the_router_by_hand(tmp_path):
    path = fitted_by_hand(
        tmp_path / "r.npz", None, "router", weights=np.array([[2.0, 0.0], [0.0, 1.0]]), bias=np.array([0.0, 0.5])
    )
    options = make_options({"weighting": "router", "fitted": path})
    # Features of "court": (1, 0), scores 2 and 0.5; of "court soup": (.707, .707), 1.41 and 1.21; of "soup": 0, 1.5.
    assert router.solve(problem_of("court"), options).values == (1.0, 0.0)
    assert router.solve(problem_of("court soup"), options).values == (1.0, 0.0)
    assert router.solve(problem_of("soup"), options).values == (0.0, 1.0)
    assert router.solve(problem_of("soup", ("drink", "food")), options).values == (0.0, 1.0)  # never labelled: none
    with pytest.raises(WeightsError, match="not member 'drink'"):
        router.solve(problem_of("soup", ("drink",)), options)


def test_the_router_learns_labels(tmp_path):
    pytest.importorskip("sklearn")
    options = make_options({"weighting": "router", "fitted": str(tmp_path / "r.npz")})
    for names in (("law", "food"), ("law", "food", "code")):
        texts = [*LAW, *FOOD] + ["def add(one, two): return one"] * 3 * (len(names) == 3)
        labels = [name for name in names for _ in range(3)]
        router.fit(texts, labels, tmp_path / "r.npz")
        for text, label in zip(texts, labels, strict=True):
            values = router.solve(problem_of(text, names), options).values
            assert names[values.index(1.0)] == label


@pytest.mark.parametrize(
    ("labels", "message"),
    [([], "0 labels for 6 prompts"), (["law"] * 6, "at least two members"), (["law"] * 5, "5 labels")],
)
def test_the_router_needs_labels(tmp_path, labels, message):
    pytest.importorskip("sklearn")
    with pytest.raises(DataError, match=message):
        router.fit([*LAW, *FOOD], labels, tmp_path / "r.npz")


# dexperts-opt


def slow_losses(logits: torch.Tensor, targets: torch.Tensor) -> list[float]:
    """Prompt NLL of every α of the grid, the direct way."""
    found = []
    for step in range(21):
        fused = (logits[0] + step / 20 * (logits[1] - logits[2])).double().log_softmax(-1)
        found.append(-float(fused.gather(-1, targets[:, None]).mean()))
    return found


@pytest.mark.parametrize("seed", range(6))
def test_dexperts_opt_takes_the_best_strength_of_the_grid(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 9, 7, generator=generator)
    targets = torch.randint(0, 7, (9,), generator=generator)
    logits[1] += 0.6 * seed * torch.nn.functional.one_hot(targets, 7)  # the expert knows more and more
    found, losses = solve("dexperts-opt", logits, targets), slow_losses(logits, targets)
    strength = found.values[1]
    assert found.values == pytest.approx((1.0, strength, -strength))
    assert strength == pytest.approx(min(range(21), key=losses.__getitem__) / 20)
    assert found.fused_nll == pytest.approx(min(losses), abs=1e-5)
    assert found.pool == "log"


def test_dexperts_opt_leaves_a_useless_expert_out():
    logits, targets = torch.randn(1, 5, 4), torch.zeros(5, dtype=torch.int64)
    assert solve("dexperts-opt", logits.repeat(3, 1, 1), targets).values == (1.0, 0.0, 0.0)
    with pytest.raises(WeightsError, match="exactly 3 members"):
        solve("dexperts-opt", logits.repeat(2, 1, 1), targets)


# Merging


def test_average_weights_by_hand(make_member):
    members = [make_member("llama", seed) for seed in (0, 1, 2)]
    merged = average(members, name="mean")
    parts = [member.model.state_dict() for member in members]
    for key, found in merged.model.state_dict().items():
        assert torch.allclose(found, sum(part[key] for part in parts) / 3, atol=1e-6), key
    assert merged.name == "mean"
    assert Pack([merged]).generate("The court", max_tokens=4).text
    before = [Pack([m]).score("The", [" court"])[0] for m in members]
    assert Pack([average([members[0], members[0]])]).score("The", [" court"])[0] == pytest.approx(before[0], rel=1e-5)
    assert [Pack([m]).score("The", [" court"])[0] for m in members] == before  # the members stay as they are


def test_lora_experts_average_to_the_mean_of_their_updates(tmp_path, make_member):
    peft = pytest.importorskip("peft")
    base = make_member("llama", 0)
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    import copy

    updates = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        tuned = peft.get_peft_model(copy.deepcopy(base.model), config)
        tuned.save_pretrained(tmp_path / f"lora{seed}")
        updates.append(tuned.merge_and_unload().state_dict())
    specs = [f"{tmp_path / 'base'}+{tmp_path / f'lora{seed}'}" for seed in (1, 2)]
    merged = average(Pack.load(specs, dtype="float32").members)
    key = "model.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(merged.model.state_dict()[key], (updates[0][key] + updates[1][key]) / 2, atol=1e-6)
    assert not torch.allclose(merged.model.state_dict()[key], base.model.state_dict()[key], atol=1e-4)


def test_members_that_cannot_be_merged_are_refused_by_shape(make_member):
    with pytest.raises(
        LoadError, match=r"'llama-0' and 'gpt2-1' cannot be merged: .* is .* in one and .* in the other"
    ):
        average([make_member("llama", 0), make_member("gpt2", 1)])
    with pytest.raises(LoadError, match="different vocabularies"):
        average([make_member("llama", 0), make_member("llama", 0, "words", "other")])
    with pytest.raises(LoadError, match="at least two"):
        average([make_member("llama", 0)])


# Statistics


def test_bootstrap_intervals_cover():
    """95 % intervals of a mean hold it in 95 % of simulated samples: within 4 standard errors of 400 trials,
    less what the percentile bootstrap is known to lack at 60 rows."""
    rng, held, trials = np.random.default_rng(0), 0, 400
    for trial in range(trials):
        found = interval(rng.exponential(2.0, 60), seed=trial)
        held += found.low <= 2.0 <= found.high
    assert 0.95 - 0.03 - 4 * math.sqrt(0.05 * 0.95 / trials) <= held / trials <= 0.99


def test_ratio_intervals_cover():
    """Σ bits / Σ bytes over documents of very different length."""
    rng, held, trials = np.random.default_rng(1), 0, 300
    for trial in range(trials):
        sizes = rng.integers(50, 2000, 50)
        found = interval(sizes * rng.normal(0.8, 0.2, 50), sizes, seed=trial)
        held += found.low <= 0.8 <= found.high
    assert 0.95 - 0.03 - 4 * math.sqrt(0.05 * 0.95 / trials) <= held / trials <= 1.0


def test_intervals_by_hand():
    assert interval([1, 1, 1]).as_dict() == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert interval([1.0, 3.0], [1, 3]).value == 1.0
    assert interval([0, 1] * 50).low == pytest.approx(0.4, abs=0.03)
    assert interval([0, 1] * 50).high == pytest.approx(0.6, abs=0.03)


def test_paired_tests_see_what_intervals_of_means_cannot():
    rng = np.random.default_rng(0)
    documents = rng.normal(5, 3, 40)  # documents differ far more than methods
    better = documents - 0.2 + rng.normal(0, 0.1, 40)
    found = paired(better, documents)
    assert found.difference.high < 0 < interval(better).high - interval(documents).low
    assert found.p < 0.001
    # All 2² sign patterns of (1, 1): two of four are as far from 0.
    assert paired([1.0, 1.0], [0.0, 0.0]).p == pytest.approx(0.5, abs=0.02)
    assert paired([1.0, 2.0], [1.0, 2.0]).p == 1.0


def test_paired_tests_keep_their_level():
    """Of two methods that do not differ, 5 % of tests say p < 0.05, within 4 standard errors."""
    rng, trials = np.random.default_rng(3), 300
    low = sum(paired(rng.normal(0, 1, 30), rng.normal(0, 1, 30), rounds=600).p < 0.05 for _ in range(trials))
    assert low / trials <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / trials)
