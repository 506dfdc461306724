"""A calibrated prior: em with it, what finds it, its file, and who takes it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from engines.bytes import ByteEncoder, ByteEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from test_any_engine import COURT, STORY, of_bytes
from typer.testing import CliRunner

from packllm import ContextOverflowError, DataError, Member, MemberError, OptionError, Pack, WeightsError
from packllm.cli import app
from packllm.weights import calibrate, em, solve

TALES = [
    "a little girl who lived in a small house",
    "once upon a time",
    "she had a dog",
    "near the forest",
    "the house",
]
ORDERS = ["the debtor objects within 30 days", "order relief under chapter 7", "of the notice", "unless the debtor"]


def row(at: int, answer: str, **more) -> dict:
    return {"question": f"what is said at {at}?", "context": f"{at}: the court shall", "answer": answer, **more}


def rows(count: int, tales: int) -> list[dict]:
    """Of each ten, so many are answered in the words of the story, the others in the court's."""
    return [row(at, TALES[at % 5] if at % 10 < tales else ORDERS[at % 4]) for at in range(count)]


@pytest.fixture
def pack() -> Pack:
    return Pack([of_bytes(STORY, "story"), of_bytes(COURT, "court")], min_weight=0)


@pytest.fixture
def mixed(make_member) -> Pack:
    """Members of several vocabularies."""
    return Pack([of_bytes(STORY, "story"), of_bytes(COURT, "court"), make_member("llama", 0)], min_weight=0)


@given(st.integers(0, 9999), st.integers(1, 4), st.integers(0, 30), st.sampled_from([0.3, 1.0, 7.0]))
@settings(max_examples=40, derandomize=True, deadline=None)
def test_a_uniform_prior_of_alpha_tokens_is_em(seed, members, tokens, alpha):
    logprobs = np.log(np.random.default_rng(seed).uniform(0.01, 1, (members, tokens)))
    uniform = [1 / members] * members
    expected = em(logprobs, alpha=alpha)
    assert em(logprobs, prior=uniform, strength=alpha) == pytest.approx(expected)
    assert em(logprobs, prior=uniform, alpha=alpha) == pytest.approx(expected)


@given(st.integers(0, 9999), st.floats(0, 1), st.sampled_from([0.5, 20.0, "prompt"]))
@settings(max_examples=40, derandomize=True, deadline=None)
def test_em_maximises_its_objective(seed, share, strength):
    logprobs = np.log(np.random.default_rng(seed).uniform(0.01, 1, (2, 20)))
    prior, s = np.array([share, 1 - share]), 20 if strength == "prompt" else strength

    def objective(first: float) -> float:
        lam = np.array([first, 1 - first])
        return np.log(lam @ np.exp(logprobs)).sum() + s * (prior[prior > 0] @ np.log(lam[prior > 0]))

    found = em(logprobs, prior=prior, strength=strength)
    assert sum(found) == pytest.approx(1)
    assert objective(max(found[0], 1e-12)) >= max(map(objective, np.linspace(1e-6, 1 - 1e-6, 999))) - 1e-6


@pytest.mark.parametrize("prior", [[0.5, 0.4], [1.5, -0.5], [1.0], [math.nan, 1.0]])
def test_em_refuses_what_is_no_prior(prior):
    with pytest.raises(WeightsError, match="prior"):
        em(np.log([[0.5], [0.2]]), prior=prior)


def test_a_planted_mixture_is_found(pack):
    prior = calibrate(pack, rows(40, 7))
    characters = sum(len(r["answer"]) for r in rows(40, 7))
    share = sum(len(r["answer"]) for r in rows(40, 7) if r["answer"] in TALES) / characters
    assert prior["story"] == pytest.approx(share, abs=0.1)
    assert prior["story"] + prior["court"] == pytest.approx(1)
    assert prior.worth.units == characters
    assert prior.worth.unit == "token"


def test_one_pass_a_row_and_no_more_tokens_than_reading_takes(pack):
    found = rows(30, 7)
    engines = [member.engine for member in pack.members]
    for r in found:
        pack.weigh([{"role": "user", "content": f"Use the context. {r['context']} {r['question']}"}], prefix_cache_mb=0)
    before = [(engine.forwards, engine.tokens) for engine in engines]
    prior = calibrate(pack, found)
    after = [(engine.forwards - f, engine.tokens - t) for engine, (f, t) in zip(engines, before, strict=True)]
    assert [passes for passes, _ in after] == [30, 30]
    assert sum(tokens for _, tokens in after) == prior.worth.tokens
    texts = [
        f"user: Use the context to answer the question.\n\nContext:\n{r['context']}\n\nQuestion: {r['question']}\n"
        f"assistant:{r['answer']}"
        for r in found
    ]
    assert prior.worth.tokens <= 1.1 * 2 * sum(map(len, texts))


def test_words_across_vocabularies(mixed):
    prior = calibrate(mixed, rows(20, 10))
    assert prior.worth.unit == "word"
    assert max(prior, key=prior.__getitem__) == "story"
    assert sum(prior.values()) == pytest.approx(1)
    assert mixed.weigh("the court shall order", prior=prior).values[0] > mixed.weigh("the court shall order").values[0]


