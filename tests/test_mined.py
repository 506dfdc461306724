"""Minimum edit distance mappings between vocabularies, and fusion through them."""

from __future__ import annotations

import copy
import gzip
import json
import logging
import math
import random
import sys

import naive
import pytest
import torch
from conftest import SHARED, byte_level_tokenizer
from conftest import TextPack as Pack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lines import line, scored
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import packllm.align
from packllm import Member, weights
from packllm.align import Vocabulary, mined
from packllm.align.mined import NONE, ROLE, alignment, nearest
from packllm.decode.line import read_lines
from packllm.decode.mined import translated
from packllm.errors import ContextOverflowError, MemberError, VocabularyError, WeightsError

module = sys.modules["packllm.align.mined"]

PROMPTS = [
    "The capital of France is",
    "Diabetes is a disease in which the court shall order relief",
    "def add(a, b):\n    return",
]

few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder for each test."""
    monkeypatch.setenv("PACKLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mined"


# The slow, obviously right version


def edits(one: bytes, other: bytes) -> int:
    """Levenshtein's distance by its recurrence."""
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


def common_prefix(one: bytes, other: bytes) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def brute(query: bytes, targets: dict[int, bytes]) -> tuple[int, int]:
    """(id, distance) of the nearest target; ties to the longer common prefix, then to the smaller id."""
    return min(
        ((i, edits(query, target)) for i, target in targets.items()),
        key=lambda pair: (pair[1], -common_prefix(query, targets[pair[0]]), pair[0]),
    )


def vocabulary(*tokens: bytes, **special: int) -> Vocabulary:
    unused = frozenset(i for i, token in enumerate(tokens) if not token)
    return Vocabulary(list(tokens), special, frozenset(special.values()), unused)


def real(name: str) -> Vocabulary:
    path = SHARED / "tokenizers" / f"{name}.json.gz"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return Vocabulary.from_json(json.loads(gzip.decompress(path.read_bytes())))


# The mapping

TOKENS = st.lists(
    st.binary(min_size=1, max_size=5) | st.text("ab ", min_size=1, max_size=6).map(str.encode), min_size=1
)


@few
@given(reference=TOKENS, target=TOKENS)
def test_the_mapping_is_that_of_brute_force(reference, target):
    one, two = vocabulary(*reference), vocabulary(*target)
    found = alignment(one, two)
    if not one.same_as(two):
        expected = [brute(token, dict(enumerate(target))) for token in reference]
        assert list(zip(found.ids.tolist(), found.distances.tolist(), strict=True)) == expected
    assert found.ids.dtype == torch.int64
    assert torch.equal(mined(one, two), found.ids)


@few
@given(queries=TOKENS, targets=TOKENS, workspace=st.sampled_from([1, 100, 1000]))
def test_blocks_of_any_size_find_the_same(queries, targets, workspace, monkeypatch):
    whole = nearest(queries, targets, range(len(targets)))
    monkeypatch.setattr(module, "_WORKSPACE", workspace)
    assert nearest(queries, targets, range(len(targets))) == whole


def test_long_tokens():
    texts = [b" " * 300, b"x" * 255 + b"y", b"ab" * 200]
    targets = [b" " * 20, b"x" * 256, b"x" * 254, b"ba" * 199]
    expected = [brute(text, dict(enumerate(targets))) for text in texts]
    assert nearest(texts, targets, range(4)) == expected == [(0, 280), (1, 1), (3, 2)]


@pytest.mark.real
@pytest.mark.parametrize(("one", "two"), [("llama3", "qwen3"), ("qwen3", "mistral-v0.1"), ("gpt2", "gpt-neox-20b")])
def test_slices_of_real_vocabularies_map_as_brute_force_does(shared, one, two):
    generator = random.Random(0)

    def sliced(name: str, size: int) -> Vocabulary:
        whole = real(name)
        return vocabulary(*(whole.tokens[i] for i in sorted(generator.sample(whole.text, size))))

    reference, target = sliced(one, 40), sliced(two, 500)
    found = alignment(reference, target)
    targets = dict(enumerate(target.tokens))
    assert found.distances.float().mean() > 1  # few are in both slices
    for token, pair in zip(
        reference.tokens, zip(found.ids.tolist(), found.distances.tolist(), strict=True), strict=True
    ):
        assert pair == brute(token, targets)


