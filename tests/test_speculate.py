"""Drafts judged in blocks against plain fusion, which test_decode.py holds to the naive loop."""

from __future__ import annotations

import copy
import itertools
import logging

import chains
import naive
import pytest
import torch
from conftest import TextPack as Pack
from hypothesis import given
from hypothesis import strategies as st
from lines import lines
from test_adapters import specs  # noqa: F401  (a fixture)
from transformers import AutoModelForCausalLM, Lfm2Config, Qwen3NextConfig

from packllm import Member, MemberError
from packllm.decode.failures import Failures
from packllm.decode.sampling import Greedy, Random, make_sampler
from packllm.decode.speculate import MOST_PLACES, Pace, speculative_ids
from packllm.decode.tokens import Ensemble, Row
from packllm.weights.result import Weights

PROMPTS = ["The capital of France is", "Diabetes is a disease in which the court shall order relief", "def add(a, b):"]
PACKS = {
    "full": ["llama", "gpt2", "llama"],
    "sliding": ["gemma", "qwen", "llama"],  # their windows of 8 are left while drafting
    "own path": ["gpt2", "gemma2"],
}
EVEN = {"linear": "em", "log": "exact"}


@pytest.fixture(params=list(PACKS))
def kinds(request, make_member) -> list[Member]:
    return [make_member(architecture, k) for k, architecture in enumerate(PACKS[request.param])]


def fixed(members, *values: float) -> dict[str, float]:
    return {member.name: value for member, value in zip(members, values, strict=True)}


def leaning(members) -> dict[str, float]:
    """Weights under which some drafts are taken over and some are not."""
    return fixed(members, *([0.7, 0.2, 0.1] if len(members) == 3 else [0.7, 0.3]))


def ids_of(members, prompt: str) -> list[list[int]]:
    return [member.encoder.encode(prompt).ids for member in members]


def weights_of(members, values, pool="linear") -> Weights:
    return Weights(tuple(values), tuple(m.name for m in members), pool, (None,) * len(members), "token", "fixed")


def ensemble_of(members, prompts, values, pool="linear", limit=20, drop=False, seed=None):
    """An ensemble after its prefill, and its rows."""
    asked = {
        (k, r): (m, m.encoder.encode(prompt).ids) for k, m in enumerate(members) for r, prompt in enumerate(prompts)
    }
    sample = [make_sampler(0.0 if seed is None else 1.0, 1.0, None, seed) for _ in prompts]
    rows = [Row(weights_of(members, values, pool), one, limit) for one in sample]
    failures = Failures([m.name for m in members], range(len(members)), drop)
    return Ensemble(lines(asked), rows, failures), rows


@pytest.mark.parametrize("pool", ["linear", "log"])
@pytest.mark.parametrize("places", [2, 3, 5, 8, None])
def test_greedy_answers_are_those_of_plain_fusion(kinds, pool, places):
    pack = Pack(kinds, max_tokens=14, pool=pool, weighting=leaning(kinds))
    plain = pack.generate_batch(PROMPTS, draft_tokens=1)
    together = pack.generate_batch(PROMPTS, draft_tokens=places)
    assert [g.text for g in together] == [g.text for g in plain]
    alone = pack.generate(PROMPTS[1], draft_tokens=places)
    assert alone.text == plain[1].text
    accepted, drafted = (sum(getattr(g.usage, n) for g in together) for n in ("accepted_tokens", "drafted_tokens"))
    assert places is None or 0 < accepted < drafted
    assert plain[0].usage.drafted_tokens == 0


def test_rows_with_drafters_of_their_own(make_member):
    members = [make_member("llama", 0), make_member("gpt2", 1), make_member("llama", 2)]
    values = [(0.6, 0.3, 0.1), (0.2, 0.5, 0.3), (0.0, 0.3, 0.7)]
    ensemble, rows = ensemble_of(members, PROMPTS, values[0])
    for row, own in zip(rows, values, strict=True):
        row.weights = weights_of(members, own)
    told: list[list[int]] = [[], [], []]
    for r, token in speculative_ids(ensemble, rows, 4):
        told[r].append(token)
        rows[r].done = len(told[r]) == 12 + 3 * r
    for r, prompt in enumerate(PROMPTS):
        assert told[r] == naive_tokens(members, prompt, values[r], 12 + 3 * r)


