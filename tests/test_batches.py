"""Prompts decoded together against the same prompts one by one."""

from __future__ import annotations

import copy
from pathlib import Path

import naive
import peft
import pytest
import torch
from conftest import TextPack as Pack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lines import lines

from packllm import Generation, Member
from packllm.decode.line import read_lines
from packllm.engines.load import Loader
from packllm.ratings import grouped

LONG = "The court shall order relief under chapter 7 unless the debtor objects within 30 days of the notice. " * 3
PROMPTS = [
    "A",
    "Once upon a time",
    LONG,
    "What is the capital of France?",
    "Insulin helps glucose, and so",
    LONG[:90],
    "def add(a, b):",
    "The quick brown fox jumps",
    LONG[:200],
]


def saved_experts(member: Member, folder: Path, plain: bool = True) -> list[str]:
    """A base and two adapters of it, with linear layers of the plain kind or GPT-2's."""
    member.model.save_pretrained(folder / "base")
    member.tokenizer.save_pretrained(folder / "base")
    specs = [str(folder / "base")]
    for at in range(2):
        torch.manual_seed(at)
        target = ["q_proj", "down_proj"] if plain else ["c_attn", "c_fc"]
        config = peft.LoraConfig(
            init_lora_weights=False, r=3 + at, lora_alpha=6, target_modules=target, fan_in_fan_out=not plain
        )
        peft.get_peft_model(copy.deepcopy(member.model), config).save_pretrained(folder / f"expert{at}")
        specs.append(f"{folder / 'base'}+{folder / f'expert{at}'}")
    return specs


@pytest.fixture(params=["llama", "gpt2", "qwen"])
def experts(request, make_member, tmp_path) -> list[str]:
    return saved_experts(make_member(request.param, 5), tmp_path, request.param != "gpt2")


def counts(generation: Generation) -> tuple[int, int]:
    return generation.usage.prompt_tokens, generation.usage.completion_tokens


def test_a_seed_gives_the_same_text_in_any_batch(make_pack):
    pack = make_pack(max_tokens=8, temperature=0.8, seed=3, weighting="uniform")
    alone = [pack.generate(prompt).text for prompt in PROMPTS]
    assert [g.text for g in pack.generate_batch(PROMPTS)] == alone
    assert len(set(alone)) > 1


@pytest.mark.parametrize("batch_size", [4, 9])
@pytest.mark.parametrize("pool", ["linear", "log"])
def test_any_batch_size_gives_the_same_answers(make_pack, batch_size, pool):
    pack = make_pack(max_tokens=8, pool=pool)
    alone = [pack.generate(prompt) for prompt in PROMPTS]
    for one, other in zip(alone, pack.generate_batch(PROMPTS, batch_size=batch_size), strict=True):
        assert (one.text, one.finish_reason, counts(one)) == (other.text, other.finish_reason, counts(other))
        assert one.weights.values == pytest.approx(other.weights.values, abs=1e-5)


def test_adapters_of_one_base_in_batches(experts):
    pack = Pack.load(experts, max_tokens=8)
    alone = [pack.generate(prompt) for prompt in PROMPTS]
    for one, other in zip(alone, pack.generate_batch(PROMPTS), strict=True):
        assert one.text == other.text
        assert one.weights.values == pytest.approx(other.weights.values, abs=1e-5)
    assert len({one.weights.top for one in alone}) > 1  # weights are each prompt's own


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 60), min_size=2, max_size=5), steps=st.lists(st.integers(0, 300), max_size=3))
def test_company_never_changes_logits_of_any_adapter(experts, lengths, steps):
    members = Loader().members(experts)
    ids = members[0].encoder.encode(LONG).ids
    rows = [ids[at : at + length] for at, length in enumerate(lengths)]
    owners = [member for member in members for _ in rows]
    ends = lines({at: (owner, rows[at % len(rows)]) for at, owner in enumerate(owners)})
    for token in steps:
        read_lines(ends, {at: [token] for at in ends})
    alone = [member.merged() for member in members]
    for at, owner in enumerate(owners):
        read = [*rows[at % len(rows)], *steps]
        expected = naive.next_logprobs(_As(owner, alone[members.index(owner)]), read)
        assert torch.allclose(ends[at].next_logprobs.exp(), expected.exp(), atol=1e-5)


class _As:
    """A member's vocabulary on another model."""

    def __init__(self, member, model) -> None:
        self.model, self.vocabulary = model, member.vocabulary


def test_rows_that_finish_leave_the_batch(make_member):
    member = make_member("llama", 0)
    pack = Pack([member])
    limits = [len(answer.text) for answer in pack.generate_batch(PROMPTS[:4], max_tokens=3)]
    assert min(limits) > 0
    first = pack.generate(PROMPTS[0], max_tokens=20)
    stop = first.text[:2]  # ends the first row early, the others when they happen to say it
    before = member.engine.tokens
    answers = pack.generate_batch(PROMPTS[:4], max_tokens=20, stop=stop)
    read = sum(len(member.encoder.encode(prompt).ids) for prompt in PROMPTS[:4])
    longest = max(answer.usage.completion_tokens for answer in answers)
    assert answers[0].usage.completion_tokens < longest
    written = sum(answer.usage.completion_tokens for answer in answers)
    read -= sum(answer.usage.cached_tokens for answer in answers)  # of the longest, all but its last was read before
    assert read + written - 4 <= member.engine.tokens - before <= read + written  # nothing is padded


def test_prompts_of_one_length_are_padded_little(make_pack):
    prompts = [LONG[: 10 + 30 * (at % 5)] for at in range(20)]
    groups = grouped(prompts, 4)
    assert sorted(at for group in groups for at in group) == list(range(20))
    assert all(len({len(prompts[at]) for at in group}) == 1 for group in groups)
    assert grouped(prompts[:4], 4) == [[0, 1, 2, 3]]
    pack = make_pack(max_tokens=3)
    texts = [""] * 20
    for index, chunk in pack.stream_batch(prompts, batch_size=4):
        texts[index] += chunk.text
    assert texts == [pack.generate(prompt).text for prompt in prompts]