@pytest.mark.real
def test_a_real_vocabulary_is_mapped_exactly_where_it_can_be(shared):
    one, two = real("gpt2").first(4000), real("mistral-v0.1")
    found = alignment(one, two)
    texts = {two.tokens[i] for i in two.text}
    for i in one.text:
        exact = one.tokens[i] in texts
        assert (found.distances[i] == 0) == exact
        if exact:
            assert two.tokens[found.ids[i]] == one.tokens[i]
    assert two.tokens[found.ids[one.tokens.index(b"A")]] == b"A"
    assert found.ids[one.tokens.index(b"A")] not in two.shadowed  # <0x41> is never what the model has seen
    # The others, by another way of counting: rapidfuzz on each of a sample alone.
    from rapidfuzz.distance import Levenshtein

    targets = [two.tokens[i] for i in two.text]
    for i in random.Random(1).sample([i for i in one.text if found.distances[i] > 0], 20):
        assert found.distances[i] == min(Levenshtein.distance(one.tokens[i], target) for target in targets)


def test_ties_by_hand():
    target = vocabulary(b"gets", b"xget", b"got", b"jet", b"git", b"get ")
    assert alignment(vocabulary(b"get"), target).ids.tolist() == [0]  # "get" begins it; "get " has the larger id
    assert alignment(vocabulary(b"gut"), target).ids.tolist() == [2]  # one letter in common, as "git", smaller id
    assert alignment(vocabulary(b"get"), vocabulary(b"ge", b"gets", b"get", b"get")).ids.tolist() == [2]


def test_the_same_vocabulary_maps_by_identity(byte_tokenizer, cache):
    one, two = Vocabulary.from_tokenizer(byte_tokenizer), Vocabulary.from_tokenizer(byte_level_tokenizer())
    found = alignment(one, two)
    assert torch.equal(found.ids, torch.arange(len(one)))
    assert not found.distances.any()
    assert not cache.exists()


def test_special_tokens_meet_by_role_and_never_by_spelling():
    reference = vocabulary(b"<s>", b"</s>", b"<pad>", b"a", b"</s", bos=0, eos=1, pad=2)
    target = vocabulary(b"</s>", b"<s>", b"<pad>", b"a", b"<s", bos=0, eos=1, unk=2)
    found = alignment(reference, target)
    assert found.ids.tolist() == [0, 1, 2, 3, 4]  # a token of text that looks like one meets text
    assert found.distances.tolist() == [ROLE, ROLE, NONE, 0, 1]


def test_the_end_of_a_turn_meets_the_end_of_a_text_where_there_is_no_other():
    chat = vocabulary(b"a", b"<end>", b"<im_end>", eos=1, end_of_turn=2)
    plain = vocabulary(b"b", b"</s>", eos=1)
    found = alignment(chat, plain)
    assert found.ids.tolist() == [0, 1, 1]
    # One logit is no evidence for two tokens: only what ends an answer gets it.
    assert found.distances.tolist() == [1, NONE, ROLE]
    assert alignment(plain, chat).ids.tolist() == [0, 1]
    assert alignment(plain, vocabulary(b"a", b"<im_end>", end_of_turn=1)).distances.tolist() == [1, ROLE]


