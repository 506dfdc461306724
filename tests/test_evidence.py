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
from packllm_eval.evidence import answers, methods, passages, prompts, races, reading, tables

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


SHOWN = ["The fox says Paris, the capital.", "A court says relief.", "A dog sleeps."]


@pytest.fixture
def asked(data) -> Path:
    """Two questions of one corpus, each with a right passage."""
    questions = [
        ("What does it say?", "The fox says Paris", SHOWN),
        ("And the court?", "A court says relief", SHOWN[::-1]),
    ]
    with gzip.open(data / "texts.jsonl.gz", "wt") as file:
        for at, (question, gold, shown) in enumerate(questions):
            prompt = [{"role": "user", "content": with_context(question, shown)}]
            row = {"id": f"rag-fox-{at}", "set": "rag", "corpus": "fox", "use": "test", "prompt": prompt}
            file.write(json.dumps({**row, "texts": [gold]}) + "\n")
    return data


def slowly(members, ids, weights: np.ndarray, contrast: float | None = None, ends=frozenset()) -> list[int]:
    """A greedy answer of up to 6 tokens after prompts `ids` under weights (P, K): whole passes, token by token."""
    state, answer = Adaptive(weights.reshape(-1)), []
    while len(answer) < 6:
        each = [[naive.next_logprobs(m, [*one, *answer]).double().exp().numpy() for m in members] for one in ids]
        p = np.array(each)  # (P, K, V)
        fused = (state.weights().reshape(weights.shape)[..., None] * p).sum(1)
        token = int((fused.sum(0) if contrast is None else fused[0] ** (1 + contrast) / fused[1] ** contrast).argmax())
        if token in ends:
            break
        answer.append(token)
        state.observe(p[: len(weights), :, token].reshape(-1))
    return answer


def test_passages_one_by_one_and_contrast(asked, members, monkeypatch):
    """Against weights and prompts by hand."""
    monkeypatch.setattr(passages, "MAX_TOKENS", 6)
    out, encoder = asked / "out", members[0].encoder
    row, _ = passages.questions(asked, None, None)
    question, shown = passages.apart(row.prompt[0]["content"])
    assert (question, shown) == ("What does it say?", SHOWN)
    passages.read(members, asked, out, "cpu", None, None, 2)
    with np.load(out / f"passages-{row.id}.npz") as file:
        arrays = dict(file)
    assert arrays["right"].tolist() == [True, False, False]
    pack = Pack(members, adapt=False)

    def asking(*shown: str) -> list[dict]:
        return [{"role": "user", "content": with_context(question, shown)}]

    def scored(prompt: list[dict], **options) -> float:
        return -pack.score(prompt, row.texts, **options)[0]

    found, best = passages.ways(arrays), SHOWN[int(passages.relevances(arrays).argmax())]
    for label, prompt in (("one prompt, em", row.prompt), ("the likeliest passage alone", asking(best))):
        assert found[label] == pytest.approx(scored(prompt), abs=1e-3)
    assert found["the right passage alone (in hindsight)"] == pytest.approx(scored(asking(SHOWN[0])), abs=1e-3)
    answer, mixed = encoder.continuation(row.texts[0]), 0.0
    singles, none = [encoder.encode(asking(passage)).ids for passage in SHOWN], encoder.encode(asking()).ids
    own = np.array([pack.weigh(asking(passage)).values for passage in SHOWN])
    for ids, weights in zip(singles, own, strict=True):
        for member, weight in zip(members, weights, strict=True):
            mixed += weight / 3 * naive.token_logprobs(member, [*ids, *answer])[-len(answer) :].exp().numpy()
    assert found["mixture of passages, alike"] == pytest.approx(-np.log(mixed).sum(), abs=1e-3)
    assert found["contrast, a = 1"] != pytest.approx(found["one prompt, em"], abs=1e-3)
    whole, long = np.array(pack.weigh(row.prompt).values), encoder.encode(row.prompt).ids
    with_, without = (
        naive.fused([naive.next_logprobs(member, ids) for member in members], [*whole], "linear").log()
        for ids in (long, none)
    )
    first = (1.5 * with_ - 0.5 * without).log_softmax(-1)[answer[0]]
    assert arrays["contrast"][passages.CONTRASTS.index(0.5)][0] == pytest.approx(float(first), abs=1e-3)
    assert -arrays["chosen_contrast"][0].sum() == pytest.approx(found["the likeliest passage alone + adapt"], abs=1e-3)
    share = np.exp(passages.relevances(arrays))[:, None]
    at = SHOWN.index(best)
    expected = {
        "one prompt, em + adapt": slowly(members, [long], whole[None]),
        "the likeliest passage alone + adapt": slowly(members, [singles[at]], own[at][None]),
        "mixture of passages, by the question, τ = 1 + adapt": slowly(members, singles, share / share.sum() * own),
        "contrast, a = 0.25 + adapt": slowly(members, [long, none], whole[None], 0.25),
    }
    written = [json.loads(line) for line in (out / "passages.jsonl").read_text().splitlines()]
    texts = {one["method"]: one["text"] for one in written if one["id"] == row.id}
    assert texts == {label: members[0].tokenizer.decode(ids) for label, ids in expected.items()}
    monkeypatch.setattr(passages, "Alone", None)  # whoever reads again fails
    passages.read(members, asked, out, "cpu", None, None, 2)
    (likelihoods, answers_) = passages.tables(asked, out, None)
    assert "of 2 questions" in likelihoods
    assert "on 2 questions that" in answers_
    assert "nan" not in likelihoods + answers_


