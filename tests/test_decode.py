"""Fused decoding against the naive loop."""

from __future__ import annotations

import collections
import itertools
import math

import naive
import pytest
import torch
from conftest import TextPack as Pack
from lines import line

from packllm import Member
from packllm.decode.pool import fuse
from packllm.decode.sampling import make_sampler
from packllm.weights import WEIGHTINGS

PROMPTS = ["The capital of France is", "Diabetes is a disease in which the court shall order relief", "def add(a, b):"]


def pack_of(make_member, count: int, **options) -> Pack:
    architectures = ["llama", "gpt2", "qwen", "gemma"]
    return Pack([make_member(architectures[k % 4], k) for k in range(count)], **options)


@pytest.mark.parametrize("pool", ["linear", "log"])
@pytest.mark.parametrize(
    "weighting", [w for w in WEIGHTINGS if w not in ("dexperts", "dexperts-opt", "cbtm", "router")]
)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_greedy_equals_the_naive_loop(make_member, count, weighting, pool):
    pack = pack_of(make_member, count, weighting=weighting, pool=pool, max_tokens=10)
    for prompt in PROMPTS:
        generation = pack.generate(prompt)
        prompts = [member.encoder.encode(prompt).ids for member in pack.members]
        expected = naive.greedy(pack.members, prompts, generation.weights.values, pool, 10)
        assert generation.usage.completion_tokens == len(expected)
        assert generation.text == pack.members[0].tokenizer.decode(expected, skip_special_tokens=True)


def test_greedy_with_dexperts_equals_the_naive_loop(make_member):
    pack = pack_of(make_member, 3, weighting="dexperts", alpha=0.7, max_tokens=10)
    generation = pack.generate(PROMPTS[0])
    assert generation.weights.values == pytest.approx((1.0, 0.7, -0.7))
    prompts = [member.encoder.encode(PROMPTS[0]).ids for member in pack.members]
    expected = naive.greedy(pack.members, prompts, (1.0, 0.7, -0.7), "log", 10)
    assert generation.text == pack.members[0].tokenizer.decode(expected, skip_special_tokens=True)


def test_messages_greedy_equals_the_naive_loop(make_member):
    pack = pack_of(make_member, 3, max_tokens=10)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    generation = pack.generate(messages)
    prompts = [m.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] for m in pack.members]
    expected = naive.greedy(pack.members, prompts, generation.weights.values, "linear", 10)
    assert generation.text == pack.members[0].tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("weighting", ["em", "exact", {"llama-0": 0.5, "gpt2-1": 0.3, "qwen-2": 0.2}])
def test_batches_equal_single_requests(make_pack, weighting):
    pack = make_pack(weighting=weighting, max_tokens=8)
    together = pack.generate_batch([*PROMPTS, [{"role": "user", "content": "Once upon a time"}]])
    for prompt, generation in zip(PROMPTS, together, strict=False):
        alone = pack.generate(prompt)
        assert generation.text == alone.text
        assert generation.weights.values == pytest.approx(alone.weights.values, abs=1e-6)
        assert generation.finish_reason == alone.finish_reason
    split = pack.generate_batch(PROMPTS, batch_size=2)
    assert [g.text for g in split] == [g.text for g in together[:3]]


def test_rows_of_a_batch_that_finish_leave_it(make_member):
    member = make_member("llama")
    pack = Pack([member], max_tokens=30)
    texts = [g.text for g in pack.generate_batch(PROMPTS)]
    stop = texts[0][2:4]  # ends the first row early, and the others where they say it
    generations = pack.generate_batch(PROMPTS, stop=[stop])
    assert [g.text for g in generations] == [text.split(stop)[0] for text in texts]


@pytest.mark.parametrize("pool", ["linear", "log"])
def test_the_fused_distribution_is_what_the_equations_say(pool):
    torch.manual_seed(0)
    logits = torch.randn(3, 50) * 4
    weights = [0.5, 0.3, 0.2]
    logprobs = logits.log_softmax(-1)
    ours = fuse(logprobs, weights, pool).exp()
    assert ours.sum().item() == pytest.approx(1, abs=1e-5)
    by_hand = (
        torch.softmax(sum(w * s for w, s in zip(weights, logits, strict=True)), -1)
        if pool == "log"
        else sum(w * torch.softmax(s, -1) for w, s in zip(weights, logits, strict=True))
    )
    assert torch.allclose(ours, by_hand, atol=1e-5)


def test_negative_weights_never_revive_a_token_that_is_ruled_out():
    logprobs = torch.tensor([[0.6, 0.4, 0.0], [0.5, 0.5, 0.0], [0.9, 0.1, 0.0]]).log()
    fused = fuse(logprobs, [1.0, 1.0, -1.0], "log").exp()
    by_hand = torch.tensor([0.6 * 0.5 / 0.9, 0.4 * 0.5 / 0.1, 0.0])
    assert torch.allclose(fused, by_hand / by_hand.sum(), atol=1e-6)