def test_passages_and_messages_say_the_same_as_a_context(pack):
    one = {"question": "who?", "context": "a dog", "answer": "she had a dog"}
    text = "Use the context to answer the question.\n\nContext:\na dog\n\nQuestion: who?"
    same = [
        {"question": "who?", "passages": ["a dog"], "answer": "she had a dog"},
        {"messages": [{"role": "user", "content": text}], "answer": "she had a dog"},
    ]
    expected = calibrate(pack, [one])
    for other in same:
        assert calibrate(pack, [other]) == expected
    assert calibrate(pack, [one, *same]).worth.rows == 1  # all alike


def test_a_prior_moves_the_weights_as_strongly_as_asked(pack):
    prompt = "the court shall order relief under chapter 7"
    plain = pack.weigh(prompt).values
    moved = [
        pack.weigh(prompt, prior={"story": 0.9, "court": 0.1}, prior_strength=s).values[0] for s in (0, 1, 10, 1e6)
    ]
    assert plain[0] < 0.2
    assert moved == sorted(moved)
    assert moved[-1] == pytest.approx(0.9, abs=1e-3)
    logprobs = [[-1.0, -2.0, -0.5], [-2.0, -1.0, -3.0]]
    logits = np.zeros((2, 3, 2))
    logits[..., 0] = np.log(np.exp(logprobs) / (1 - np.exp(logprobs)))
    import torch

    found = solve("em", torch.tensor(logits), torch.zeros(3, dtype=torch.long), prior={"0": 0.3, "1": 0.7})
    assert found.values == pytest.approx(em(np.array(logprobs), prior=[0.3, 0.7], strength=3))


def test_where_nothing_is_scored_the_prior_counts(pack):
    found = pack.weigh("a", chat_template=False, prior={"story": 0.8, "court": 0.2})
    assert found.scored == 0
    assert found.values == pytest.approx((0.8, 0.2))
    assert "only the prior counts" in found.note
    assert "all members have the same weight" in pack.weigh("a", chat_template=False).note


def test_a_member_that_fails_leaves_its_part_of_the_prior(pack):
    pack.members[0].engine.poison = ord("q")
    found = pack.weigh("queen of the court", on_member_error="drop", prior={"story": 1.0})
    assert found.values == (0.0, 1.0)


def test_the_file_names_members_by_content(pack, tmp_path):
    path = tmp_path / "prior.json"
    prior = calibrate(pack, rows(12, 7))
    prior.save(path)
    saved = json.loads(path.read_text())
    assert [one["name"] for one in saved["members"]] == ["story", "court"]
    prompt = "the court shall order relief"
    expected = pack.weigh(prompt, prior=prior).values
    assert expected != pack.weigh(prompt).values
    for given_ in (path, str(path), dict(prior), json.dumps(prior)):
        assert pack.weigh(prompt, prior=given_).values == pytest.approx(expected)
    story, court = pack.members
    other = Pack([Member(name="b", encoder=court.encoder, engine=court.engine),
                  Member(name="a", encoder=story.encoder, engine=story.engine)], min_weight=0, prior=path)  # fmt: skip
    assert other.weigh(prompt).values == pytest.approx(expected[::-1])
    for members in ([story], [story, of_bytes(COURT, "court")], [*pack.members, of_bytes(COURT, "third")]):
        for given_ in (path, prior):
            with pytest.raises(WeightsError, match=r"another pack.*packllm calibrate"):
                Pack(members).weigh(prompt, prior=given_)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": "x", "members": []}', None])
def test_a_file_that_is_no_prior_is_refused(pack, tmp_path, content):
    path = tmp_path / "prior.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(WeightsError, match=r"prior=.*no file of packllm calibrate"):
        pack.weigh("the court", prior=path)


@pytest.mark.parametrize(
    ("prior", "told"),
    [
        ({"story": 0.5, "judge": 0.5}, "unknown member 'judge'"),
        ({"story": 1.5, "court": -0.5}, "at least 0"),
        ({"story": 0.5, "court": 0.4}, "must sum to 1"),
        ({}, "must sum to 1"),
    ],
)
def test_a_prior_that_is_none_is_refused(pack, prior, told):
    with pytest.raises(WeightsError, match=told):
        pack.check(prior=prior)
    with pytest.raises(WeightsError, match=told):
        Pack(pack.members, prior=prior)