def naive_tokens(members, prompt: str, values, count: int, pool: str = "linear") -> list[int]:
    """Greedy tokens by the naive loop, past any end."""
    running, tokens = [k for k, value in enumerate(values) if value], []
    for _ in range(count):
        parts = [naive.next_logprobs(members[k], [*ids_of(members, prompt)[k], *tokens]) for k in running]
        tokens.append(int(naive.fused(parts, [values[k] for k in running], pool).argmax()))
    return tokens


@pytest.mark.parametrize("places", [3, None])
def test_adapters_of_one_base(specs, places):  # noqa: F811
    pack = Pack.load(specs, max_tokens=12, weighting="em")
    plain = pack.generate_batch(PROMPTS, draft_tokens=1)
    assert [g.text for g in pack.generate_batch(PROMPTS, draft_tokens=places)] == [g.text for g in plain]
    alone = pack.generate(PROMPTS[0], draft_tokens=places)
    assert alone.text == plain[0].text
    # All members of one base run in one pass: there is nothing that a draft could save.
    assert (alone.usage.drafted_tokens > 0) == (places == 3)


def test_members_of_other_vocabularies_through_mappings(make_member):
    members = [make_member("llama", 0), make_member("gpt2", 1, "words")]
    pack = Pack(members, max_tokens=10, decoding="mined", weighting=fixed(members, 0.5, 0.5))
    texts = [pack.generate(PROMPTS[0], draft_tokens=places).text for places in (1, 4)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("at", [2, 3, 4, 5, 6])
def test_an_end_inside_a_draft(make_member, at):
    members = [make_member("llama", 0), make_member("gpt2", 1)]
    tokens = naive_tokens(members, PROMPTS[1], (0.7, 0.3), 10)
    ending = [Member(one.model, one.tokenizer, one.name) for one in members]
    for one in ending:
        one.end_ids = frozenset({tokens[at]})
    pack = Pack(ending, weighting={"llama-0": 0.7, "gpt2-1": 0.3}, max_tokens=10, draft_tokens=5)
    answer = pack.generate(PROMPTS[1])
    assert answer.finish_reason == "stop"
    assert answer.usage.completion_tokens == tokens.index(tokens[at])
    batch = pack.generate_batch(PROMPTS)  # the other rows go on
    assert [g.text for g in batch] == [g.text for g in pack.generate_batch(PROMPTS, draft_tokens=1)]
    assert batch[1].text == answer.text


@pytest.mark.parametrize("start", [1, 4, 9])
def test_a_stop_string_inside_a_draft(make_member, start):
    members = [make_member("llama", 0), make_member("gpt2", 1)]
    pack = Pack(members, weighting=fixed(members, 0.7, 0.3), max_tokens=16)
    whole = pack.generate_batch(PROMPTS, draft_tokens=1)
    stop = whole[0].text[start : start + 3]
    for places in (4, 7, None):
        stopped = pack.generate_batch(PROMPTS, draft_tokens=places, stop=[stop])
        assert [g.text for g in stopped] == [g.text.split(stop)[0] for g in whole]
        pieces = list(pack.stream(PROMPTS[0], draft_tokens=places, stop=[stop]))
        assert "".join(piece.text for piece in pieces) == stopped[0].text
        assert pieces[-1].finish_reason == "stop"


def test_a_round_is_so_many_steps_and_one_block(make_member):
    members = [make_member("llama", 0), make_member("gpt2", 1), make_member("qwen", 2)]
    pack = Pack(members, weighting=fixed(members, 0.98, 0.01, 0.01), max_tokens=21)

    def passes(**options) -> list[int]:
        before = [member.engine.forwards for member in members]
        usage = pack.generate(PROMPTS[0], **options).usage
        assert usage.completion_tokens == 21
        assert usage.accepted_tokens == usage.drafted_tokens
        return [member.engine.forwards - b for member, b in zip(members, before, strict=True)]

    assert passes(draft_tokens=1) == [21, 21, 21]  # the prompt and all tokens but the last
    assert passes(draft_tokens=5) == [21, 5, 5]  # the first token is the prompt's: then four rounds of five
    assert passes(draft_tokens=8) == [21, 4, 4]  # 8 + 8 + 4: a round never goes past the limit
    top, *others = passes()
    assert top == 21
    assert max(others) <= 7


def test_drafting_ends_where_it_does_not_pay(make_member):
    members = [make_member("llama", 0), make_member("gpt2", 1)]
    pack = Pack(members, weighting=fixed(members, 0.51, 0.49), pool="log", max_tokens=120)
    before = [member.engine.forwards for member in members]
    usage = pack.generate(PROMPTS[0], stop=()).usage
    steps = [member.engine.forwards - b for member, b in zip(members, before, strict=True)]
    assert usage.accepted_tokens < 0.5 * usage.drafted_tokens  # two strangers
    assert usage.drafted_tokens < 0.35 * usage.completion_tokens
    assert sum(steps) < 1.15 * 2 * usage.completion_tokens


def test_segments_need_no_drafts(make_member):
    pack = Pack([make_member("llama", 0), make_member("gpt2", 1, "words")], max_tokens=6)
    assert pack.generate(PROMPTS[0], draft_tokens=4).text == pack.generate(PROMPTS[0]).text


def test_the_first_token_waits_for_no_draft(make_member):
    members = [make_member("llama", 0), make_member("gpt2", 1)]
    ensemble, rows = ensemble_of(members, PROMPTS[:2], (0.6, 0.4))
    before = [member.engine.forwards for member in members]
    tokens = speculative_ids(ensemble, rows, 8)
    assert [next(tokens)[0], next(tokens)[0]] == [0, 1]
    assert [member.engine.forwards for member in members] == before
    next(tokens)
    assert [member.engine.forwards - b for member, b in zip(members, before, strict=True)] == [8, 1]
    tokens.close()


def test_the_context_window_holds_every_draft(make_member):
    member, other = make_member("gpt2", 1), make_member("llama", 0)
    text = "The court shall order relief. " * 200
    while len(member.encoder.encode(text).ids) > member.context_window - 7:
        text = text[:-10]
    pack = Pack([member, other], weighting=fixed([member, other], 0.8, 0.2))  # learnt positions: one more would fail
    plain = pack.generate(text, draft_tokens=1)
    assert plain.finish_reason == "length"
    assert pack.generate(text, draft_tokens=8).text == plain.text


def hybrid(kind: str, tokenizer) -> Member:
    """A tiny model whose first layer keeps a state instead of keys and values."""
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.5,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if kind == "convolution":
        config = Lfm2Config(**shape, layer_types=["conv", "full_attention"])
    else:
        sizes = {
            f"linear_{what}": n for what, n in (("key_head_dim", 8), ("value_head_dim", 8), ("conv_kernel_dim", 4))
        }
        heads = {"head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
        layers = {"layer_types": ["linear_attention", "full_attention"], "num_experts": 0, "mlp_only_layers": [0, 1]}
        config = Qwen3NextConfig(**shape, **sizes, **heads, **layers)
    torch.manual_seed(0)
    return Member(AutoModelForCausalLM.from_config(config), tokenizer, kind)


def test_recurrent_layers_decode_plainly(make_member, byte_tokenizer, caplog):
    members = [make_member("gpt2", 1), hybrid("recurrent", byte_tokenizer)]
    pack = Pack(members, max_tokens=8, weighting=fixed(members, 0.6, 0.4))
    plain = pack.generate_batch(PROMPTS, draft_tokens=1)
    before = [member.engine.forwards for member in members]
    with caplog.at_level(logging.INFO, "packllm"):
        assert [g.text for g in pack.generate_batch(PROMPTS)] == [g.text for g in plain]
    # Each row of what keeps a state has passes of its own.
    assert [member.engine.forwards - b for member, b in zip(members, before, strict=True)] == [8, 3 * 8]
    said = [record.message for record in caplog.records if record.name == "packllm"]
    assert said == ["decoding without draft tokens: member 'recurrent' has a cache that cannot be rolled back"]


def test_convolutions_decode_plainly(make_member, byte_tokenizer):
    members = [hybrid("convolution", byte_tokenizer), make_member("gpt2", 1)]
    pack = Pack(members, max_tokens=16, weighting=fixed(members, 0.6, 0.4))
    for prompts in (PROMPTS[:1], PROMPTS[::2]):
        plain, ours = (pack.generate_batch(prompts, draft_tokens=places) for places in (1, 4))
        assert [g.text for g in ours] == [g.text for g in plain]
        assert ours[0].usage.drafted_tokens == 0


class Failing(Member):
    """Fails from its n-th pass on."""

    def after(self, passes: int) -> Failing:
        self.left = passes
        self.engine.model.get_decoder().register_forward_pre_hook(self._count)
        return self

    def _count(self, *_) -> None:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("out of memory")


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("passes", [1, 2, 4, 9])
def test_a_lost_member(byte_tokenizer, make_member, failing, passes):
    members = [make_member("llama", 0), make_member("gpt2", 1), make_member("qwen", 2)]
    bad = Failing(copy.deepcopy(members[failing].model), byte_tokenizer, "bad").after(10**9)
    team = [bad if k == failing else member for k, member in enumerate(members)]
    ensemble, rows = ensemble_of(team, PROMPTS[:2], (0.5, 0.3, 0.2))
    bad.left, tokens = passes, speculative_ids(ensemble, rows, 4)
    with pytest.raises(MemberError, match="bad"):
        list(itertools.islice(tokens, 60))
    bad.left = 10**9
    ensemble, rows = ensemble_of(team, PROMPTS[:2], (0.5, 0.3, 0.2), drop=True)
    bad.left = passes
    told: list[list[int]] = [[], []]
    seen = set()
    for r, token in speculative_ids(ensemble, rows, 4):
        values = rows[r].weights.values  # each token is what those who run say of all that came before
        running = [k for k, value in enumerate(values) if value]
        parts = [naive.next_logprobs(members[k], [*ids_of(members, PROMPTS[r])[k], *told[r]]) for k in running]
        assert token == int(naive.fused(parts, [values[k] for k in running], "linear").argmax())
        told[r].append(token)
        seen.add(len(running))
        rows[r].done = len(told[r]) == 20
    assert seen == {2, 3}
    assert sum(rows[0].weights.values) == pytest.approx(1)


# Sampling


VALUES = (0.5, 0.3, 0.2)


def kept(row: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """A row after the filters, by plain loops."""
    powers = [p ** (1 / temperature) for p in row]
    order = sorted(range(5), key=lambda i: (-powers[i], i))[:top_k]
    total, reached, left = sum(powers[i] for i in order), 0.0, []
    for i in order:
        if reached < top_p:
            left.append(i)
            reached += powers[i] / total
    total = sum(powers[i] for i in left)
    return [powers[i] / total if i in left else 0.0 for i in range(5)]


@pytest.mark.parametrize("filters", [{}, {"temperature": 0.8, "top_k": 4, "top_p": 0.93}], ids=["all", "filtered"])
@pytest.mark.parametrize("pool", ["linear", "log"])
def test_draws_have_the_fused_distribution(pool, filters):
    expected = chains.fused_table(VALUES, pool)
    own = chains.TABLES[0]
    if filters:
        expected = {a: kept(row, **filters) for a, row in expected.items()}
        own = {a: kept(row, **filters) for a, row in own.items()}
    # Drafts taken over unseen would be off by more than what is allowed.
    assert max(chains.distance(own[a], expected[a]) for a in chains.LETTERS) > 1.5 * chains.MARGIN
    drawn, rows = chains.run(
        chains.chain_members(),
        VALUES,
        pool,
        lambda ensemble, rows: speculative_ids(ensemble, rows, 4),
        **filters,
    )
    found = chains.distances(drawn, expected)
    assert max(found.values()) < chains.MARGIN, found
    accepted = sum(row.accepted for row in rows) / sum(row.drafted for row in rows)
    assert accepted < 0.95
    if not filters and pool == "linear":  # at least the drafter's weight; 0.05 is over 6 standard deviations
        assert accepted > VALUES[0] - 0.05


logits = st.lists(st.floats(-6, 0, width=32), min_size=5, max_size=5)


@given(draft=logits, rest=logits, weight=st.floats(0.05, 0.95))
def test_the_mixture_takes_over_at_least_the_drafters_weight(draft, rest, weight):
    q, s = (torch.tensor(values).softmax(-1) for values in (draft, rest))
    mixture = weight * q + (1 - weight) * s
    assert Random(1.0, 1.0, None, 0).overlap(q, mixture) >= weight - 1e-5


@given(draft=logits, target=logits, seed=st.integers(0, 50))
def test_what_is_drawn_anew_is_what_the_draft_had_too_little_of(draft, target, seed):
    q, r = (torch.tensor(values).softmax(-1) for values in (draft, target))
    sampler = Random(1.0, 1.0, None, seed)
    for drafted in range(5):
        token = sampler.judge(drafted, q, r)
        assert token == drafted or (r[token] > q[token] and r[drafted] < q[drafted])


def test_equal_distributions_take_over_everything():
    q = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15])
    sampler = Random(1.0, 1.0, None, 0)
    assert all(sampler.judge(token, q, q) == token for token in range(5) for _ in range(200))
    assert Greedy().overlap(q, q) == 1.0


def test_a_seed_fixes_the_answer(make_pack):
    pack = make_pack(max_tokens=24, temperature=1.0, weighting={"llama-0": 0.6, "gpt2-1": 0.3, "qwen-2": 0.1})
    for places in (None, 4):  # nothing is drafted under a seed, unless that is asked for
        first, again = (pack.generate(PROMPTS[0], seed=5, draft_tokens=places) for _ in range(2))
        assert first.text == again.text
        assert first.usage.drafted_tokens == again.usage.drafted_tokens
        assert (first.usage.drafted_tokens > 0) is (places is not None)
    assert any(pack.generate(PROMPTS[0]).usage.drafted_tokens for _ in range(8))  # an answer may end at once


# The choice of γ


def pace_of(make_member, count: int) -> Pace:
    members = [make_member("llama", k) for k in range(count)]
    ensemble, _ = ensemble_of(members, PROMPTS[:1], [1 / count] * count)
    return Pace(ensemble, None)


def test_more_is_drafted_where_more_is_taken_over(make_member):
    pace, chosen = pace_of(make_member, 3), []
    for rate in (0.1, 0.5, 0.8, 0.95, 1.0):
        for _ in range(400):
            pace.note(rate)
        chosen.append(pace.places([0]))
    # (γ + 2(1 + .1(γ-1))) / (1 + p + ... + p^(γ-1)), by hand: p = .5 gives 3, 2.8, 3.09 for γ = 1, 2, 3.
    assert chosen[:2] == [1, 2]
    assert chosen == sorted(chosen)
    assert chosen[-1] == MOST_PLACES


def test_two_members_pay_later_than_four(make_member):
    paces = [pace_of(make_member, count) for count in (2, 4)]
    for pace in paces:
        for _ in range(400):
            pace.note(0.45)
    assert [pace.places([0]) > 1 for pace in paces] == [False, True]


def test_one_member_drafts_for_nobody(make_member):
    assert not pace_of(make_member, 1).can_pay([0])


def test_members_on_devices_of_their_own_save_nothing(make_member, monkeypatch):
    pace = pace_of(make_member, 2)
    assert pace.can_pay([0])
    for k, line in enumerate(pace._ensemble.lines.values()):
        monkeypatch.setattr(line.sequence.engine, "place", k)
    assert not pace.can_pay([0])
