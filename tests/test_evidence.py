"""The evidence's own path, plain transformers models in padded batches, against the library's."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import naive
import numpy as np
import pytest

from packllm import DataError, Member, Pack
from packllm.chat.messages import with_context
from packllm.weights import Adaptive, calibrate, em
from packllm_eval.evidence import answers, methods, passages, races, reading, tables

QUESTIONS = ["What is the capital of France?", "Who lived in the house?", "What does the court order?"]
ANSWERS = ["The capital of France is Paris.", "a little girl with her dog", "relief under chapter 7"]
CORPORA = ("fox", "court")


def lines() -> list[dict]:
    found = []
    for corpus in CORPORA:
        for number, (question, gold) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
            use = "calibrate" if number == 2 else "test"
            prompt = [{"role": "user", "content": f"{corpus} says: {question}"}]
            found.append([f"rag-{corpus}-{number}", "rag", corpus, use, prompt, [gold], 0])
            texts = [f" {other}" for other in ANSWERS]
            found.append(
                [f"c-{corpus}-{number}", "choice", corpus, use, f"Question: {question}\nAnswer:", texts, number]
            )
        found.append([f"lm-{corpus}", "lm", corpus, "test", " ".join(QUESTIONS + ANSWERS) * 3, [], 0])
    names = ("id", "set", "corpus", "use", "prompt", "texts", "answer")
    return [dict(zip(names, row, strict=True)) for row in found]


@pytest.fixture
def members(make_member) -> list[Member]:
    """Without sliding windows, whose caches do not go back."""
    return [make_member("llama", 0), make_member("gpt2", 1), make_member("llama", 3)]


@pytest.fixture
def data(tmp_path) -> Path:
    with gzip.open(tmp_path / "texts.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in lines())
    return tmp_path


@pytest.fixture
def done(data, members, monkeypatch) -> Path:
    monkeypatch.setattr(answers, "MAX_TOKENS", 10)
    reading.read(members, data, data / "out", "cpu", None)
    answers.answer(members, data, data / "out", "cpu", None, 4)
    return data


def test_arrays_are_what_a_pass_over_each_text_gives(done, members, monkeypatch):
    names = [member.name for member in members]
    rows = reading.rows_of(done, None)
    for kind, count in (("rag", 6), ("choice", 6), ("lm", 2)):
        found = reading.load(rows, kind, done / "out", names)
        assert len(found) == count
        row, scores = found[1]
        for member, given in zip(members, scores, strict=True):
            encoded = member.encoder.encode(row.prompt)
            ids = encoded.ids + (member.encoder.continuation(row.texts[1 % len(row.texts)]) if row.texts else [])
            expected = naive.token_logprobs(member, ids).numpy()
            assert given.prompt == pytest.approx(expected[[at - 1 for at in encoded.positions]], abs=1e-4)
            if row.texts:
                assert given.texts[1 % len(row.texts)] == pytest.approx(expected[len(encoded.ids) - 1 :], abs=1e-4)
    monkeypatch.setattr(reading, "Alone", None)  # whoever reads again fails
    reading.read(members, done, done / "out", "cpu", None)
    with pytest.raises(DataError, match="other members"):
        reading.read(members[:2], done, done / "out", "cpu", None)


def test_methods_weigh_and_write_as_the_pack_does(done, members):
    pack = Pack(members, max_tokens=10, adapt=False)
    rows = reading.rows_of(done, None)
    test = [row for row in rows if row.set == "rag" and row.use == "test"]
    calibrated = [{"messages": r.prompt, "answer": r.texts[0]} for r in rows if r.set == "rag" and r.use == "calibrate"]
    prior = calibrate(pack, calibrated)
    wanted = {
        "em": {},
        "em + prior (pooled)": {"prior": prior},
        f"member {members[1].name}": {"weighting": {members[1].name: 1.0}},
        "uniform": {"weighting": "uniform"},
        "opt": {"weighting": "opt"},
        "top1": {"weighting": "top1"},
    }
    written: dict[str, dict[str, str]] = {}
    for line in (done / "out" / "answers.jsonl").read_text().splitlines():
        one = json.loads(line)
        written.setdefault(one["method"], {})[one["id"]] = one["text"]
    for label, options in wanted.items():
        found = pack.generate_batch([row.prompt for row in test], **options)
        assert [written[label][row.id] for row in test] == [answer.text for answer in found], label
    assert {*written} == {method.label for method in methods.methods([member.name for member in members])}
    names, pairs = [m.name for m in members], reading.load(rows, "rag", done / "out", [m.name for m in members])
    known = methods.priors([(r, np.stack([one.texts[0] for one in s])) for r, s in pairs if r.use == "calibrate"])
    assert known["pooled"] == pytest.approx([*prior.values()], abs=1e-5)
    chosen = [m for m in methods.methods(names) if m.label in wanted and m.pool == "linear"]
    (row, scores) = pairs[0]
    for method in chosen:
        prompt = np.stack([one.prompt for one in scores])
        weights = methods.weights_of(method, names, row, prompt, known)
        nats = methods.likelihood(weights, np.stack([one.texts[0] for one in scores])).sum()
        (expected,) = pack.score(row.prompt, row.texts, **wanted[method.label])
        assert nats == pytest.approx(expected, abs=1e-3), method.label
    pooled = reading.load_pooled(rows, done / "out")[row.id]
    for name in ("uniform", "opt", "sim"):
        assert pooled[name][1].sum() == pytest.approx(pack.score(row.prompt, row.texts, weighting=name)[0], abs=1e-3)


def test_tables_tell_every_method(done):
    found = tables.told(done, done / "out", None)
    for heading in (
        "RAG answers",
        "Greedy answers",
        "Racing prefill",
        "Language modelling",
        "Members that sleep",
        "Multiple choice",
    ):
        assert heading in found
    assert "| best member in hindsight |" in found
    assert "half-PMI per byte" in found
    assert "nan" not in found


def test_two_vocabularies_are_compared_by_words(data, make_member):
    members = [make_member("llama", 0), make_member("llama", 4, "words")]
    reading.read(members, data, data / "out", "cpu", None)
    families = [member.vocabulary.family for member in members]
    names = [member.name for member in members]
    row, scores = reading.load(reading.rows_of(data, None), "lm", data / "out", names)[0]
    words, spans = methods.together(row, scores, families)
    weights = Pack(members, chat_template=False, min_weight=0).weigh(row.prompt)
    assert weights.unit == "word"
    assert weights.scored == len(spans)
    assert methods.em(words) == pytest.approx(weights.values, abs=1e-4)
    seen, after, size = tables.at_length(row, scores, families, 32)
    assert seen.shape[1] + after.shape[1] <= len(spans)
    assert after.shape[1] > 5
    assert size > 20
    assert "words of" in tables.told(data, data / "out", None)


def planted(tokens: int = 600) -> np.ndarray:
    """Three members: the first is right, the last is far off."""
    rng = np.random.default_rng(0)
    return np.log(
        np.stack([rng.uniform(0.3, 0.9, tokens), rng.uniform(0.2, 0.9, tokens), rng.uniform(0.01, 0.2, tokens)])
    )


def test_racing_reads_less_and_keeps_the_first():
    prompt = planted()
    left, share = races.racing(prompt, 0.05, 128)
    assert left.tolist() == [True, True, False]
    assert share == pytest.approx((600 * 2 + 128) / 1800)
    assert races.racing(prompt, 0.0, 128)[0].all()  # no threshold: no racing
    left, share = races.spread(prompt, 0.05, 128)
    assert left.tolist() == [True, True, False]
    assert share == pytest.approx((600 * 2 + 128 * 3) / 1800)


def test_sleeping_of_nobody_is_adapt_and_of_many_runs_fewer():
    weights = np.array([0.6, 0.37, 0.03])
    answer = planted(100)
    rows = np.stack([weights, weights])
    (everyone, short), run = methods.adapting(rows, [answer, answer[:, :30]])
    state, expected = Adaptive(weights), np.zeros(100)
    for at, given in enumerate(np.exp(answer).T):
        expected[at] = -np.log(state.weights() @ given)
        state.observe(given)
    assert [everyone, short] == pytest.approx([expected.sum(), expected[:30].sum()])
    assert run == 3
    (same, _), run = methods.adapting(rows, [answer, answer], 0.0, 8)
    assert (same, run) == (pytest.approx(everyone), 3)
    (some, _), run = methods.adapting(rows, [answer, answer], 0.05, 8)
    assert 1 < run <= 2.1
    assert some == pytest.approx(everyone, abs=5)
    assert some != pytest.approx(everyone, abs=1e-6)
    assert em(answer) == pytest.approx(methods.em(answer))


def test_passages_one_by_one_and_contrast(data, members):
    """Against weights and prompts by hand."""
    row = next(line for line in lines() if line["set"] == "rag")
    shown = ["The fox says Paris.", "A court says relief."]
    row["prompt"] = [{"role": "user", "content": with_context("What does it say?", shown)}]
    row["texts"] = ["The fox says Paris."]
    with gzip.open(data / "texts.jsonl.gz", "wt") as file:
        file.write(json.dumps(row) + "\n")
    assert passages.apart(row["prompt"][0]["content"]) == ("What does it say?", shown)
    reading.read(members, data, data / "out", "cpu", None, ("rag",))
    passages.read(members, data, data / "out", "cpu", None, 1)
    with np.load(data / "out" / f"passages-{row['id']}.npz") as file:
        arrays = dict(file)
    assert arrays["right"].tolist() == [True, False]
    pack = Pack(members, adapt=False)

    def scored(content: str) -> float:
        return pack.score([{"role": "user", "content": content}], row["texts"])[0]

    found = passages.ways(arrays)
    each = [scored(with_context("What does it say?", [passage])) for passage in shown]
    assert found["one prompt, em"] == pytest.approx(-scored(row["prompt"][0]["content"]), abs=1e-3)
    assert found["the right passage alone (in hindsight)"] == pytest.approx(-each[0], abs=1e-3)
    answer, mixed = members[0].encoder.continuation(row["texts"][0]), 0.0
    for passage in shown:
        prompt = [{"role": "user", "content": with_context("What does it say?", [passage])}]
        read = members[0].encoder.encode(prompt).ids
        for member, weight in zip(members, pack.weigh(prompt).values, strict=True):
            mixed += weight / 2 * naive.token_logprobs(member, [*read, *answer])[-len(answer) :].exp().numpy()
    assert found["mixture of passages, alike"] == pytest.approx(-np.log(mixed).sum(), abs=1e-3)
    assert found["contrast, a = 1"] != pytest.approx(found["one prompt, em"], abs=1e-3)
    weights, fused = pack.weigh(row["prompt"]).values, {}
    for name, content in (("with", row["prompt"][0]["content"]), ("without", "What does it say?")):
        start = members[0].encoder.encode([{"role": "user", "content": content}]).ids
        parts = [naive.next_logprobs(member, start) for member in members]
        fused[name] = naive.fused(parts, list(weights), "linear").log()
    first = (1.5 * fused["with"] - 0.5 * fused["without"]).log_softmax(-1)[answer[0]]
    at = passages.CONTRASTS.index(0.5)
    assert arrays["contrast"][at][0] == pytest.approx(float(first), abs=1e-3)
    (told,) = passages.tables(data, data / "out", [member.name for member in members], None)
    assert "mixture of passages, by the question, τ = 1 + adapt" in told
