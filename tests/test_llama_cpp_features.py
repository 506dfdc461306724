"""What a pack does, over llama.cpp: every weighting, every decoding and the options of an answer, against the same
weights in torch. Files are float32, with keys and values in 32 bits, so that numbers agree to the fifth digit."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from conftest import TextPack as Pack
from test_gguf import write_gguf

from packllm import Member, MemberError
from packllm.decode.decodings import DECODINGS
from packllm.engines.llama_cpp.native import VERSION, installed
from packllm.engines.load import Loader
from packllm.weights import WEIGHTINGS, tfidf

if installed() != VERSION:
    pytest.skip(f"needs llama-cpp-python=={VERSION} (extra llama-cpp)", allow_module_level=True)

PROMPTS = ["The court shall order relief under", "Once upon a time", "def add(a, b):"]
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "What is the capital of France?"}]
TEXTS = [" the chapter 7", " was a little girl", "    return"]
SCHEMA = {"type": "object", "properties": {"dog": {"type": "boolean"}}, "required": ["dog"]}


@pytest.fixture(scope="module")
def sides(make_member, tmp_path_factory) -> tuple[list[Member], list[Member]]:
    """Three members in torch, and the same in llama.cpp."""
    folder, torches = (
        tmp_path_factory.mktemp("gguf"),
        [make_member("llama", seed, name=f"m{seed}") for seed in range(3)],
    )
    for member in torches:
        write_gguf(member, folder / f"{member.name}.gguf")
    members = Loader(engine="llama.cpp").members(sorted(folder.iterdir()))
    for member in members:
        member.engine._context(None).kind = 0
    return torches, members


@pytest.fixture(scope="module")
def unlike(sides, make_member) -> tuple[list[Member], list[Member]]:
    """With a third of another vocabulary."""
    other = make_member("llama", 7, "words", name="words")
    return [*sides[0][:2], other], [*sides[1][:2], other]


def told(members: Sequence[Member], **options: Any) -> list[tuple[Any, ...]]:
    found = Pack(members, **{"max_tokens": 12, **options}).generate_batch(PROMPTS)
    return [(g.text, g.finish_reason, g.decoding, g.usage.completion_tokens) for g in found]


@pytest.fixture(scope="module")
def fitted(sides, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("fitted")
    features = tfidf.Features({"court": 0, "once": 1, "def": 2}, np.ones(3))
    arrays = {"cbtm": {"centroids": np.eye(3)[:, None]}, "router": {"weights": np.eye(3), "bias": np.zeros(3)}}
    for name, held in arrays.items():
        tfidf.Fitted(name, ("m0", "m1", "m2"), features, held).save(folder / name)
    return {name: str(folder / f"{name}") for name in arrays}


@pytest.mark.parametrize("weighting", [*WEIGHTINGS, "fixed"])
def test_weightings(sides, weighting, request):
    words: dict[str, Any] = {"weighting": {"m0": 0.5, "m1": 0.3, "m2": 0.2} if weighting == "fixed" else weighting}
    if weighting in ("cbtm", "router"):
        words["fitted"] = request.getfixturevalue("fitted")[weighting]
    packs = [Pack(members, min_weight=0, **words) for members in sides]
    for prompt in PROMPTS:
        right, found = (pack.weigh(prompt) for pack in packs)
        assert found.values == pytest.approx(right.values, abs=2e-3)
        assert found.nll == pytest.approx(right.nll, rel=1e-4)
        assert (found.unit, found.pool) == (right.unit, right.pool)
    assert told(sides[1], **words) == told(sides[0], **words)


@pytest.mark.parametrize("weighting", ["em", "opt", "exact"])
@pytest.mark.parametrize("decoding", DECODINGS)
def test_decodings(sides, decoding, weighting):
    words = {"weighting": weighting, "decoding": decoding}
    if decoding == "lazy":
        words |= {"temperature": 1.0, "seed": 3, "pool": "linear"}
    assert told(sides[1], **words) == told(sides[0], **words)


@pytest.mark.parametrize("decoding", ["auto", "cool", "cool+rerank", "mined"])
def test_several_vocabularies(unlike, decoding):
    answers = [told(members, decoding=decoding) for members in unlike]
    assert answers[0] == answers[1]
    assert all(text for text, *_ in answers[1])


@pytest.mark.parametrize(
    "options",
    [
        {"pool": "linear", "draft_tokens": 4},
        {"pool": "log", "draft_tokens": 1},
        {"temperature": 0.8, "seed": 5, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
        {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2, "logit_bias": {" the": 2.0}},
        {"stop": ["a"]},
        {"adapt": True, "sleep": 0.3},
        {"prior": {"m0": 0.2, "m1": 0.2, "m2": 0.6}},
        {"race": 4},
        {"unit": "byte", "scoring": "mixture"},
        {"score_on": "e", "align": False},
        {"max_cache_mb": 1, "prefix_cache_mb": 0, "batch_size": 2},
        {"json_schema": SCHEMA, "max_tokens": 40},
        {"timeout": 600.0, "cache_salt": "me"},
    ],
    ids=lambda options: "+".join(options),
)
def test_options(sides, options):
    assert told(sides[1], **options) == told(sides[0], **options)


def test_several_answers_and_their_log_probabilities(sides):
    words: dict[str, Any] = {"n": 3, "temperature": 1.0, "seed": 1, "top_logprobs": 3, "max_tokens": 6}
    right, found = (Pack(members).generate(PROMPTS[0], **words) for members in sides)
    assert len({answer.text for answer in found}) > 1
    for one, other in zip(found, right, strict=True):
        assert one.text == other.text
        for a, b in zip(one.logprobs, other.logprobs, strict=True):
            assert (a.token, a.id) == (b.token, b.id)
            assert a.logprob == pytest.approx(b.logprob, abs=2e-3)
            assert a.members == pytest.approx(b.members, abs=2e-3)
            assert [top.id for top in a.top_logprobs] == [top.id for top in b.top_logprobs]


def test_texts_are_scored(sides, unlike):
    for torches, members in (sides, unlike):
        right, pack = Pack(torches), Pack(members)
        assert pack.score(PROMPTS[0], TEXTS) == pytest.approx(right.score(PROMPTS[0], TEXTS), rel=1e-3)
        assert [text for text, _ in pack.rerank(PROMPTS[0], TEXTS)] == [t for t, _ in right.rerank(PROMPTS[0], TEXTS)]
        one, other = pack.decide(PROMPTS[1], ["yes", "no"]), right.decide(PROMPTS[1], ["yes", "no"])
        assert one.choice == other.choice
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-3)
        passages = ["Paris is the capital.", "The dog sleeps."]
        question = "What is the capital?"
        assert pack.relevance(question, passages) == pytest.approx(right.relevance(question, passages), rel=1e-3)


def test_passages_are_explained(sides):
    words = {"passages": ["the capital of France", "a little girl"], "max_tokens": 4}
    prompt = "Read: the capital of France. And: a little girl. Answer"
    right, found = (Pack(members).generate(prompt, **words).explanation for members in sides)
    assert json.dumps(found.as_dict())
    for one, other in zip(found.passages, right.passages, strict=True):
        assert one.perplexity == pytest.approx(other.perplexity, rel=1e-3)
        assert one.share == pytest.approx(other.share, abs=2e-3)


def test_conversations_streams_and_tasks(sides):
    right, pack = (Pack(members, chat_template=None, max_tokens=10) for members in sides)
    expected = right.generate(CHAT)
    assert "".join(chunk.text for chunk in pack.stream(CHAT)) == expected.text
    more = [*CHAT, {"role": "assistant", "content": expected.text}, {"role": "user", "content": "And of Spain?"}]

    async def several() -> list[str]:
        answers = await asyncio.gather(*(pack.agenerate(prompt) for prompt in (CHAT, more, *PROMPTS)))
        return [answer.text for answer in answers]

    assert asyncio.run(several()) == [right.generate(prompt).text for prompt in (CHAT, more, *PROMPTS)]


def test_a_member_that_fails_is_dropped(sides, monkeypatch):
    right = Pack(sides[0][1:], weighting="uniform", max_tokens=8).generate(PROMPTS[0])
    monkeypatch.setattr(sides[1][0].engine, "compute", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(MemberError, match=r"m0.*out of memory"):
        Pack(sides[1], weighting="uniform", max_tokens=8).generate(PROMPTS[0])
    found = Pack(sides[1], weighting="uniform", max_tokens=8, on_member_error="drop").generate(PROMPTS[0])
    assert found.weights.values == pytest.approx((0, 0.5, 0.5))
    assert found.text == right.text


def test_mixed_engines_write_what_one_engine_writes(sides):
    """Members of equal numbers, in torch and in llama.cpp, in every mixture."""
    torches, members = sides
    for options in ({}, {"pool": "log", "draft_tokens": 4, "weighting": "exact"}, {"decoding": "cool"}):
        expected = told(torches, **options)
        for which in (1, 4, 6):
            mixed = [(members if which >> k & 1 else torches)[k] for k in range(3)]
            assert told(mixed, **options) == expected
