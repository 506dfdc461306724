"""The weighting, the decoding and the engine of docs/extending: each against what it says that it does."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import naive
import pytest
import torch
from conftest import CORPUS, TextPack
from engines.contract import (  # noqa: F401
    Subject,
    test_a_closed_sequence_is_freed,
    test_a_fork_is_independent,
    test_a_read_equals_a_fresh_one,
    test_a_read_that_fails_leaves_the_others_right,
    test_any_cuts_of_a_read_equal_the_whole,
    test_any_history_of_reads_and_crops,
    test_company_changes_nothing,
    test_every_want,
    test_ids_survive_a_lost_cache,
    test_nothing_to_read,
    test_several_reads_of_one_sequence,
    test_threads,
)
from pages import blocks, definitions, read, registries

from packllm import Member, VocabularyError
from packllm.options import make_options
from packllm.weights import Problem, solve

TEXT = "The court shall order relief under chapter 7"


@pytest.fixture(autouse=True)
def registries_stay() -> Iterator[None]:
    with registries():
        yield


@pytest.mark.parametrize("name", ["weighting", "decoding", "engine"])
def test_an_example_is_whole_and_short(name):
    first, *_ = (block.text for block in blocks(read(f"docs/extending/{name}.md")) if block.language == "python")
    assert len([line for line in first.splitlines() if line.strip()]) <= (45 if name == "engine" else 32)
    assert "from packllm" in first


# The weighting


def test_wins_by_hand():
    wins = definitions("docs/extending/weighting.md")["wins"]
    p = torch.tensor([[0.9, 0.2, 0.5, 0.1], [0.3, 0.4, 0.5, 0.6]], dtype=torch.float64)  # the third token: equals
    problem = Problem(("a", "b"), p.log())
    assert wins(problem, make_options({"alpha": 0})).values == (0.5, 0.5)
    assert wins(problem, make_options({"alpha": 4})).values == (0.5, 0.5)
    assert wins(Problem(("a", "b"), p[:, :2].flip(0).log()), make_options({"alpha": 0})).values == (0.5, 0.5)
    assert wins(Problem(("a", "b"), p[:, 1:].log()), make_options({"alpha": 1})).values == (1.5 / 4, 2.5 / 4)


def test_wins_in_a_pack(members):
    definitions("docs/extending/weighting.md")
    weights = TextPack(members).weigh(TEXT, weighting="wins", alpha=0)
    ids = members[0].encoder.plain(TEXT)
    best = torch.stack([naive.token_logprobs(member, ids) for member in members]).argmax(0)
    assert weights.values == tuple(float((best == k).double().mean()) for k in range(3))
    assert (weights.strategy, weights.pool, weights.scored) == ("wins", "linear", len(ids) - 1)
    assert len({*weights.values}) > 1
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    assert sum(solve("wins", logits, torch.arange(5)).values) == pytest.approx(1)


# The decoding


def cautious(members: Sequence[Member], prompt: str, limit: int) -> tuple[str, list[float]]:
    """Greedy, anew at each token."""
    ids, given = members[0].encoder.plain(prompt), []
    start = len(ids)
    while len(ids) < start + limit:
        least = torch.stack([naive.next_logprobs(member, ids) for member in members]).amin(0).log_softmax(-1)
        token = int(least.argmax())
        if token in members[0].end_ids:
            break
        ids.append(token)
        given.append(float(least[token]))
    return members[0].tokenizer.decode(ids[start:]), given


def test_cautious_is_the_naive_loop(members):
    definitions("docs/extending/decoding.md")
    pack, prompts = (
        TextPack(members, weighting="uniform", decoding="cautious", max_tokens=8),
        [TEXT, CORPUS[0][:9], "a"],
    )
    expected = [cautious(members, prompt, 8) for prompt in prompts]
    assert len({text for text, _ in expected}) == 3
    answers = [pack.generate(prompt, logprobs=True) for prompt in prompts]
    assert [answer.text for answer in answers] == [text for text, _ in expected]
    for answer, (_, given) in zip(answers, expected, strict=True):
        assert [token.logprob for token in answer.logprobs] == pytest.approx(given, abs=1e-4)
        assert answer.decoding == "cautious"
    assert [answer.text for answer in pack.generate_batch(prompts)] == [text for text, _ in expected]
    assert pack.generate(TEXT, stop=[expected[0][0][3:5]]).text == expected[0][0].partition(expected[0][0][3:5])[0]
    plain = [pack.generate(prompt, decoding="auto").text for prompt in prompts]
    assert plain != [text for text, _ in expected]


def test_cautious_refuses_what_it_cannot_fuse(make_member):
    definitions("docs/extending/decoding.md")
    pack = TextPack([make_member("llama", 0), make_member("llama", 1, "words")])
    with pytest.raises(VocabularyError, match="decoding='cautious'"):
        pack.generate(TEXT, decoding="cautious")


# The engine


@pytest.fixture
def subject(monkeypatch) -> Subject:
    """The engine of the page as the contract wants it. It is not asked to start from earlier prompts."""
    space = definitions("docs/extending/engine.md")
    ids = [(7 * n * n + n) % 23 for n in range(60)]
    engine = space["Bigrams"](ids, 30)

    def truth(ids: Sequence[int], adapter: int | None) -> torch.Tensor:
        table = torch.full((30, 30), 0.1 / 30)
        for a in range(30):
            followers = [b for before, b in pairwise(engine_ids) if before == a]
            for b in followers:
                table[a, b] += 0.9 / len(followers)
        return torch.stack([(table[i] / table[i].sum()).log() for i in ids])

    engine_ids, row = list(ids), engine.row

    @contextmanager
    def poisoned(bad: int) -> Iterator[None]:
        def failing(before: int) -> torch.Tensor:
            if before == bad:
                raise RuntimeError("out of memory")
            return row(before)

        monkeypatch.setattr(engine, "row", failing)
        yield
        monkeypatch.setattr(engine, "row", row)

    def held() -> int:
        return sum(type(one) is space["Notes"] and not one.closed for one in gc.get_objects())

    return Subject(engine, truth, ids, poisoned, lambda sequence: None, held)


def test_notes_are_known_by_heart(make_member):
    """Token by token beside a model, whatever the model is."""
    general = make_member("llama", 0)
    ids = [5, 9, 300, 17, 42, 5, 9]
    engine = definitions("docs/extending/engine.md")["Bigrams"](ids, general.vocabulary_size)
    notes = Member(tokenizer=general.tokenizer, encoder=general.encoder, engine=engine, name="notes")
    pack = TextPack([general, notes], weighting={general.name: 0.1, "notes": 0.9}, max_tokens=3)
    text = general.tokenizer.decode([9])
    assert general.encoder.plain(text) == [9]
    assert [token.id for token in pack.generate(text, logprobs=True).logprobs] == [300, 17, 42]
