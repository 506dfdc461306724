"""Prompts that start from earlier ones against the same prompts read anew."""

from __future__ import annotations

import copy
import gc
import random
import threading

import naive
import peft
import pytest
import torch
from conftest import TextPack as Pack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lines import scored
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, Qwen3NextConfig

from packllm import Member, MemberError, OptionError
from packllm.decode.line import Line
from packllm.engines.prefix import MINIMUM, PrefixCache, PrefixStats

CONTEXT = (
    "The court shall order relief under chapter 7 unless the debtor objects within 30 days of the notice. "
    "Diabetes is a disease in which the blood glucose, or blood sugar, level is too high. "
    "A query planner chooses an index scan or a sequential scan from statistics of the table. "
)
QUESTIONS = ["What does the court order?", "Who may object, and when?", "Once upon a time there was a dog."]
TOLERANCE = 1e-5  # of weights and NLLs: rounding of float32 in passes of other shapes

ENSEMBLES = {
    "one vocabulary": [("llama", 0), ("gpt2", 1), ("qwen", 2)],  # qwen's and gemma's windows hold 8 tokens
    "sliding": [("gemma", 0), ("qwen", 1)],
    "own path": [("gemma2", 0), ("llama", 1)],  # gemma2 caps its logits after the head: no hidden states are kept
}


@pytest.fixture(params=list(ENSEMBLES))
def ensemble(request, make_member) -> list[Member]:
    return [make_member(*which) for which in ENSEMBLES[request.param]]


def encoded(member: Member, text: str) -> list[int]:
    return member.encoder.encode(text).ids


def read(cache: PrefixCache, member: Member, ids: list[int], positions: list[int] | None = None):
    """The line of a prompt, its scores, and how many tokens it did not read."""
    end, observed = scored(member, ids, positions, cache)
    return end, observed, end.sequence.cached_tokens


def assert_as_fresh(member: Member, end: Line, observed: torch.Tensor, ids: list[int], scored=None) -> None:
    expected = naive.token_logprobs(member, ids)
    expected = expected if scored is None else expected[[at - 1 for at in scored]]
    assert torch.allclose(observed, expected, atol=1e-4)
    assert torch.allclose(end.next_logprobs.exp(), naive.next_logprobs(member, ids).exp(), atol=1e-5)


def assert_alike(with_reuse, without) -> None:
    assert with_reuse.text == without.text
    assert with_reuse.weights.values == pytest.approx(without.weights.values, abs=TOLERANCE)
    assert with_reuse.weights.nll == pytest.approx(without.weights.nll, abs=TOLERANCE)


@pytest.mark.parametrize("weighting", ["em", "exact", "top1"])
@pytest.mark.parametrize("pool", ["linear", "log"])
def test_greedy_answers_are_the_same_with_reuse_and_without(ensemble, weighting, pool):
    pack = Pack(ensemble, max_tokens=10, weighting=weighting, pool=pool)
    shared = len(encoded(ensemble[0], CONTEXT)) - 2  # the last tokens may join with the question's
    for at, question in enumerate([*QUESTIONS, QUESTIONS[0]]):
        prompt = CONTEXT + question
        without = pack.generate(prompt, prefix_cache_mb=0)
        again = pack.generate(prompt)
        assert_alike(again, without)
        assert without.usage.cached_tokens == 0
        assert (again.usage.cached_tokens >= shared) == (at > 0)
    before = [member.engine.tokens for member in ensemble]
    pack.weigh(CONTEXT + "Where?")
    for member, tokens in zip(ensemble, before, strict=True):
        if weighting == "exact" and member.engine._body is None:
            continue  # no hidden states: the optimiser's logits take passes of their own
        assert 0 < member.engine.tokens - tokens <= len(encoded(member, CONTEXT + "Where?")) - shared


