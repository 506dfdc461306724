"""Passages by fused log p(question | passage): against score() and full passes, and what the members read."""

from __future__ import annotations

import asyncio
from threading import Event

import naive
import pytest
import torch
from conftest import TextPack

from packllm import CancelledError, ContextOverflowError, Pack, PromptError
from packllm.decode.relevance import INSTRUCTION, with_cosine

QUESTION = "What is the capital of France?"
PASSAGES = [
    "The capital of France is Paris.",
    "A query planner chooses an index scan or a sequential scan from statistics of the table.",
    "The court shall order relief under chapter 7 unless the debtor objects.",
]
EVEN = {"llama-0": 0.5, "gpt2-1": 0.3, "qwen-2": 0.2}


@pytest.mark.parametrize("pool", ["linear", "log"])
def test_the_question_after_each_passage_by_full_passes(members, pool):
    found = Pack(members, weighting=EVEN, pool=pool, batch_size=2).relevance(QUESTION, PASSAGES)
    truth = []
    for passage in PASSAGES:
        encoder = members[0].encoder
        told = [{"role": "user", "content": f"{INSTRUCTION}\n\nPassage: {passage}"}]
        read, total = encoder.encode(told).ids, 0.0
        for token in encoder.continuation(QUESTION):
            parts = [naive.next_logprobs(member, read) for member in members]
            total += float(naive.fused(parts, list(EVEN.values()), pool)[token].log())
            read = [*read, token]
        truth.append(total)
    assert found == pytest.approx(truth, abs=2e-3)
    assert max(found) - min(found) > 0.1


@pytest.mark.parametrize("options", [{}, {"decoding": "mined"}, {"prefix_cache_mb": 0}])
def test_several_vocabularies_and_texts_as_score_has_them(make_member, options):
    pack = Pack([make_member("llama", 0), make_member("gpt2", 1, "word")], **options)  # one has no template: text
    told = [f"{INSTRUCTION}\n\nPassage: {passage}\n\nQuestion:" for passage in PASSAGES]
    expected = [pack.score(prompt, [f" {QUESTION}"])[0] for prompt in told]
    assert pack.relevance(QUESTION, PASSAGES) == pytest.approx(expected, abs=2e-3)


def test_weightings_that_read_hidden_states_find_those_of_the_beginning(members):
    pack = Pack(members[::2], weighting="exact")
    told = [[{"role": "user", "content": f"{INSTRUCTION}\n\nPassage: {passage}"}] for passage in PASSAGES]
    expected = [pack.score(one, [QUESTION])[0] for one in told]
    assert pack.relevance(QUESTION, PASSAGES) == pytest.approx(expected, abs=2e-2)


def test_the_instruction_is_read_once_and_passages_once_for_all_questions(make_member):
    member = make_member("llama", 0)
    pack, engine = Pack([member]), member.engine
    passages = [" ".join([passage] * 4) for passage in PASSAGES]  # short ones are not kept
    prompts = [
        member.encoder.encode([{"role": "user", "content": f"{INSTRUCTION}\n\nPassage: {passage}"}]).ids
        for passage in passages
    ]
    beginning = next(at for at, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1)
    assert beginning > 30
    question = len(member.encoder.continuation(QUESTION)) - 1  # the last token is not read, only rated
    tokens, forwards = engine.tokens, engine.forwards
    pack.relevance(QUESTION, passages)
    once = beginning + sum(len(ids) - beginning for ids in prompts)
    assert engine.tokens - tokens <= once + 3 * question + 3
    together, forwards = engine.forwards - forwards, engine.forwards
    Pack([member]).relevance(QUESTION, passages, batch_size=1)
    assert together < (engine.forwards - forwards)
    tokens = engine.tokens
    pack.relevance("Who may appeal?", passages)
    assert engine.tokens - tokens < once / 2


def test_async_and_cancelled(pack):
    assert asyncio.run(pack.arelevance(QUESTION, PASSAGES)) == pytest.approx(pack.relevance(QUESTION, PASSAGES))
    cancel = Event()
    cancel.set()
    with pytest.raises(CancelledError):
        pack.relevance(QUESTION, PASSAGES, cancel=cancel)


def test_bad_input(pack, members):
    assert pack.relevance(QUESTION, []) == []
    for question in ("", " \n", "\ufeff", None, 7):
        with pytest.raises(PromptError, match="question="):
            pack.relevance(question, PASSAGES)
    for passages in ([PASSAGES[0], " "], [PASSAGES[0], "\ufeff\u200b\n"], [PASSAGES[0], None], [PASSAGES[0], "\ud800"]):
        with pytest.raises(PromptError, match=r"passages\[1\]"):
            pack.relevance(QUESTION, passages)
    with pytest.raises(PromptError, match="list of texts"):
        pack.relevance(QUESTION, "a passage")
    forwards = [member.engine.forwards for member in members]
    for length in (480, 5000):  # near the window of 512, and so long that it is not even encoded
        with pytest.raises(ContextOverflowError, match=r"passages\[2\]") as caught:
            pack.relevance(QUESTION, [*PASSAGES[:2], "7 " * length])
        assert caught.value.passage == 2
        assert caught.value.limit == 512
        assert "split the passage" in str(caught.value)
        assert "shorten the question" not in str(caught.value)
    with pytest.raises(ContextOverflowError, match="shorten the question"):
        pack.relevance("7 " * 480, PASSAGES)
    with pytest.raises(PromptError, match="question holds a lone surrogate"):
        pack.relevance("\ud800", PASSAGES)
    assert [member.engine.forwards for member in members] == forwards


def test_a_member_that_fails_is_dropped_for_all_passages(members, monkeypatch):
    pack = TextPack(members, weighting="uniform", on_member_error="drop", batch_size=3)
    rest = TextPack([members[0], members[2]], weighting="uniform")
    expected = rest.relevance(QUESTION, PASSAGES)
    logprobs = type(members[1].engine)._logprobs

    def broken(engine, logits):
        return logprobs(engine, logits * float("nan") if engine is members[1].engine else logits)

    monkeypatch.setattr(type(members[1].engine), "_logprobs", broken)
    assert pack.relevance(QUESTION, PASSAGES) == pytest.approx(expected, abs=1e-3)
    assert torch.tensor(expected).isfinite().all()


def test_ratings_and_cosines_count_alike():
    # Cosines 1, 0 and .6 and ratings, both standardised: whatever scale the ratings and vectors are of.
    vectors = [[2.0, 0.0], [0.0, 5.0], [0.3, 0.4]]
    ratings = torch.tensor([-50.0, -10.0, -30.0], dtype=torch.float64)
    cosines = torch.tensor([1.0, 0.0, 0.6], dtype=torch.float64)
    parts = [(part - part.mean()) / part.std(correction=0) for part in (ratings, cosines)]
    expected = (parts[0] + parts[1]).tolist()
    assert with_cosine(ratings.tolist(), [3.0, 0.0], vectors) == pytest.approx(expected)
    assert with_cosine((10 * ratings).tolist(), [1.0, 0.0], vectors) == pytest.approx(expected)
    alone = with_cosine([-float("inf")] * 3, [1.0, 0.0], vectors)  # a question that no tokenizer knows
    assert alone == pytest.approx(parts[1].tolist())
    assert with_cosine([-3.0], [1.0, 0.0], vectors[:1]) == [0.0]
    assert with_cosine([-3.0, -3.0], [0.0, 0.0], vectors[:2]) == [0.0, 0.0]