@pytest.mark.parametrize("pool", ["linear", "log"])
def test_sampling_frequencies_match_the_fused_distribution(make_pack, pool):
    pack = make_pack(weighting={"llama-0": 0.5, "gpt2-1": 0.3, "qwen-2": 0.2}, pool=pool)
    prompt = "The capital of France is"
    parts = [naive.next_logprobs(m, m.encoder.encode(prompt).ids) for m in pack.members]
    expected = naive.fused(parts, [0.5, 0.3, 0.2], pool)
    draws = 600
    counts: collections.Counter = collections.Counter()
    # The first token of many seeds: the weights and the prefill are the same each time.
    ends = [line(m, m.encoder.encode(prompt).ids) for m in pack.members]
    fused = fuse(torch.stack([end.next_logprobs for end in ends]), [0.5, 0.3, 0.2], pool)
    for seed in range(draws):
        counts[make_sampler(1.0, 1.0, None, seed)(fused)] += 1
    # Each count is binomial: 5 standard deviations are exceeded with odds below 1e-6 a token.
    for token in range(len(expected)):
        p = float(expected[token])
        assert abs(counts[token] / draws - p) <= 5 * math.sqrt(p * (1 - p) / draws) + 1 / draws


def test_a_seed_fixes_the_text(make_pack):
    pack = make_pack(max_tokens=8, temperature=1.0)
    assert pack.generate("Once", seed=3).text == pack.generate("Once", seed=3).text
    assert len({pack.generate("Once", seed=s).text for s in range(6)}) > 1


def test_members_without_weight_do_not_run(make_member):
    members = [make_member("llama", 0), make_member("gpt2", 1), make_member("qwen", 2)]
    pack = Pack(members, max_tokens=6)
    weighting = {"llama-0": 1.0}
    before = [m.engine.forwards for m in members]
    pack.generate("The capital", weighting=weighting)
    assert [m.engine.forwards - b for m, b in zip(members, before, strict=True)] == [6, 0, 0]
    before = [m.engine.forwards for m in members]
    generation = pack.generate("The capital", weighting="top1")
    top = generation.weights.values.index(1.0)
    steps = [m.engine.forwards - b for m, b in zip(members, before, strict=True)]
    assert steps == [6 if k == top else 1 for k in range(3)]


def test_small_weights_are_dropped_and_the_rest_renormalised(make_pack):
    pack = make_pack(max_tokens=4)
    fixed = {"llama-0": 0.9, "gpt2-1": 0.095, "qwen-2": 0.005}
    assert pack.weigh("The capital", weighting=fixed).values == pytest.approx((0.9 / 0.995, 0.095 / 0.995, 0.0))
    assert pack.weigh("The capital", weighting=fixed, min_weight=0.0).values == pytest.approx((0.9, 0.095, 0.005))


def test_dropping_obeys_the_total_variation_bound(make_pack):
    pack = make_pack()
    prompt = "The capital of France is"
    parts = [naive.next_logprobs(m, m.encoder.encode(prompt).ids) for m in pack.members]
    for small in (0.002, 0.05, 0.2):
        weights = [0.7 - small, 0.3, small]
        full = naive.fused(parts, weights, "linear")
        kept = naive.fused(parts[:2], [w / (1 - small) for w in weights[:2]], "linear")
        assert 0.5 * (full - kept).abs().sum().item() <= small + 1e-6


def test_end_tokens_of_every_running_member_end_the_answer(make_member):
    members = [make_member("llama", 0), make_member("gpt2", 1)]
    prompts = [m.encoder.encode("The capital of France is").ids for m in members]
    tokens = naive.greedy(members, prompts, (0.5, 0.5), "linear", 10)
    assert len(tokens) > 4
    end = tokens[3]
    ending = Member(members[1].model, members[1].tokenizer, "gpt2-1")
    ending.end_ids = frozenset({end})
    ended = Pack([members[0], ending], weighting={"llama-0": 0.5, "gpt2-1": 0.5}, max_tokens=10)
    answer = ended.generate("The capital of France is")
    assert answer.finish_reason == "stop"
    assert answer.usage.completion_tokens == tokens.index(end)


def test_score_is_the_fused_likelihood_of_the_continuation(make_member):
    for pool in ("linear", "log"):
        pack = pack_of(make_member, 3, pool=pool)
        prompt, texts = "The capital of France is", [" Paris", " a quick brown fox", " "]
        values = pack.weigh(prompt).values
        for text, score in zip(texts, pack.score(prompt, texts), strict=True):
            ids = pack.members[0].encoder.plain(text)
            expected = 0.0
            for n, token in enumerate(ids):
                parts = [naive.next_logprobs(m, [*m.encoder.encode(prompt).ids, *ids[:n]]) for m in pack.members]
                expected += math.log(float(naive.fused(parts, values, pool)[token]))
            assert score == pytest.approx(expected, abs=1e-3)


def test_score_leaves_many_continuations_in_order(make_pack):
    pack = make_pack()
    texts = [" " + " ".join(words) for words in itertools.permutations(["dog", "court", "index", "girl"])]
    together = pack.score("Once upon a time", texts)
    assert together == pytest.approx([pack.score("Once upon a time", [text])[0] for text in texts], abs=1e-4)
    ranked = pack.rerank("Once upon a time", texts)
    assert [score for _, score in ranked] == sorted((score for _, score in ranked), reverse=True)
    best, score = ranked[0]
    assert score == pytest.approx(together[texts.index(best)] / len(best.encode()))


def test_the_weights_do_not_depend_on_what_is_scored(make_pack):
    pack = make_pack()
    assert pack.score("Once upon a time", [" there"])[0] == pytest.approx(
        pack.score("Once upon a time", [" lawyers", " there", " x"])[1], abs=1e-4
    )