def test_a_conversation_reads_only_what_is_new(ensemble):
    pack = Pack(ensemble, max_tokens=8)
    messages = [{"role": "user", "content": CONTEXT + QUESTIONS[0]}]
    for turn in range(3):
        answer = pack.generate(messages)
        assert_alike(answer, pack.generate(messages, prefix_cache_mb=0))
        assert (answer.usage.cached_tokens > answer.usage.prompt_tokens * 0.6) == (turn > 0)
        messages = [*messages, {"role": "assistant", "content": answer.text or "-"}]
        messages.append({"role": "user", "content": QUESTIONS[1 + turn % 2]})


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen"])
def test_adapters_of_one_base(kind, make_member, tmp_path):
    base = make_member(kind, 5)
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    specs = [str(tmp_path / "base")]
    for at in range(2):
        torch.manual_seed(at)
        target = ["c_attn"] if kind == "gpt2" else ["q_proj", "v_proj"]
        config = peft.LoraConfig(
            init_lora_weights=False, r=3, lora_alpha=6, target_modules=target, fan_in_fan_out=kind == "gpt2"
        )
        peft.get_peft_model(copy.deepcopy(base.model), config).save_pretrained(tmp_path / f"expert{at}")
        specs.append(f"{tmp_path / 'base'}+{tmp_path / f'expert{at}'}")
    pack = Pack.load(specs, max_tokens=10)
    engine = pack.members[0].engine
    assert all(member.engine is engine for member in pack.members)
    pack.generate(CONTEXT + QUESTIONS[0])
    for question in QUESTIONS[1:]:
        expected = pack.generate(CONTEXT + question, prefix_cache_mb=0)
        answer = pack.generate(CONTEXT + question)
        assert_alike(answer, expected)
        assert answer.usage.cached_tokens > 100
    # Some of the members only: their rows of what all have read.
    two = {pack.members[0].name: 0.5, pack.members[2].name: 0.5}
    expected = pack.generate(CONTEXT + QUESTIONS[1], weighting=two, prefix_cache_mb=0)
    answer = pack.generate(CONTEXT + QUESTIONS[1], weighting=two)
    assert_alike(answer, expected)
    assert answer.usage.cached_tokens > 100


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen", "gemma", "gemma2"])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_two_prompts(architecture, make_member, data):
    """Prompts that share some text, cut anywhere, also inside a word; scores asked for anywhere."""
    member = make_member(architecture)
    text = st.text(alphabet="abc de.\n", max_size=40)
    cut = data.draw(st.integers(0, len(CONTEXT)))
    prompts = [CONTEXT + data.draw(text) + "!", CONTEXT[:cut] + data.draw(text) + "?"]
    cache = PrefixCache(2**30)
    ids = [encoded(member, prompt) for prompt in prompts]
    same = next((n for n, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), min(map(len, ids)))
    for row in ids:
        asked = sorted(data.draw(st.sets(st.integers(1, len(row) - 1)))) if len(row) > 1 else []
        end, observed, count = read(cache, member, row, asked)
        assert_as_fresh(member, end, observed, row, asked)
        assert count <= same
        end.read([7])
        after = naive.next_logprobs(member, [*row, 7])
        assert torch.allclose(end.next_logprobs.exp(), after.exp(), atol=1e-5)


def test_tokens_decide_not_text(make_member):
    """The same text in other tokens, and the same tokens in another order, share nothing beyond their ids."""
    member = make_member("llama")
    ids = encoded(member, CONTEXT)
    spelled = [
        member.tokenizer.convert_tokens_to_ids(c)
        for c in member.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(CONTEXT)[0][0]
    ] + ids[1:]
    text = b"".join(member.vocabulary.text_bytes(i) for i in spelled)
    assert text == b"".join(member.vocabulary.text_bytes(i) for i in ids)
    assert spelled != ids
    dice = random.Random(0)
    shuffled = [*ids[:70], *dice.sample(ids[70:], len(ids) - 70)]
    cache = PrefixCache(2**30)
    read(cache, member, ids)
    for other, most in ((spelled, 0), (shuffled, 75)):
        end, observed, count = read(cache, member, other)
        assert count <= most
        assert_as_fresh(member, end, observed, other)


