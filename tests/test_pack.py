"""Pack as a user meets it: answers, weights, faults."""

from __future__ import annotations

import copy
import gc
import threading

import naive
import pytest
import torch
from transformers import DynamicCache

from packllm import (
    ContextOverflowError,
    LoadError,
    Member,
    MemberError,
    OptionError,
    Pack,
    PackError,
    PromptError,
    VocabularyError,
    WeightsError,
)

PROMPT = "The capital of France is"


def broken(member: Member, fault, after: int) -> Member:
    """The member with a model of its own whose head gives `fault(logits)` from the given forward pass on."""
    model = copy.deepcopy(member.model)
    passes: list[int] = []

    def hook(module, inputs, output):
        return fault(output) if len(passes) >= after else None

    def count(module, inputs):
        passes.append(1)

    made = Member(model, member.tokenizer, member.name)
    model.get_decoder().register_forward_pre_hook(count)
    model.get_output_embeddings().register_forward_hook(hook)
    return made


def to_nan(logits: torch.Tensor) -> torch.Tensor:
    return logits * float("nan")


def fail(logits: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("the device is on fire")


@pytest.fixture
def scripted(monkeypatch):
    """scripted(ids): requests choose these tokens, one after the other, whatever the members say."""

    def script(ids):
        upcoming = iter(list(ids))
        monkeypatch.setattr("packllm.decode.answer.make_sampler", lambda *_: lambda logprobs: next(upcoming))

    return script


# Answers


def test_every_way_to_ask_gives_the_same_text(pack):
    generation = pack.generate(PROMPT)
    chunks = list(pack.stream(PROMPT))
    assert "".join(chunk.text for chunk in chunks) == generation.text
    assert pack.generate_batch([PROMPT])[0].text == generation.text
    assert chunks[0].weights == pack.weigh(PROMPT)
    assert all(chunk.weights.at_start == chunks[0].weights for chunk in chunks)
    assert chunks[-1].weights == generation.weights
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == generation.finish_reason == "length"
    assert chunks[-1].usage == generation.usage
    assert generation.usage.prompt_tokens == pack.count_tokens(PROMPT)
    assert set(generation.timings) == {"prefill", "weighting", "first_token", "total"}


def test_answers_are_json_safe(pack):
    import json

    data = json.loads(json.dumps(pack.generate(PROMPT).as_dict()))
    assert data["weights"]["names"] == ["llama-0", "gpt2-1", "qwen-2"]
    assert sum(data["weights"]["weights"]) == pytest.approx(1)


def test_one_member_is_a_pack(make_member):
    with Pack([make_member("gpt2")], max_tokens=5) as pack:
        assert pack.weigh(PROMPT).values == (1.0,)
        assert pack.generate(PROMPT).usage.completion_tokens == 5


def test_one_prefill_a_member_and_request(pack):
    before = [member.engine.forwards for member in pack.members]
    pack.weigh(PROMPT, weighting="exact")
    assert [m.engine.forwards - b for m, b in zip(pack.members, before, strict=True)] == [1, 1, 1]


def test_nll_is_that_of_the_users_text(pack):
    weights = pack.weigh(PROMPT)
    for member, nll in zip(pack.members, weights.nll, strict=True):
        ids = member.encoder.encode(PROMPT).ids
        assert nll == pytest.approx(-naive.token_logprobs(member, ids).mean().item(), abs=1e-4)
    assert weights.unit == "token"
    per_byte = pack.weigh(PROMPT, unit="byte")
    scored_bytes = len(PROMPT.encode()) - len(pack.members[0].vocabulary.tokens[ids[0]])  # no BOS, no prediction
    assert per_byte.scored == scored_bytes
    assert per_byte.nll == pytest.approx([nll * weights.scored / scored_bytes for nll in weights.nll])
    assert per_byte.values == pytest.approx(weights.values)


def test_template_scaffolding_is_not_scored(pack):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    weights = pack.weigh(messages)
    member = pack.members[0]
    ids = member.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    text = member.encoder.plain(PROMPT)
    at = next(i for i in range(len(ids)) if ids[i : i + len(text)] == text)
    expected = -naive.token_logprobs(member, ids)[at - 1 : at - 1 + len(text)].mean().item()
    assert weights.scored == len(text)
    assert weights.nll[0] == pytest.approx(expected, abs=1e-4)


def test_score_on_narrows_the_scored_text(pack):
    messages = [{"role": "user", "content": "Diabetes is a disease.\n\nWhat is the capital of France?"}]
    weights = pack.weigh(messages, score_on="What is the capital of France?")
    assert weights.scored == pack.count_tokens("What is the capital of France?")
    with pytest.raises(PromptError, match="score_on"):
        pack.weigh(messages, score_on="What is the capital of Spain?")


def test_text_as_a_chat_message(pack):
    assert pack.generate(PROMPT, chat_template=True).text == pack.generate([{"role": "user", "content": PROMPT}]).text


def test_a_prompt_without_a_predicted_token_gives_uniform_weights(pack):
    weights = pack.weigh("A")
    assert weights.values == pytest.approx([1 / 3] * 3)
    assert weights.scored == 0
    assert weights.nll == (None, None, None)


def test_different_vocabularies_are_weighed_and_decoded(make_member):
    pack = Pack([make_member("llama"), make_member("llama", 1, "words", name="other")], max_tokens=4)
    assert not pack.members[0].vocabulary.same_as(pack.members[1].vocabulary)
    weights = pack.weigh("The court shall order relief under chapter 7.")
    assert weights.unit == "word"
    assert sum(weights.values) == pytest.approx(1)
    sim = pack.weigh("The court shall order relief under chapter 7.", weighting="sim")
    assert sim.unit == "byte"
    assert sim.scored > weights.scored
    assert pack.generate(PROMPT).usage.completion_tokens == 4
    assert pack.score(PROMPT, [" Paris"])[0] < 0
    with pytest.raises(VocabularyError, match="decoding='tokens' cannot fuse"):
        pack.stream(PROMPT, decoding="tokens")
    with pytest.raises(WeightsError, match="exact"):
        pack.weigh(PROMPT, weighting="exact")
    assert pack.generate(PROMPT, weighting="top1").usage.completion_tokens == 4
    assert pack.generate(PROMPT, weighting={"other": 1.0}).usage.completion_tokens == 4


def test_words_are_scored_alike_by_both_tokenizers(make_member):
    """Both members' word log-probabilities add up to those of their own tokens of the same text."""
    pack = Pack([make_member("llama"), make_member("llama", 1, "words", name="other")])
    text = "The court shall order relief"
    weights = pack.weigh(text, weighting="em")
    second = pack.members[1]
    ids = second.encoder.encode(text).ids
    assert ids[0] == second.vocabulary.special["bos"]
    logprobs = naive.token_logprobs(second, ids)
    # The first member has no BOS: what its first token covers is left out for both.
    skipped = pack.members[0].vocabulary.tokens[pack.members[0].encoder.encode(text).ids[0]]
    covered = 0
    total = 0.0
    for token, logprob in zip(ids[1:], logprobs.tolist(), strict=True):
        if covered >= len(skipped):
            total -= logprob
        covered += len(second.vocabulary.tokens[token]) - (covered == 0)  # the dummy space is not in the text
    assert covered == len(text)
    assert weights.nll[1] * weights.scored == pytest.approx(total, abs=1e-3)


# Stopping


def test_a_stop_string_across_tokens_is_never_given_out(pack, scripted):
    text = "the law of the land is that"
    ids = pack.tokenize(text)
    for stop, expected in [("w of", "the la"), ("land is", "the law of the "), ("that", text[:-4])]:
        scripted([*ids, *ids])
        chunks = list(pack.stream(PROMPT, stop=[stop, "zebra"], max_tokens=len(ids)))
        assert "".join(chunk.text for chunk in chunks) == expected
        assert chunks[-1].finish_reason == "stop"
    scripted([*ids, *ids])
    generation = pack.generate(PROMPT, stop=["zebra"], max_tokens=len(ids))
    assert (generation.text, generation.finish_reason) == (text, "length")


def test_emoji_are_never_split_while_streaming(pack, scripted):
    text = "naïve 🤖🧬 日本 done"
    ids = pack.tokenize(text)
    assert len(ids) > len(text)  # the tiny vocabulary spells them byte by byte
    scripted(ids)
    chunks = [chunk.text for chunk in pack.stream(PROMPT, max_tokens=len(ids))]
    assert "".join(chunks) == text
    assert not any("\ufffd" in chunk for chunk in chunks)


def test_the_end_token_is_no_text(pack, scripted):
    end = pack.members[0].vocabulary.special["eos"]
    ids = pack.tokenize("so it is")
    scripted([*ids, end, *ids])
    generation = pack.generate(PROMPT)
    assert (generation.text, generation.finish_reason) == ("so it is", "stop")
    assert generation.usage.completion_tokens == len(ids)


def test_a_partial_stop_string_is_given_out_at_the_end(pack, scripted):
    end = pack.members[0].vocabulary.special["eos"]
    scripted([*pack.tokenize("one two"), end])
    assert pack.generate(PROMPT, stop=["two three"]).text == "one two"


# Faults


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"temprature": 1}, OptionError, "did you mean 'temperature'"),
        ({"stop": [""]}, OptionError, "non-empty"),
        ({"top_p": 0}, OptionError, "top_p=0"),
        ({"temperature": -1}, OptionError, "temperature=-1"),
        ({"weighting": "best"}, OptionError, "valid: em, uniform"),
        ({"weighting": {"llama-0": 0.5, "gpt2-1": 0.6}}, WeightsError, "sums to 1.1"),
        ({"weighting": {"lama": 1.0}}, WeightsError, "members: llama-0, gpt2-1, qwen-2"),
        ({"weighting": {"llama-0": 1.5, "gpt2-1": -0.5}}, WeightsError, "pool='log'"),
        ({"max_tokens": 600}, ContextOverflowError, "512"),
        ({"weighting": "dexperts", "pool": "linear"}, OptionError, "negative"),
    ],
)
def test_wrong_options_say_what_is_wrong(pack, options, error, says):
    with pytest.raises(error, match=says) as raised:
        pack.generate(PROMPT, **options)
    assert isinstance(raised.value, PackError)