def test_questions_that_need_two_passages(asked, members, monkeypatch):
    monkeypatch.setattr(passages, "MAX_TOKENS", 3)
    (row,) = passages.questions(asked, None, None, "joined")
    question, shown = passages.apart(row.prompt[0]["content"])
    assert question == "What does it say? Also: And the court?"
    assert sorted(shown) == sorted(SHOWN)
    assert row.texts == ["The fox says Paris A court says relief", "The fox says Paris", "A court says relief"]
    passages.read(members, asked, asked / "out", "cpu", None, None, 2, "joined")
    with np.load(asked / "out" / f"passages-{row.id}.npz") as file:
        arrays = dict(file)
    assert [shown[at] for at in np.flatnonzero(~arrays["right"])] == [SHOWN[2]]
    two = [shown[at] for at in sorted(np.argsort(passages.relevances(arrays))[1:])]
    prompt = [{"role": "user", "content": with_context(question, two)}]
    (expected,) = Pack(members, adapt=False).score(prompt, row.texts[:1])
    assert passages.ways(arrays)[passages.TWO] == pytest.approx(-expected, abs=1e-3)
    _, answers_ = passages.tables(asked, asked / "out", None)
    assert "mixture of passages, alike + adapt" in answers_


def test_answers_of_a_batch_end_one_by_one(members):
    """Each as if it were written alone, whatever ends before it."""
    models = [reading.Alone(member, "cpu") for member in members]
    encoder = members[0].encoder
    encoded = [encoder.encode(text) for text in (*QUESTIONS, *ANSWERS)]
    reads = [prompts.read(models, one, encoder.continuation("gold"))[0] for one in encoded]
    weights = np.random.default_rng(0).dirichlet(np.ones(6), 3).reshape(3, 2, 3)
    pairs = [[reads[0], reads[5]], [reads[1], reads[4]], [reads[3], reads[2]]]
    ids = [[one.encoded.ids for one in pair] for pair in pairs]
    whole = [slowly(members, *one) for one in zip(ids, weights, strict=True)]
    assert prompts.greedy(models, pairs, weights, 6) == whole
    ends = frozenset([whole[1][2]])
    members[0].end_ids = ends
    expected = [slowly(members, *one, None, ends) for one in zip(ids, weights, strict=True)]
    assert len(expected[1]) < 3
    assert len({len(one) for one in expected}) > 1
    assert prompts.greedy(models, pairs, weights, 6) == expected