def test_what_was_not_scored_is_scored_when_asked_for(make_member):
    for architecture in ("llama", "gemma2"):
        member = make_member(architecture)
        ids = encoded(member, CONTEXT)
        cache = PrefixCache(2**30)
        read(cache, member, ids, list(range(80, len(ids))))
        end, observed, count = read(cache, member, [*ids[:-2], 9, 8])
        assert_as_fresh(member, end, observed, [*ids[:-2], 9, 8])
        # Without hidden states the cache serves nothing before the first score that is missing.
        assert (count == 0) == (architecture == "gemma2")


@pytest.mark.parametrize("first", ["em", "exact"])
def test_weightings_share_what_was_read(ensemble, first):
    second = {"em": "exact", "exact": "em"}[first]
    pack = Pack(ensemble, max_tokens=6)
    expected = pack.generate(CONTEXT + QUESTIONS[1], weighting=second, prefix_cache_mb=0)
    pack.generate(CONTEXT + QUESTIONS[0], weighting=first)
    assert_alike(pack.generate(CONTEXT + QUESTIONS[1], weighting=second), expected)
    expected = pack.generate(CONTEXT + QUESTIONS[2], score_on=QUESTIONS[2], prefix_cache_mb=0)
    assert_alike(pack.generate(CONTEXT + QUESTIONS[2], score_on=QUESTIONS[2]), expected)


def test_scores_of_the_prefix_are_kept_to_the_last_bit(make_member):
    member = make_member("llama")
    cache = PrefixCache(2**30)
    ids = encoded(member, CONTEXT)
    _, once, _ = read(cache, member, ids)
    _, again, count = read(cache, member, [*ids, 5, 6, 7])
    assert count == len(ids)
    assert torch.equal(again[: len(once)], once)


def recurrent(tokenizer) -> Member:
    """A model with a running state, which cannot be rolled back."""
    torch.manual_seed(4)
    config = Qwen3NextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=0, layer_types=["linear_attention", "full_attention"],
        max_position_embeddings=512, initializer_range=0.5, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return Member(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), tokenizer, "recurrent")


def test_a_running_state_serves_only_what_goes_on_from_its_end(byte_tokenizer):
    member, cache = recurrent(byte_tokenizer), PrefixCache(2**30)
    ids = encoded(member, CONTEXT)
    read(cache, member, ids)
    for other, expected in (([*ids[:-1], 9, 8], 0), (ids, 0), ([*ids, 9, 8], len(ids)), ([*ids, 7], len(ids))):
        end, observed, count = read(cache, member, other)
        assert count == expected
        assert_as_fresh(member, end, observed, other)
        end.read([30])  # what is kept stays as it was
    end, _, count = read(cache, member, [*ids, 9, 8, 6])
    assert count >= len(ids)
    assert torch.allclose(end.next_logprobs.exp(), naive.next_logprobs(member, [*ids, 9, 8, 6]).exp(), atol=1e-5)


def test_positions_scaled_by_length_are_never_shared(byte_tokenizer):
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, initializer_range=0.5,
        rope_parameters={"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10000.0},
    )  # fmt: skip
    member, cache = Member(AutoModelForCausalLM.from_config(config), byte_tokenizer), PrefixCache(2**30)
    ids = encoded(member, CONTEXT)
    read(cache, member, ids)
    assert read(cache, member, ids)[2] == 0
    assert cache.stats.entries == 0


def test_the_least_recently_used_goes_first(make_member):
    member, cache = make_member("llama"), PrefixCache(2**30)
    rows = [[at, *encoded(member, CONTEXT)] for at in range(5, 9)]
    read(cache, member, rows[0])
    one = cache.stats.bytes
    assert one >= 2 * 2 * 2 * 8 * 4 * len(rows[0])  # keys and values of 2 layers, 2 heads of 8
    cache.limit = int(2.5 * one)
    read(cache, member, rows[1])
    read(cache, member, [*rows[0], 3])  # used again, and replaced by what covers it
    read(cache, member, rows[2])  # row 1 has to go
    assert cache.stats.bytes <= cache.limit
    assert (cache.stats.entries, cache.stats.evicted) == (2, 1)
    counts = [cache.longest(member.engine, None, row) is not None for row in rows[:3]]
    assert counts == [True, False, True]
    cache.limit = one // 2
    read(cache, member, rows[3])  # more than all there is room for: not kept, the others stay
    assert cache.longest(member.engine, None, rows[3]) is None
    assert cache.stats.entries == 2