@pytest.mark.parametrize(
    "options", [{"prior": {"story": math.nan}}, {"prior": 3}, {"prior_strength": -1}, {"prior_strength": "much"}]
)
def test_options_out_of_range_are_named(pack, options):
    with pytest.raises(OptionError, match=next(iter(options))):
        pack.check(**options)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"question": "who?"}, "row 2 has no answer"),
        ({"question": "who?", "answer": " \n"}, "row 2 has no answer"),
        ({"question": "who?", "answer": 3}, "row 2 has no answer"),
        ({"answer": "a dog"}, "row 2 has no question"),
        ({"messages": [], "answer": "a dog"}, "row 2"),
        ({"messages": [{"role": "wizard", "content": "?"}], "answer": "a dog"}, "row 2.*wizard"),
        ({"question": "who?", "passages": [1], "answer": "a dog"}, "row 2.*passages"),
        ("who?", "row 2"),
    ],
)
def test_rows_that_are_none_are_named(pack, bad, told):
    with pytest.raises(DataError, match=told):
        calibrate(pack, [row(1, "a dog"), bad])
    assert all(member.engine.forwards == 0 for member in pack.members)


def test_what_cannot_be_read(pack, monkeypatch):
    with pytest.raises(DataError, match="there is none"):
        calibrate(pack, [])
    monkeypatch.setattr(ByteEncoder, "continuation", lambda self, text: [])
    with pytest.raises(DataError, match="no tokens for member 'story'"):
        calibrate(pack, rows(2, 1))
    monkeypatch.undo()
    pack.members[1].engine.poison = ord("w")
    with pytest.raises(MemberError, match="court"):
        calibrate(pack, rows(2, 1))
    small = Member(name="small", encoder=ByteEncoder(), engine=ByteEngine(STORY, window=100))
    with pytest.raises(ContextOverflowError, match="small"):
        calibrate(Pack([small, pack.members[0]]), rows(2, 1))


def test_it_says_whether_it_helps(pack):
    found = [{**r, "context": "order relief under chapter 7 unless the debtor objects"} for r in rows(30, 10)]
    helps = calibrate(pack, found).worth
    assert helps.passages[1] > helps.passages[0]  # the court's words are in all passages, the story's in all answers
    assert helps.answers[0] > 0.9
    assert helps.gain[2] < 0
    assert helps.calibrated < helps.plain
    assert "The prior helps" in helps.verdict
    told = helps.summary(("story", "court"))
    for number in (*helps.passages, *helps.answers):
        assert f"{number:.3f}" in told
    assert "30 rows" in told
    assert "Too few different rows (3)" in calibrate(pack, rows(3, 10)).worth.verdict
    one = calibrate(pack, [row(1, "a dog")] * 20).worth
    assert (one.rows, one.gain) == (1, None)
    assert "Too few different rows (1)" in one.verdict
    twins = Pack([of_bytes(COURT, "one"), of_bytes(COURT, "two")])
    assert "No gain" in calibrate(twins, rows(12, 5)).worth.verdict


def test_the_command_line(make_member, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    folders = []
    for architecture, seed in (("llama", 0), ("gpt2", 1)):
        member = make_member(architecture, seed)
        member.model.save_pretrained(tmp_path / architecture)
        member.tokenizer.save_pretrained(tmp_path / architecture)
        folders += ["-m", str(tmp_path / architecture)]
    data, out = tmp_path / "qa.jsonl", tmp_path / "prior.json"
    found = rows(11, 5)
    data.write_text("\n".join(map(json.dumps, found)) + "\n")

    def run(*words: str):
        return CliRunner().invoke(app, [words[0], *folders, *map(str, words[1:])])

    result = run("calibrate", data, "--out", out)
    assert result.exit_code == 0, result.output
    assert "on passages  on answers" in result.stdout
    assert "11 rows" in result.stdout
    pack = Pack.load(folders[1::2])
    expected = calibrate(pack, found)
    assert json.loads(out.read_text()) == json.loads(json.dumps(expected.as_dict()))
    weighed = json.loads(run("weigh", "the court", "--prior", out, "--json").stdout)
    assert weighed["weights"] == pytest.approx(pack.weigh("the court", prior=expected).values)
    assert run("ask", "who?", "--prior", out, "--max-tokens", "2").exit_code == 0
    assert run("ask", "who?", "-o", f"prior={out}", "--max-tokens", "2").exit_code == 0
    data.write_text('{"question": "who?", "answer": "x"}\nno\n')
    bad = run("calibrate", data, "--out", out)
    assert bad.exit_code == 2
    assert "line 2 is no JSON" in bad.output.replace("\n", " ")
    assert run("calibrate", Path("absent.jsonl"), "--out", out).exit_code == 2


def test_the_adapters_take_it(pack, tmp_path):
    langchain = pytest.importorskip("langchain_packllm", reason="needs langchain-core")
    index = pytest.importorskip("llama_index.llms.packllm", reason="needs llama-index-core")
    prior = calibrate(pack, rows(12, 10))
    prior.save(tmp_path / "prior.json")
    expected = pack.weigh([{"role": "user", "content": "the court"}], prior=prior).values
    for given_ in (str(tmp_path / "prior.json"), dict(prior), prior):
        model = langchain.ChatPackLLM(pack=pack, prior=given_, max_tokens=2, adapt=False)
        assert model.invoke("the court").response_metadata["packllm"]["weights"] == pytest.approx(expected)
        llm = index.PackLLM(pack=pack, prior=given_, max_tokens=2, adapt=False)
        assert llm.complete("the court").raw["packllm"]["weights"] == pytest.approx(expected)