def test_one_token_of_many_roles():
    gpt2 = vocabulary(b"a", b"<|endoftext|>", bos=1, eos=1, unk=1)
    other = vocabulary(b"<unk>", b"<s>", b"</s>", b"<pad>", b"a", unk=0, bos=1, eos=2, pad=3)
    found = alignment(gpt2, other)
    assert (found.ids.tolist(), found.distances.tolist()) == ([4, 2], [0, ROLE])
    found = alignment(other, gpt2)
    assert (found.ids.tolist(), found.distances.tolist()) == ([1, 1, 1, 1, 0], [NONE, NONE, ROLE, NONE, 0])


def test_special_and_unused_ids_without_a_counterpart_stay_valid_inputs():
    reference = Vocabulary([b"a", b"<tool>", b""], {}, frozenset({1}), frozenset({2}))
    assert alignment(reference, vocabulary(b"b", b"<unk>", unk=1)).ids.tolist() == [0, 1, 1]
    found = alignment(reference, vocabulary(b"", b"b"))  # neither unk, pad nor eos: its first token of text
    assert (found.ids.tolist(), found.distances.tolist()) == ([1, 1, 1], [1, NONE, NONE])


def test_a_vocabulary_without_text_cannot_be_mapped_to():
    with pytest.raises(VocabularyError, match="without text tokens"):
        mined(vocabulary(b"a"), vocabulary(b"</s>", eos=0))


def test_byte_pieces_give_way_to_pieces_of_text():
    data = json.loads(byte_level_tokenizer().backend_tokenizer.to_str())
    data["decoder"], data["pre_tokenizer"], data["added_tokens"] = {"type": "ByteFallback"}, None, []
    data["model"].update(vocab={"<0x41>": 0, "<0xF0>": 1, "A": 2}, merges=[], byte_fallback=True)
    target = Vocabulary.from_json(data)
    assert target.tokens == [b"A", b"\xf0", b"A"]
    assert target.shadowed == {0}
    assert mined(vocabulary(b"A", b"\xf0"), target).tolist() == [2, 1]


def test_it_is_quiet_where_nobody_watches(capfd):
    mined(vocabulary(b"abc"), vocabulary(b"abd"))
    assert capfd.readouterr() == ("", "")


# The cache

ONE, TWO = vocabulary(b"get", b"x", b"</s>", eos=2), vocabulary(b"gets", b"xy", b"</s>", b"y", eos=2)


def kept(cache):
    (path,) = cache.glob("*")
    return path


@pytest.fixture
def computed(monkeypatch):
    """How often a mapping was computed."""
    compute, calls = module._compute, []
    monkeypatch.setattr(module, "_compute", lambda *pair: calls.append(pair) or compute(*pair))
    return calls


def test_a_mapping_is_made_once(cache, computed):
    first = alignment(ONE, TWO)
    again = alignment(copy.deepcopy(ONE), copy.deepcopy(TWO))
    assert len(computed) == 1
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.distances, again.distances)
    assert kept(cache).suffix == ".safetensors"


def test_another_content_or_direction_is_another_mapping(cache, computed):
    alignment(ONE, TWO)
    alignment(TWO, ONE)
    alignment(ONE, vocabulary(b"gets", b"xy", b"</s>", b"y", unk=2))  # the same bytes, another role
    alignment(ONE, vocabulary(b"get", b"sxy", b"</s>", b"y", eos=2))
    assert len(computed) == 4
    assert len(list(cache.glob("*"))) == 4


