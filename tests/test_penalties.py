"""Penalties, biases, min_p and several answers: by hand, against transformers, and against full passes."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter

import naive
import pytest
import torch
from conftest import TextPack, _config
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from packllm import Member
from packllm.decode.penalties import Penalties
from packllm.decode.sampling import filtered, make_sampler
from packllm.decode.verdict import drawn_anew
from packllm.errors import OptionError, VocabularyError
from packllm.options import make_options

PROMPT = "The capital of France is"
EVEN = {"llama-0": 0.5, "gpt2-1": 0.3, "qwen-2": 0.2}
FOUR = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()


def greedily(penalties: Penalties, steps: int, logprobs=FOUR) -> list[int]:
    sample = penalties.wrap(make_sampler(0.0, 1.0, None, None))
    return [sample(logprobs) for _ in range(steps)]


def test_a_table_by_hand():
    # log .4 = -.916, log .3 = -1.204, log .2 = -1.609, log .1 = -2.303.
    penalties = Penalties(make_options({"presence_penalty": 0.5, "frequency_penalty": 0.25}), [], {})
    assert penalties.shaped(FOUR).tolist() == FOUR.tolist()
    # After 1: -.916 - .75 = -1.666. After 1, 3: -1.204 - .75 = -1.954, so 2 (-1.609) is next; after it, it has -2.359.
    # Then 1 again (-1.666), which then has -.916 - .5 - .5 = -1.916; then that is the best.
    assert greedily(penalties, 5) == [1, 3, 2, 1, 1]
    expected = [math.log(0.1), math.log(0.4) - 0.5 - 0.75, math.log(0.2) - 0.75, math.log(0.3) - 0.75]
    assert penalties.shaped(FOUR).tolist() == pytest.approx(expected)
    # Repetition: twice the log-probability. 1 stands in the prompt: -1.833; 3 comes (-2.408 then), then 2 (-3.219),
    # then 1, which is as before, for how often does not count.
    penalties = Penalties(make_options({"repetition_penalty": 2.0}), [1, 1, 99], {})
    assert greedily(penalties, 5) == [3, 2, 1, 1, 1]
    assert penalties.shaped(FOUR).tolist() == pytest.approx([math.log(0.1), *(2 * FOUR[1:]).tolist()])
    # A bias comes last: it is added to what the penalty leaves.
    penalties = Penalties(make_options({"repetition_penalty": 2.0}), [0], {0: 4.0, 1: -1.0})
    expected = [2 * math.log(0.1) + 4, math.log(0.4) - 1, math.log(0.2), math.log(0.3)]
    assert penalties.shaped(FOUR).tolist() == pytest.approx(expected)


def test_min_p_by_hand():
    # .4 · .5 = .2: what is as likely as that stays, .1 goes.
    scaled, ids = filtered(FOUR, 1.0, 1.0, None, 0.5)
    assert dict(zip(ids.tolist(), scaled.softmax(-1).tolist(), strict=True)) == pytest.approx(
        {1: 4 / 9, 2: 2 / 9, 3: 3 / 9}
    )
    assert filtered(FOUR, 1.0, 1.0, None, 1.0)[1].tolist() == [1]
    assert {make_sampler(1.0, 1.0, None, seed, 0.6)(FOUR) for seed in range(40)} == {1, 3}


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    logits=st.lists(st.integers(-40, 40), min_size=3, max_size=12, unique=True),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    top_k=st.sampled_from([None, 2, 5]),
    top_p=st.sampled_from([1.0, 0.83, 0.4]),
    min_p=st.sampled_from([0.0, 0.03, 0.31, 0.77]),
    penalty=st.sampled_from([1.0, 0.7, 1.3]),
    prompt=st.lists(st.integers(0, 11), max_size=5),
)
def test_as_transformers_has_it(logits, temperature, top_k, top_p, min_p, penalty, prompt):
    logprobs = (torch.tensor(logits, dtype=torch.float32) / 7).log_softmax(-1)
    prompt = [i for i in prompt if i < len(logits)]
    ours = Penalties(make_options({"repetition_penalty": penalty}), prompt, {}).shaped(logprobs)
    theirs = logprobs[None].clone()
    ids = torch.tensor([prompt], dtype=torch.long)
    if prompt and penalty != 1.0:
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, theirs)
    assert ours.tolist() == pytest.approx(theirs[0].tolist(), abs=1e-5)
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    for warper in warpers:
        theirs = warper(ids, theirs)
    ours = make_sampler(temperature, top_p, top_k, 0, min_p).distribution(ours)
    assert ours.tolist() == pytest.approx(theirs[0].softmax(-1).tolist(), abs=1e-5)


def greedy(members, prompt: list[int], ends, count: int, repetition=1.0, presence=0.0, frequency=0.0) -> list[int]:
    """The fused distribution by fresh passes, penalised by the definitions."""
    tokens: list[int] = []
    while len(tokens) < count:
        parts = [naive.next_logprobs(member, [*prompt, *tokens]) for member in members]
        fused = naive.fused(parts, list(EVEN.values()), "linear").log()
        for i in {*prompt, *tokens}:
            fused[i] *= repetition
        for i, times in Counter(tokens).items():
            fused[i] -= presence + frequency * times
        token = int(fused.argmax())
        if token in ends:
            break
        tokens.append(token)
    return tokens


@pytest.mark.parametrize(
    "penalties",
    [{"repetition_penalty": 1.6}, {"presence_penalty": 2.0, "frequency_penalty": 1.0}, {"frequency_penalty": -2.0}],
)
def test_greedily_the_penalised_best_with_drafts_asked_for_too(members, caplog, penalties):
    repeating = "Insulin lowers glucose, and the court shall"
    pack = TextPack(members, weighting=EVEN, max_tokens=20)
    prompt = pack.tokenize(repeating)
    named = {name.removesuffix("_penalty"): value for name, value in penalties.items()}
    expected = greedy(members, prompt, set().union(*(m.end_ids for m in members)), 20, **named)
    with caplog.at_level(logging.INFO, "packllm"):
        answer = pack.generate(repeating, **penalties, draft_tokens=4, logprobs=True)
    assert [token.id for token in answer.logprobs] == expected
    assert answer.text != pack.generate(repeating).text
    assert answer.usage.drafted_tokens == 0
    assert "without draft tokens" in caplog.text
    batch = pack.generate_batch(["Insulin", repeating], **penalties)
    assert batch[1].text == answer.text


def test_what_is_told_is_penalised_and_what_members_give_is_not(members):
    pack = TextPack(members, weighting=EVEN, max_tokens=1)
    plain = pack.generate(PROMPT, top_logprobs=3).logprobs[0]
    second = plain.top_logprobs[1]
    told = pack.generate(PROMPT, top_logprobs=3, logit_bias={second.id: 5.0}).logprobs[0]
    mass = math.log1p(math.exp(second.logprob) * math.expm1(5.0))
    assert (told.id, told.members) == (second.id, pytest.approx(second.members))
    assert told.logprob == pytest.approx(second.logprob + 5 - mass, abs=1e-4)


def test_biases_by_id_by_text_and_as_json_has_them(members):
    pack = TextPack(members, weighting=EVEN, max_tokens=6)
    (glucose,) = pack.tokenize(" glucose")
    for key in (" glucose", glucose, str(glucose)):
        assert pack.generate(PROMPT, logit_bias={key: 100}).text == " glucose" * 6
    first = pack.generate(PROMPT, logprobs=True).logprobs[0].id
    assert pack.generate(PROMPT, logit_bias={first: -100}, logprobs=True).logprobs[0].id != first
    end = members[0].vocabulary.tokens[min(members[0].end_ids)].decode()
    assert pack.generate(PROMPT, logit_bias={end: 100}).text == ""
    assert pack.generate(PROMPT, logit_bias={}).text == pack.generate(PROMPT).text


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"frequency_penalty": True},
        {"logit_bias": {5: 101}},
        {"logit_bias": {5: math.nan}},
        {"logit_bias": {-5: 1}},
        {"logit_bias": {"": 1}},
        {"logit_bias": {100000: 1}},
        {"logit_bias": {" glucose and more": 1}},
        {"logit_bias": [1, 2]},
        {"n": 0},
        {"n": 129},
        {"n": True},
    ],
)
def test_values_out_of_range(pack, wrong):
    with pytest.raises(OptionError, match=next(iter(wrong))):
        pack.generate(PROMPT, **wrong)


def test_members_without_tokens_in_common_refuse_penalties(make_member):
    pack = TextPack([make_member("llama", 0), make_member("llama", 1, "word")], weighting="uniform", max_tokens=5)
    with pytest.raises(OptionError, match="logit_bias"):
        pack.stream(PROMPT, decoding="cool", presence_penalty=1)
    with pytest.raises(VocabularyError, match="mined"):
        pack.generate(PROMPT, presence_penalty=1)
    ids = [t.id for t in pack.generate(PROMPT, presence_penalty=2, decoding="mined", logprobs=True).logprobs]
    assert len(ids) == 5
    with pytest.raises(OptionError, match="presence_penalty"):
        pack.stream(PROMPT, decoding="lazy", temperature=1.0, presence_penalty=1)


def test_a_form_holds_under_penalties(members):
    pytest.importorskip("llguidance")
    pack = TextPack(members, weighting=EVEN, max_tokens=40)
    schema = {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 4, "maxItems": 4}
    answer = pack.generate(PROMPT, json_schema=schema, frequency_penalty=2.0, presence_penalty=2.0)
    assert len(json.loads(answer.text)) == 4


# Several answers


def test_each_answer_is_the_one_its_seed_gives(members):
    pack = TextPack(members, weighting=EVEN, max_tokens=8, temperature=1.0)
    alone = [pack.generate(PROMPT, seed=7 + i).text for i in range(3)]
    assert len(set(alone)) == 3
    answers = pack.generate(PROMPT, n=3, seed=7)
    assert [answer.text for answer in answers] == alone
    assert [answer.text for answer in pack.generate(PROMPT, n=1, seed=7)] == alone[:1]
    batch = pack.generate_batch(["Insulin", PROMPT], n=3, seed=7, batch_size=2)
    assert [len(each) for each in batch] == [3, 3]
    assert [answer.text for answer in batch[1]] == alone
    assert len({answer.text for answer in pack.generate(PROMPT, n=3)}) > 1  # without a seed, too


def test_the_prompt_is_read_once(members, monkeypatch):
    pack = TextPack(members, weighting=EVEN, max_tokens=4, temperature=1.0, prefix_cache_mb=0)
    read: list[int] = []
    for engine in {member.engine for member in members}:
        own = engine.run
        monkeypatch.setattr(
            engine, "run", lambda parts, own=own: read.extend(len(one.ids) for one in parts) or own(parts)
        )
    pack.generate(PROMPT, n=4, seed=0)
    prompt = len(pack.tokenize(PROMPT))
    assert 3 * prompt < sum(read) <= 3 * (prompt + 4 * 4)


def test_several_answers_of_a_form_in_one_vocabulary_and_by_segments(make_member, members):
    pytest.importorskip("llguidance")
    pack = TextPack(members, weighting=EVEN, max_tokens=30, temperature=1.0)
    schema = {"type": "array", "items": {"enum": [1, 2, 3, 4]}, "uniqueItems": True, "minItems": 2, "maxItems": 2}
    for seed in range(3):  # what violates uniqueItems is drawn anew
        values = [json.loads(answer.text) for answer in pack.generate(PROMPT, n=3, seed=seed, json_schema=schema)]
        assert len(values) == 3
        assert all(len(set(value)) == 2 for value in values)
    mixed = TextPack([make_member("llama", 0), make_member("gpt2", 1, "word")], weighting="uniform", max_tokens=6)
    for decoding in ("cool", "mined"):
        answers = mixed.generate(PROMPT, n=2, temperature=1.0, seed=3, decoding=decoding)
        assert [one.text for one in answers] == [
            mixed.generate(PROMPT, temperature=1.0, seed=3 + i, decoding=decoding).text for i in range(2)
        ]


def test_an_answer_that_is_drawn_anew_is_none_of_the_others():
    options = make_options({"n": 128, "seed": 5, "temperature": 1.0})
    seeds = {options.seed_of(row) for row in range(128)}
    again = {drawn_anew(options.override({"n": None, "seed": seed})).seed for seed in seeds}
    assert len(seeds | again) == 256


def test_a_stream_is_of_one_answer_and_n_of_a_request(pack, members):
    with pytest.raises(OptionError, match="stream_batch"):
        pack.stream(PROMPT, n=2)
    with pytest.raises(OptionError, match="n=2 is an option of requests"):
        TextPack(members, n=2)
    last = {index: chunk.usage for index, chunk in pack.stream_batch([PROMPT, "Insulin"], n=2) if chunk.usage}
    assert sorted(last) == [0, 1, 2, 3]


# What models ask for by themselves


def test_what_generation_config_asks_for_is_told_and_used_on_request(byte_tokenizer, caplog):
    def member(name: str, seed: int, **asked):
        torch.manual_seed(seed)
        config = _config("llama", len(byte_tokenizer) + 24)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        model.generation_config.update(**asked)
        return Member(model, byte_tokenizer, name)

    (banned,) = byte_tokenizer.encode(" glucose", add_special_tokens=False)
    asked = {"do_sample": True, "temperature": 0.6, "top_k": 30, "repetition_penalty": 1.3}
    both = [member("a", 0, suppress_tokens=[banned]), member("b", 1, **asked), member("c", 2, temperature=0.2)]
    with caplog.at_level(logging.INFO, "packllm"):
        pack = TextPack(both, weighting="uniform", max_tokens=12)
    (told,) = [record.message for record in caplog.records if "generation_config=True" in record.message]
    assert "'temperature': 0.6" in told
    wanted = {"temperature": 0.6, "top_k": 30, "repetition_penalty": 1.3, "logit_bias": {banned: -100}}
    plain, on = pack.check(), pack.check(generation_config=True)
    assert (plain.temperature, plain.repetition_penalty, plain.logit_bias) == (0.0, 1.0, None)
    assert {name: getattr(on, name) for name in wanted} == wanted
    assert pack.check(generation_config=True, temperature=0).temperature == 0  # what is set stays
    answer = pack.generate(PROMPT, generation_config=True, seed=1)
    assert answer.text == pack.generate(PROMPT, seed=1, **wanted).text != pack.generate(PROMPT).text
    caplog.clear()
    with caplog.at_level(logging.INFO, "packllm"):
        always = TextPack(both, weighting="uniform", max_tokens=12, generation_config=True)
    assert "generation_config=True" not in caplog.text
    assert always.generate(PROMPT, seed=1).text == answer.text
