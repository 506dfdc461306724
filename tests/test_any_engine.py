"""A pack whose members are no torch models, or not all: every way of asking, weighing and decoding."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence

import naive
import numpy as np
import pytest
import torch
from conftest import TextPack as Pack
from engines.bytes import END, ByteEncoder, ByteEngine
from transformers import LlamaConfig, LlamaForCausalLM

from packllm import Member, MemberError
from packllm.weights import solve

STORY = b"once upon a time there was a little girl who lived in a small house near the forest. she had a dog. " * 3
COURT = b"the court shall order relief under chapter 7 unless the debtor objects within 30 days of the notice. " * 3
PROMPT = "the court shall "
PROMPTS = [PROMPT, "once upon", "a dog. "]
LONG = (COURT + STORY).decode()[:200]
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "who lived in the house?"}]
OPTIONS = ["order relief", "have a dog", "7é"]


def of_bytes(text: bytes, name: str) -> Member:
    return Member(name=name, encoder=ByteEncoder(), engine=ByteEngine(text))


@pytest.fixture(scope="module")
def byte_llama() -> Member:
    """A Llama that reads and writes bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=1024, initializer_range=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return Member(LlamaForCausalLM(config), None, "llama", ByteEncoder())


@pytest.fixture
def alike(byte_llama) -> list[Member]:
    """Members of one vocabulary."""
    return [of_bytes(STORY, "story"), of_bytes(COURT, "court"), byte_llama]


@pytest.fixture
def unlike(make_member) -> list[Member]:
    """Members of several."""
    return [of_bytes(STORY, "story"), of_bytes(COURT, "court"), make_member("llama", 0)]


def row(member: Member, ids: Sequence[int]) -> torch.Tensor:
    """float32 (V,), log-probabilities after ids, anew."""
    if isinstance(member.engine, ByteEngine):
        return torch.from_numpy(member.engine.row(ids))
    return naive.next_logprobs(member, list(ids))


def rows(member: Member, ids: Sequence[int]) -> torch.Tensor:
    return torch.stack([row(member, ids[: n + 1]) for n in range(len(ids))])


def greedy(members: Sequence[Member], weights: Sequence[float], pool: str, prompt: str, limit: int) -> str:
    ids = list(prompt.encode())
    for _ in range(limit):
        parts = [row(m, ids) for m, w in zip(members, weights, strict=True) if w]
        token = int(naive.fused(parts, [w for w in weights if w], pool).argmax())
        if token == END:
            break
        ids.append(token)
    return bytes(ids[len(prompt.encode()) :]).decode(errors="replace")


@pytest.mark.parametrize("places", [1, 4, None])
@pytest.mark.parametrize("pool", ["linear", "log"])
def test_tokens_and_drafts_and_batches(alike, pool, places):
    fixed = {"story": 0.3, "court": 0.5, "llama": 0.2}
    pack = Pack(alike, weighting=fixed, pool=pool, max_tokens=24, draft_tokens=places)
    expected = [greedy(alike, list(fixed.values()), pool, prompt, 24) for prompt in PROMPTS]
    assert [pack.generate(prompt).text for prompt in PROMPTS] == expected
    answers = pack.generate_batch(PROMPTS)
    assert [answer.text for answer in answers] == expected
    assert "".join(chunk.text for chunk in pack.stream(PROMPT)) == expected[0]
    if places == 4:
        assert any(answer.usage.accepted_tokens for answer in answers)


@pytest.mark.parametrize("weighting", ["em", "sim", "uniform", "top1", "opt", "exact", "map", "exhaustive", "dexperts"])
def test_weights(alike, weighting):
    found = Pack(alike, weighting=weighting, min_weight=0, tau=2).weigh(PROMPT)
    ids = list(PROMPT.encode())
    logits = torch.stack([rows(member, ids)[:-1] for member in alike])
    expected = solve(weighting, logits, torch.tensor(ids[1:]), tau=2)
    assert found.values == pytest.approx(expected.values, abs=2e-3)
    assert found.nll == pytest.approx(expected.nll, rel=1e-4)
    if weighting == "em":
        assert found.values[1] > 0.8


@pytest.mark.parametrize("options", [{}, {"draft_tokens": 4}, {"decoding": "lazy"}], ids=["plain", "drafts", "lazy"])
def test_draws(alike, options):
    """The first token after "the court s": 300 draws from the mixture, each count within 5 standard deviations."""
    fixed = {"story": 0.4, "court": 0.4, "llama": 0.2}
    pack = Pack(alike, weighting=fixed, temperature=1.0, max_tokens=2, pool="linear", batch_size=100, **options)
    prompt = "the court s"
    parts = [row(member, list(prompt.encode())) for member in alike]
    mixture = naive.fused(parts, list(fixed.values()), "linear")
    found = Counter(answer.text[:1] for answer in pack.generate_batch([prompt] * 300))
    assert pack.generate(prompt, seed=3).text == pack.generate(prompt, seed=3).text
    for token in mixture.topk(4).indices.tolist():
        p, count = float(mixture[token]), found[chr(token)]
        assert abs(count / 300 - p) <= 5 * math.sqrt(p * (1 - p) / 300)