def test_options_are_checked_at_the_call(pack):
    before = [member.engine.forwards for member in pack.members]
    with pytest.raises(OptionError):
        pack.stream(PROMPT, top_p=2)
    with pytest.raises(PromptError):
        pack.stream("")
    with pytest.raises(ContextOverflowError):
        pack.stream("word " * 600)
    assert [member.engine.forwards for member in pack.members] == before


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "empty"),
        ([], "non-empty"),
        ([{"role": "usr", "content": "x"}], "valid roles"),
        ([{"role": "user"}], "'content'"),
        ("a\ud83d b", "surrogate U\\+D83D at character 1"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "text only"),
    ],
)
def test_wrong_prompts_say_what_is_wrong(pack, prompt, says):
    for ask in (pack.generate, pack.weigh, pack.stream):
        with pytest.raises(PromptError, match=says):
            ask(prompt)


def test_an_empty_pack_and_unknown_models():
    with pytest.raises(LoadError, match="empty"):
        Pack.load([])
    with pytest.raises(LoadError, match="at least one"):
        Pack([])
    with pytest.raises(LoadError, match="no/such/folder"):
        Pack.load(["./no/such/folder"])
    with pytest.raises(OptionError, match="max_tokens"):  # before anything is loaded
        Pack.load(["./no/such/folder"], max_token=3)