def test_a_truncated_file_is_made_again(cache, computed, caplog):
    first = alignment(ONE, TWO)
    whole = kept(cache).read_bytes()
    for size in (0, 1, 20, len(whole) // 2, len(whole) - 1):
        kept(cache).write_bytes(whole[:size])
        with caplog.at_level(logging.WARNING):
            assert torch.equal(alignment(ONE, TWO).ids, first.ids)
        assert "computing it again" in caplog.text
        assert kept(cache).read_bytes() == whole
        caplog.clear()
    assert len(computed) == 6


def test_any_edited_byte_is_noticed(cache):
    first = alignment(ONE, TWO)
    whole = kept(cache).read_bytes()
    for at in range(len(whole)):
        kept(cache).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        again = alignment(ONE, TWO)
        assert torch.equal(again.ids, first.ids)
        assert torch.equal(again.distances, first.distances)


def test_the_file_of_another_pair_is_noticed(cache, computed):
    alignment(TWO, ONE)
    other = kept(cache)
    content = other.read_bytes()
    other.unlink()
    first = alignment(ONE, TWO)
    kept(cache).write_bytes(content)
    assert torch.equal(alignment(ONE, TWO).ids, first.ids)
    assert len(computed) == 3


def test_a_file_of_other_tensors_is_noticed(cache):
    from safetensors.torch import save_file

    first = alignment(ONE, TWO)
    save_file({"ids": first.ids}, kept(cache))
    assert torch.equal(alignment(ONE, TWO).ids, first.ids)
    kept(cache).write_bytes(b"\x80\x04cos\nsystem\n")  # a pickle is never run
    assert torch.equal(alignment(ONE, TWO).ids, first.ids)


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PACKLLM_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert mined(ONE, TWO).tolist() == [0, 1, 2]
    assert "cannot cache" in caplog.text


# Fusion through it


@pytest.fixture
def mixed(make_member) -> list[Member]:
    """Three members with two vocabularies."""
    return [make_member("llama", 0), make_member("gpt2", 1, "words"), make_member("qwen", 2)]


def mapped(member: Member, reference: Member, ids: list[int]) -> torch.Tensor:
    """float32 (t, V_reference): logits of the member for each next reference id, by the definition."""
    if member.vocabulary.same_as(reference.vocabulary):
        to = torch.arange(len(reference.vocabulary))
        lost = torch.zeros(len(to), dtype=torch.bool)
    else:
        found = alignment(reference.vocabulary, member.vocabulary)
        to, lost = found.ids, found.distances == NONE
    with torch.inference_mode():
        logits = member.model(input_ids=to[ids][None], use_cache=False).logits[0].float()
    return logits[:, to].masked_fill(lost, -torch.inf)


def naive_greedy(members, reference, weights, pool, prompt, max_tokens) -> list[int]:
    ids = reference.encoder.encode(prompt).ids
    start = len(ids)
    while len(ids) < start + max_tokens:
        parts = [mapped(m, reference, ids)[-1].log_softmax(-1) for m, w in zip(members, weights, strict=True) if w]
        token = int(naive.fused(parts, [w for w in weights if w], pool).argmax())
        if token in reference.end_ids:
            break
        ids = [*ids, token]
    return ids[start:]


def reference_of(pack: Pack, prompt: str) -> Member:
    """The member that the scores by its own tokenizer put first."""
    by_bytes = pack.weigh(prompt, weighting="top1", unit="byte", decoding="auto")
    if not by_bytes.scored:
        return pack.members[0]
    return pack.members[min(range(len(pack.members)), key=by_bytes.nll.__getitem__)]


@pytest.mark.parametrize("pool", ["linear", "log"])
@pytest.mark.parametrize("weighting", ["em", "uniform", "sim", "opt", {"llama-0": 0.3, "gpt2-1": 0.4, "qwen-2": 0.3}])
def test_greedy_equals_the_naive_loop(mixed, weighting, pool):
    pack = Pack(mixed, weighting=weighting, pool=pool, tau=5, decoding="mined", max_tokens=10, adapt=False)
    for prompt in PROMPTS:
        generation = pack.generate(prompt)
        reference = reference_of(pack, prompt)
        values = generation.weights.values
        expected = naive_greedy(pack.members, reference, values, pool, prompt, 10)
        text = b"".join(reference.vocabulary.text_bytes(i) for i in expected).decode(errors="replace")
        assert generation.text == text
        assert generation.usage.completion_tokens == len(expected)
        assert generation.usage.prompt_tokens == len(reference.encoder.encode(prompt).ids)


def test_either_vocabulary_can_be_the_reference(make_member):
    found = set()
    for seeds in ((0, 1), (0, 3), (4, 5)):
        pack = Pack([make_member("llama", seeds[0]), make_member("gpt2", seeds[1], "words")], decoding="mined")
        for prompt in PROMPTS:
            reference = reference_of(pack, prompt)
            weights = pack.weigh(prompt, weighting="uniform")
            expected = naive_greedy(pack.members, reference, weights.values, "log", prompt, 6)
            text = b"".join(reference.vocabulary.text_bytes(i) for i in expected).decode(errors="replace")
            assert pack.generate(prompt, weighting="uniform", max_tokens=6).text == text
            found.add(len(reference.vocabulary))
    assert len(found) == 2


@pytest.mark.parametrize("weighting", ["em", "uniform", "top1", "sim", "opt", "exhaustive", "exact", "map"])
def test_one_vocabulary_is_fused_as_ever(make_pack, weighting):
    plain, mapped_ = make_pack(weighting=weighting, max_tokens=8), make_pack(weighting=weighting, decoding="mined")
    for prompt in PROMPTS[:2]:
        before = [(m.engine.forwards, m.engine.tokens) for m in plain.members]
        one = plain.generate(prompt)
        between = [(m.engine.forwards, m.engine.tokens) for m in plain.members]
        two = mapped_.generate(prompt, max_tokens=8)
        after = [(m.engine.forwards, m.engine.tokens) for m in plain.members]
        assert (one.text, one.weights) == (two.text, two.weights)
        assert [(b[0] - a[0], b[1] - a[1]) for a, b in zip(before, between, strict=True)] == [
            (b[0] - a[0], b[1] - a[1]) for a, b in zip(between, after, strict=True)
        ]


@pytest.mark.parametrize("weighting", ["opt", "exact", "exhaustive", "map", "em", "sim", "top1", "dexperts"])
def test_weights_are_those_of_the_mapped_logits(mixed, weighting):
    pack = Pack(mixed, weighting=weighting, tau=5, decoding="mined", min_weight=0)
    for prompt in PROMPTS:
        found = pack.weigh(prompt)
        reference = reference_of(pack, prompt)
        ids = reference.encoder.encode(prompt).ids
        logits = torch.stack([mapped(member, reference, ids)[:-1] for member in pack.members])
        expected = weights.solve(weighting, logits, torch.tensor(ids[1:]), tau=5)
        assert found.values == pytest.approx(expected.values, abs=2e-3)
        assert found.nll == pytest.approx(expected.nll, rel=1e-5)
        assert found.unit == "token"
        if expected.fused_nll is not None:
            assert found.fused_nll == pytest.approx(expected.fused_nll, rel=1e-5)


@pytest.mark.parametrize("weighting", ["opt", "exact", "exhaustive", "map"])
def test_without_it_the_log_pool_optimisers_refuse_several_vocabularies(mixed, weighting):
    pack = Pack(mixed, weighting=weighting)
    with pytest.raises(WeightsError, match="decoding='mined'"):
        pack.weigh(PROMPTS[0])
    with pytest.raises(WeightsError, match="decoding='mined'"):
        pack.generate(PROMPTS[0])


def test_several_prompts_each_have_their_own_reference(mixed):
    pack = Pack(mixed, decoding="mined", weighting="uniform", max_tokens=5)
    together = pack.generate_batch(PROMPTS)
    assert [g.text for g in together] == [pack.generate(prompt).text for prompt in PROMPTS]


def test_messages(mixed):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    pack = Pack(mixed, decoding="mined", weighting="uniform", max_tokens=6)
    reference = reference_of(pack, messages)
    expected = naive_greedy(pack.members, reference, [1 / 3] * 3, "log", messages, 6)
    text = b"".join(reference.vocabulary.text_bytes(i) for i in expected).decode(errors="replace")
    assert pack.generate(messages).text == text


def test_scores_of_continuations(mixed):
    pack = Pack(mixed, decoding="mined", weighting="uniform", pool="linear")
    texts = [" Paris", " the lazy dog."]
    reference = reference_of(pack, PROMPTS[0])
    prompt = reference.encoder.encode(PROMPTS[0]).ids
    for text, score in zip(texts, pack.score(PROMPTS[0], texts), strict=True):
        ids = prompt + reference.encoder.continuation(text)
        parts = torch.stack([mapped(m, reference, ids)[:-1].log_softmax(-1) for m in pack.members])
        fused = (parts.exp().mean(0)).log()[len(prompt) - 1 :]
        expected = fused.gather(-1, torch.tensor(ids[len(prompt) :])[:, None]).sum()
        assert score == pytest.approx(float(expected), rel=1e-4)
    assert {text for text, _ in pack.rerank(PROMPTS[0], texts)} == set(texts)


def test_its_sequences_do_what_sequences_do(make_member):
    reference, inner = make_member("llama", 0), make_member("gpt2", 1, "words")
    (member,) = translated([inner], reference)
    rows = [reference.encoder.encode(prompt).ids for prompt in PROMPTS]

    def expected(ids) -> torch.Tensor:
        return mapped(inner, reference, ids).log_softmax(-1)

    ends = {}
    for r, row in enumerate(rows):
        ends[r], scores = scored(member, row)
        chosen = expected(row)[:-1].gather(-1, torch.tensor(row[1:])[:, None])[:, 0]
        assert scores.tolist() == pytest.approx(chosen.tolist(), rel=1e-4)
        assert ends[r].next_logprobs.shape == (len(reference.vocabulary),)
    read_lines(ends, {0: [40], 1: [41], 2: [42]})
    grown = [[*row, token] for row, token in zip(rows, (40, 41, 42), strict=True)]
    for r, ids in enumerate(grown):
        assert torch.allclose(ends[r].next_logprobs, expected(ids)[-1], atol=1e-4)
    forks = {r: ends[r % 2].fork() for r in range(4)}
    for r, block in read_lines(forks, {r: [50, 51 + r] for r in forks}).items():
        assert torch.allclose(block, expected([*grown[r % 2], 50, 51 + r])[-2:], atol=1e-4)
        forks[r].close()
    assert member.engine.rewinds
    here = ends[1].next_logprobs
    ends[1].read([60])
    ends[1].crop(len(grown[1]), here)
    ends[1].read([61])
    assert torch.allclose(ends[1].next_logprobs, expected([*grown[1], 61])[-1], atol=1e-4)
    ends[1].close()
    with pytest.raises(MemberError, match="closed"):
        ends[1].read([1])


def test_what_gets_mass(make_member):
    reference, inner = make_member("gpt2", 1, "words"), make_member("llama", 0)
    (member,) = translated([inner], reference)
    masses = line(member, [1, 300]).next_logprobs.exp()
    assert masses.sum() == pytest.approx(1, abs=1e-5)
    found = alignment(reference.vocabulary, inner.vocabulary)
    assert all(masses[found.distances == NONE] == 0)
    eos, bos = reference.vocabulary.special["eos"], reference.vocabulary.special["bos"]
    assert masses[eos] > 0
    assert masses[bos] == 0  # the other has no such token


def test_the_answer_ends_where_the_reference_ends(mixed):
    pack = Pack(mixed, decoding="mined", weighting="uniform", max_tokens=20)
    reference = reference_of(pack, PROMPTS[0])
    tokens = naive_greedy(pack.members, reference, [1 / 3] * 3, "log", PROMPTS[0], 20)
    ended = copy.copy(reference)
    ended.end_ids = reference.end_ids | {tokens[4]}
    again = Pack([ended if m is reference else m for m in pack.members], decoding="mined", weighting="uniform")
    generation = again.generate(PROMPTS[0])
    assert generation.finish_reason == "stop"
    assert generation.usage.completion_tokens == tokens.index(tokens[4])


def bare_tokenizer() -> PreTrainedTokenizerFast:
    """Words of a few letters and nothing else: no BOS, EOS, pad or template, and no way to spell most text."""
    words = ["[UNK]", "the", "is", "a", "capital", "of", "##s", "France"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


@pytest.fixture
def bare(make_member) -> Member:
    model = make_member("llama", 7).model
    return Member(model, bare_tokenizer(), "bare")


@pytest.mark.parametrize("weighting", ["uniform", "opt", "em"])
def test_a_member_that_cannot_spell_the_text_and_has_no_end(make_member, bare, weighting):
    pack = Pack([make_member("gpt2", 1), bare], decoding="mined", weighting=weighting, max_tokens=6)
    for prompt in ("the capital of France is", "日本語の文章です。", "the 👍🏽"):
        generation = pack.generate(prompt)
        reference = reference_of(pack, prompt)
        expected = naive_greedy(pack.members, reference, generation.weights.values, generation.weights.pool, prompt, 6)
        assert generation.text == b"".join(map(reference.vocabulary.text_bytes, expected)).decode(errors="replace")


def rare_tokenizer() -> PreTrainedTokenizerFast:
    """Letters and spaces; all else is unknown, a run of it one token."""
    letters = {letter: i for i, letter in enumerate(["<unk>", "▁", *"abcdefghijklmnopqrstuvwxyzTF"])}
    tokenizer = Tokenizer(models.BPE(letters, [], unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Replace("▁", " ")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize(("text", "hidden"), [("The cat 日本語 sat", 9), ("The 日本 cat 語", 9), ("The cat sat", 0)])
def test_an_unknown_token_is_charged_for_the_bytes_it_hides(make_member, text, hidden):
    model = make_member("llama", 3).model
    rare = Member(model, rare_tokenizer(), "rare")
    weights = Pack([rare, make_member("gpt2", 1)], unit="byte", weighting="sim").weigh(text)
    encoded = rare.encoder.encode(text)
    assert (rare.vocabulary.special["unk"] in encoded.ids) == bool(hidden)
    given = float(naive.token_logprobs(rare, encoded.ids)[2:].sum()) - 8 * math.log(2) * hidden
    assert weights.scored == len(text.encode()) - 3  # all but the first word: nothing predicts its first token
    assert weights.nll[0] == pytest.approx(-given / weights.scored, rel=1e-5)


def test_one_unknown_in_all_members_is_nobodys_fault(make_member):
    tokenizer = rare_tokenizer()
    members = [Member(make_member("llama", seed).model, tokenizer, f"rare{seed}") for seed in (3, 4)]
    weights = Pack(members, unit="token").weigh("The cat 日本語 sat")
    ids = members[0].encoder.encode("The cat 日本語 sat").ids
    assert weights.nll == pytest.approx([-float(naive.token_logprobs(m, ids).mean()) for m in members], rel=1e-5)


def test_members_of_one_engine_stay_on_one(make_member, word_tokenizer):
    reference, base = make_member("llama", 0), make_member("gpt2", 1, "words")
    twins = [Member(base.model, word_tokenizer, name, base.encoder, engine=base.engine) for name in ("a", "b")]
    other = make_member("qwen", 4, "words")
    one, two, three = translated([*twins, other], reference)
    assert one.engine is two.engine is not three.engine
    pack = Pack([reference, *twins], decoding="mined", weighting="uniform", max_tokens=5)
    prompt = next(p for p in PROMPTS if reference_of(pack, p) is reference)
    before = base.engine.forwards
    found = pack.generate(prompt)
    steps = found.usage.completion_tokens - (found.finish_reason == "length")
    assert base.engine.forwards - before == 1 + 1 + steps  # their own ids, the reference's, the answer; for both


def test_it_is_never_the_default(mixed, monkeypatch):
    def refuse(*args):
        raise AssertionError("mapped unasked")

    monkeypatch.setattr("packllm.decode.request.translated", refuse)
    pack = Pack(mixed, max_tokens=3)
    pack.weigh(PROMPTS[0])
    pack.generate(PROMPTS[0])
    pack.score(PROMPTS[0], [" Paris"])


@pytest.mark.real
def test_real_members(shared, starter_pack):
    stories = Pack.load([shared / "models" / "stories260K"]).members[0]
    pack = Pack([starter_pack.members[0], stories], decoding="mined", max_tokens=12)
    prompt = "The statute of limitations bars the claim because the plaintiff filed it"
    weights = pack.weigh(prompt, weighting="opt")
    assert weights.values[0] > 0.7  # of law the small one knows nothing
    generation = pack.generate(prompt, weighting="uniform")
    expected = naive_greedy(pack.members, pack.members[0], (0.5, 0.5), "log", prompt, 12)
    text = b"".join(map(pack.members[0].vocabulary.text_bytes, expected)).decode(errors="replace")
    assert generation.text == text


def test_a_reference_text_longer_than_a_window_is_refused(make_member):
    seeds = [(k, p) for k in range(1, 6) for p in PROMPTS]
    packs = [(Pack([make_member("llama", 0), make_member("gpt2", k, "words")]), p) for k, p in seeds]
    pack, prompt = next((pack, p) for pack, p in packs if reference_of(pack, p) is pack.members[1])
    one, two = copy.copy(pack.members[0]), pack.members[1]
    pack = Pack([one, two], decoding="mined", weighting="uniform")
    own, mapped_ = (len(member.encoder.encode(prompt).ids) for member in (one, two))
    assert own < mapped_
    one.context_window = mapped_ + 3
    assert pack.generate(prompt).usage.completion_tokens <= 3
    with pytest.raises(ContextOverflowError, match=f"prompt of {mapped_} tokens plus max_tokens=4 .* member 'llama-0'"):
        pack.generate(prompt, max_tokens=4)
    one.context_window = mapped_ - 1
    with pytest.raises(ContextOverflowError, match=f"{mapped_} tokens"):
        pack.weigh(prompt)
    with pytest.raises(ContextOverflowError):
        pack.score(prompt, [" a"])


def test_a_member_that_fails(make_member, word_tokenizer):
    def broken(*args, **inputs):
        raise RuntimeError("out of memory")

    one, two = make_member("llama", 0), make_member("qwen", 2)
    model = copy.deepcopy(make_member("gpt2", 1, "words").model)
    failing = Member(model, word_tokenizer, "failing")
    model.forward = model.transformer.forward = broken
    pack = Pack([one, failing, two], decoding="mined", weighting="uniform", max_tokens=4)
    with pytest.raises(MemberError, match="out of memory"):
        pack.generate(PROMPTS[0])
    generation = pack.generate(PROMPTS[0], on_member_error="drop")
    assert generation.text == Pack([one, two], weighting="uniform", max_tokens=4).generate(PROMPTS[0]).text
    assert generation.weights.values == (0.5, 0, 0.5)


def test_a_member_that_fails_only_in_other_ids(make_member, word_tokenizer):
    one, two = make_member("llama", 0), make_member("qwen", 2)
    model = copy.deepcopy(make_member("gpt2", 1, "words").model)
    member = Member(model, word_tokenizer, "late")
    forward, calls = model.transformer.forward, []

    def late(*args, **inputs):
        calls.append(1)
        output = forward(*args, **inputs)
        if len(calls) > 1:
            output.last_hidden_state.mul_(torch.nan)
        return output

    model.transformer.forward = late
    pack = Pack([one, member, two], decoding="mined", weighting="uniform", max_tokens=4)
    with pytest.raises(MemberError, match="'late': its logits are not finite"):
        pack.generate(PROMPTS[0])
    calls.clear()
    generation = pack.generate(PROMPTS[0], on_member_error="drop")
    assert generation.weights.values == (0.5, 0, 0.5)


def test_the_public_name():
    assert packllm.align.mined is mined