def test_a_schema(alike):
    schema = {"type": "object", "properties": {"dog": {"type": "boolean"}}, "required": ["dog"]}
    pack = Pack(alike, weighting="uniform", max_tokens=40)
    assert isinstance(json.loads(pack.generate(PROMPT, json_schema=schema).text)["dog"], bool)


@pytest.mark.parametrize("pool", ["linear", "log"])
def test_scores(alike, pool):
    pack = Pack(alike, weighting="uniform", pool=pool)
    for text, score in zip(OPTIONS, pack.score(PROMPT, OPTIONS), strict=True):
        ids = list((PROMPT + text).encode())
        start = len(PROMPT.encode())
        fused = naive.fused([rows(member, ids) for member in alike], [1 / 3] * 3, pool).log()
        expected = fused[range(start - 1, len(ids) - 1), ids[start:]].sum()
        assert score == pytest.approx(float(expected), rel=1e-4)
    assert pack.rerank(PROMPT, OPTIONS)[0][0] == "order relief"


def test_chat(alike):
    pack = Pack(alike, weighting="em", max_tokens=16)
    assert pack.has_chat_template
    answer = pack.generate(CHAT)
    assert answer.weights.top == "story"
    written = "system: be brief\nuser: who lived in the house?\nassistant:"
    assert answer.text == greedy(alike, answer.weights.values, answer.weights.pool, written, 16)


def test_a_prompt_that_begins_alike(alike):
    pack = Pack(alike, weighting="em", max_tokens=8)
    fresh = pack.generate(LONG + "?", prefix_cache_mb=0)
    pack.generate(LONG + "!")
    before = [member.engine.tokens for member in alike]
    again = pack.generate(LONG + "?")
    assert again.text == fresh.text
    assert again.weights.values == pytest.approx(fresh.weights.values, abs=1e-5)
    assert again.usage.cached_tokens == len(LONG)
    assert all(member.engine.tokens - b < 20 for member, b in zip(alike, before, strict=True))
    assert pack.prefixes.stats.hits == 3


@pytest.mark.parametrize("decoding", ["auto", "cool", "cool+rerank", "mined"])
def test_several_vocabularies(unlike, decoding):
    pack = Pack(unlike, weighting="em", decoding=decoding, max_tokens=20)
    answer = pack.generate(PROMPT)
    assert 0 < answer.usage.completion_tokens <= 20
    assert answer.weights.values[1] == max(answer.weights.values)
    assert [g.text for g in pack.generate_batch(PROMPTS)] == [pack.generate(prompt).text for prompt in PROMPTS]
    ranked = pack.rerank(PROMPT, OPTIONS[:2])
    assert ranked[0][0] == "order relief"


def test_optimisers_over_mappings(unlike):
    for weighting in ("exact", "opt"):
        found = Pack(unlike, weighting=weighting, decoding="mined").weigh(PROMPT)
        assert found.values[1] > 0.5
        assert sum(found.values) == pytest.approx(1)


def test_words(unlike):
    weights = Pack(unlike, weighting="em").weigh(LONG)
    assert weights.unit == "word"
    assert weights.nll[2] > max(weights.nll[:2])
    (score,) = Pack(unlike, weighting={"story": 1.0}).score(PROMPT, ["near"])
    ids = list((PROMPT + "near").encode())
    expected = rows(unlike[0], ids)[range(len(ids) - 5, len(ids) - 1), ids[-4:]].sum()
    assert score == pytest.approx(float(expected), rel=1e-4)


def test_a_member_that_fails(alike):
    alike[0].engine.poison = ord("r")
    with pytest.raises(MemberError, match=r"story.*out of memory"):
        Pack(alike, weighting="uniform", max_tokens=12).generate(PROMPT)
    answer = Pack(alike, weighting="uniform", max_tokens=12, on_member_error="drop").generate(PROMPT)
    assert answer.weights.values == pytest.approx((0, 0.5, 0.5))
    assert answer.text == greedy(alike, (0, 0.5, 0.5), answer.weights.pool, PROMPT, 12)


def test_fingerprints(alike):
    assert len({member.fingerprint for member in alike}) == 3
    assert np.isfinite(alike[0].engine.row([1])).all()