def test_overflow_names_member_limit_and_counts(pack):
    with pytest.raises(ContextOverflowError) as raised:
        pack.generate(PROMPT, max_tokens=510)
    error = raised.value
    assert (error.member, error.limit, error.max_tokens) == ("llama-0", 512, 510)
    assert error.prompt_tokens == pack.count_tokens(PROMPT)
    for part in ("llama-0", "512", "510", str(error.prompt_tokens)):
        assert part in str(error)


def test_without_max_tokens_the_answer_ends_at_the_window(make_pack):
    pack = make_pack()
    prompt = "a b" * 130
    room = 512 - pack.count_tokens(prompt)
    assert 0 < room < 256
    generation = pack.generate(prompt)
    assert generation.finish_reason == "stop" or generation.usage.completion_tokens == room


@pytest.mark.parametrize("after", [2, 4])
@pytest.mark.parametrize("fault", [to_nan, fail], ids=["nan", "exception"])
def test_a_failing_member_is_named(members, fault, after):
    pack = Pack([members[0], broken(members[1], fault, after), members[2]], max_tokens=8)
    before = members[2].engine.forwards
    with pytest.raises(MemberError, match="gpt2-1") as raised:
        pack.generate(PROMPT, weighting="uniform")
    if fault is fail:
        assert isinstance(raised.value.__cause__, RuntimeError)
    assert members[2].engine.forwards - before == after  # nobody goes on after that pass