def test_short_prompts_are_not_kept(make_member):
    member, cache = make_member("llama"), PrefixCache(2**30)
    ids = encoded(member, CONTEXT)[: MINIMUM - 1]
    read(cache, member, ids)
    assert cache.stats == PrefixStats(misses=1)
    read(cache, member, [*ids, 5])
    assert cache.stats.entries == 1


def test_statistics_and_the_off_switch(make_pack):
    pack = make_pack(max_tokens=2, prefix_cache_mb=0)
    for question in QUESTIONS:
        pack.generate(CONTEXT + question)
    assert pack.prefixes.stats == PrefixStats()
    pack = make_pack(max_tokens=2)
    for question in QUESTIONS:
        answer = pack.generate(CONTEXT + question)
    assert answer.as_dict()["usage"]["cached_tokens"] == answer.usage.cached_tokens > 0
    stats = pack.prefixes.stats
    assert (stats.entries, stats.hits, stats.misses) == (3, 6, 3)  # an entry, hit or miss an engine
    assert stats.tokens >= 2 * answer.usage.cached_tokens * 3 * 0.9
    pack.weigh(CONTEXT)
    assert pack.prefixes.stats.hits == 9
    pack.prefixes.clear()
    assert pack.prefixes.stats.bytes == 0
    with pytest.raises(OptionError, match="prefix_cache_mb"):
        make_pack(prefix_cache_mb=-1)


def test_threads_over_few_contexts(make_member):
    members = [make_member("llama", 0), make_member("qwen", 2)]
    pack = Pack(members, max_tokens=6, prefix_cache_mb=1)
    contexts = [CONTEXT, CONTEXT[100:] + CONTEXT, CONTEXT[::-1]]
    right = {
        (c, q): pack.generate(contexts[c] + QUESTIONS[q], prefix_cache_mb=0).text for c in range(3) for q in range(3)
    }
    wrong = []

    def caller(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(6):
            key = dice.randrange(3), dice.randrange(3)
            try:
                stream = pack.stream(contexts[key[0]] + QUESTIONS[key[1]])
                text = "".join(chunk.text for chunk, _ in zip(stream, range(dice.choice([1, 9])), strict=False))
                stream.close()
                if not right[key].startswith(text):
                    wrong.append((key, text))
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=caller, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert pack.prefixes.stats.hits > 20
    assert 0 < pack.prefixes.stats.bytes <= 2**20


def caches() -> int:
    gc.collect()
    return sum(issubclass(type(thing), DynamicCache) for thing in gc.get_objects())


def test_nothing_stays_but_what_is_kept(make_pack):
    start = caches()
    pack = make_pack(max_tokens=20)
    with pack:
        for question in QUESTIONS:
            stream = pack.stream(CONTEXT + question)
            next(stream)
            stream.close()
        del stream
        assert caches() - start == pack.prefixes.stats.entries == 3
        late = pack.stream(CONTEXT)
    next(late)  # a request that outlives its pack
    late.close()
    del late
    assert pack.prefixes.stats.entries == 0
    assert caches() == start


def test_a_member_that_fails_leaves_nothing(make_member, monkeypatch):
    pack = Pack([make_member("llama", 0)], max_tokens=4)
    pack.generate(CONTEXT + QUESTIONS[0])
    kept = pack.prefixes.stats
    monkeypatch.setattr(pack.members[0].engine, "_forward", lambda *_, **__: _fail())
    with pytest.raises(MemberError, match="out of memory"):
        pack.generate(CONTEXT[:200] + QUESTIONS[1])
    monkeypatch.undo()
    after = pack.prefixes.stats
    assert (after.entries, after.bytes) == (kept.entries, kept.bytes)
    assert_alike(pack.generate(CONTEXT + QUESTIONS[1]), pack.generate(CONTEXT + QUESTIONS[1], prefix_cache_mb=0))


def _fail() -> None:
    raise MemberError("llama-0", "out of memory")