@pytest.mark.parametrize("fault", [to_nan, fail], ids=["nan", "exception"])
def test_the_pack_goes_on_without_a_member_that_fails_midway(members, fault):
    pack = Pack([members[0], broken(members[1], fault, 4), members[2]], max_tokens=8)
    weighting = {"llama-0": 0.5, "gpt2-1": 0.3, "qwen-2": 0.2}
    generation = pack.generate(PROMPT, weighting=weighting, on_member_error="drop")
    assert generation.usage.completion_tokens == 8
    assert generation.weights.values == pytest.approx((0.5 / 0.7, 0.0, 0.2 / 0.7))


def test_the_pack_goes_on_without_a_member_that_fails_on_the_prompt(members):
    made = broken(members[1], to_nan, 1)
    made.engine._body = None  # the model's own path from the start
    pack = Pack([members[0], made, members[2]], max_tokens=8)
    generation = pack.generate(PROMPT, on_member_error="drop")
    rest = Pack([members[0], members[2]], max_tokens=8).generate(PROMPT)
    assert generation.text == rest.text
    assert generation.weights.nll[1] is None
    assert generation.weights.values == pytest.approx((rest.weights.values[0], 0.0, rest.weights.values[1]))
    with pytest.raises(MemberError, match="gpt2-1"):
        pack.generate(PROMPT)


def test_the_last_member_may_not_be_dropped(members):
    pack = Pack([broken(members[0], to_nan, 3)], max_tokens=8, on_member_error="drop")
    with pytest.raises(MemberError, match="llama-0"):
        pack.generate(PROMPT)


def test_special_tokens_in_user_text_are_text(pack):
    control = pack.members[0].vocabulary.control
    for prompt in ("say <|im_end|> now", [{"role": "user", "content": "say <|im_end|> now"}]):
        encoded = pack.members[0].encoder.encode(prompt)
        inside = [encoded.ids[at] for at in encoded.positions]
        assert not control & set(inside)
        pack.generate(prompt)
    assert not control & set(pack.tokenize("<|im_start|>system"))


def test_closing_a_stream_stops_the_work(pack):
    gc.collect()
    caches = sum(isinstance(thing, DynamicCache) for thing in gc.get_objects())
    stream = pack.stream(PROMPT, max_tokens=200)
    next(stream)
    next(stream)
    before = [member.engine.forwards for member in pack.members]
    stream.close()
    assert [member.engine.forwards for member in pack.members] == before
    gc.collect()
    assert sum(isinstance(thing, DynamicCache) for thing in gc.get_objects()) == caches
    assert list(stream) == []


def test_a_token_is_computed_only_when_it_is_asked_for(pack):
    stream = pack.stream(PROMPT, max_tokens=200, weighting="uniform")
    next(stream)
    before = pack.members[0].engine.forwards
    next(stream)
    assert pack.members[0].engine.forwards - before <= 8  # text may wait for the rest of a character
    stream.close()


def test_several_threads_on_one_pack(pack):
    prompts = [f"{word} upon a time the court" for word in ("Once", "Twice", "The", "A", "When", "Then")]
    alone = [pack.generate(prompt).text for prompt in prompts]
    together: dict[int, str] = {}

    def work(at: int) -> None:
        together[at] = "".join(chunk.text for chunk in pack.stream(prompts[at]))

    threads = [threading.Thread(target=work, args=(at,)) for at in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[at] for at in range(len(prompts))] == alone


def test_a_closed_pack_says_so(make_pack):
    pack = make_pack()
    pack.close()
    with pytest.raises(LoadError, match="closed"):
        pack.generate(PROMPT)
