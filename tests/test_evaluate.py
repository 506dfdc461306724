"""Protocols, cached scores, records that go on after a kill."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from packllm import OptionError, Pack
from packllm.errors import DataError, MemberError, WeightsError
from packllm.weights import cbtm
from packllm_eval import choice, generate, lm, records, report, rows, tables
from packllm_eval.methods import DEFAULT, Method, ready
from packllm_eval.reading import Reading, cut_after, encode_pieces
from packllm_eval.rows import Document, Question

TEXT = (
    "The court shall order relief under chapter 7 unless the debtor objects within 30 days of the notice. "
    "A query planner chooses an index scan or a sequential scan from statistics of the table. Ça coûte 5 €, dit-elle. "
    "Diabetes is a disease in which the blood glucose level is too high, and insulin helps."
)
QUESTION = Question("q", "quiz", "What is the capital of France?", ("Paris", "the dog", "an index scan"), 0)


@pytest.fixture
def mixed_pack(make_member) -> Pack:
    """Two members of one vocabulary and one of another."""
    return Pack([make_member("llama", 0), make_member("gpt2", 1), make_member("gemma", 3, "words")])


def documents(count: int) -> list[Document]:
    return [Document(f"d{i}", "one" if i % 2 else "two", TEXT[7 * i :]) for i in range(count)]


def without_seconds(found):
    if isinstance(found, dict):
        return {k: without_seconds(v) for k, v in found.items() if k != "seconds"}
    return [without_seconds(v) for v in found] if isinstance(found, list) else found


# Scores: each member runs once


def test_cached_scores_equal_fresh_ones(pack):
    """Every method's NLL is what Pack.score gives for the same prompt and continuation, run anew."""
    cut = TEXT.index(" unless")
    with Reading(pack.members, [TEXT[:cut], TEXT[cut:]]) as reading:
        methods = ready(
            pack, [*DEFAULT, "em:pool=log", "exact:pool=linear", "uniform:pool=linear", "em:min_weight=0.4"]
        )
        weighed = [(m.members, reading.weights(m.options, m.members)) for m in methods]
        cached = reading.nll(weighed, 1, 2)
    for method, (_, weights), nll in zip(methods, weighed, cached, strict=True):
        fresh = method.options.model_dump(exclude_unset=True)
        assert pack.weigh(TEXT[:cut], **fresh).values == pytest.approx(weights.values, abs=1e-6)
        assert -pack.score(TEXT[:cut], [TEXT[cut:]], **fresh)[0] == pytest.approx(nll, rel=1e-4), method.label


def test_options_score_as_the_pack_does(pack):
    prompt, options = "Question: Who?\nAnswer:", [" the dog", " a", " an index scan of the table"]
    methods = ready(pack, ["em", "uniform", "opt", "top1"])
    with Reading(pack.members, [prompt]) as reading:
        weighed = [(m.members, reading.weights(m.options, m.members)) for m in methods]
        found = reading.options(options, weighed)
    for method, scores in zip(methods, found, strict=True):
        assert scores == pytest.approx(pack.score(prompt, options, weighting=method.options.weighting), rel=1e-4)


def test_a_member_alone_scores_as_alone(pack, make_member):
    with Reading(pack.members, [TEXT[:60], TEXT[60:]]) as reading:
        cached = reading.nll([((k,), lm.alone(pack, k)) for k in range(3)], 1, 2)
    for member, nll in zip(pack.members, cached, strict=True):
        assert -Pack([member]).score(TEXT[:60], [TEXT[60:]])[0] == pytest.approx(nll, rel=1e-4)


def test_each_member_runs_once_a_document(pack, tmp_path):
    before = [member.engine.tokens for member in pack.members]
    lm.evaluate(pack, documents(1), tmp_path / "r.jsonl", methods=["em", "uniform", "sim", "opt", "exact", "map"])
    tokens = len(pack.members[0].encoder.encode(TEXT).ids)
    assert [m.engine.tokens - b for m, b in zip(pack.members, before, strict=True)] == [tokens] * 3


def test_words_fuse_members_of_different_vocabularies(mixed_pack):
    """The mixture of words by hand: products of token probabilities between common boundaries."""
    text = " the dog"
    with Reading(mixed_pack.members, ["The quick brown", text]) as reading:
        weights = reading.weights(mixed_pack.check(), range(3))
        fused = reading.nll([((0, 1, 2), weights)], 1, 2)[0]
        members = [reading.nll([((k,), lm.alone(mixed_pack, k))], 1, 2)[0] for k in range(3)]
        one_word = reading.options(
            [" dog"], [((0, 1, 2), weights), *[((k,), lm.alone(mixed_pack, k)) for k in range(3)]]
        )
    expected = -math.log(sum(v * math.exp(s[0]) for v, s in zip(weights.values, one_word[1:], strict=True)))
    assert -one_word[0][0] == pytest.approx(expected)
    # Every word of a mixture is at most 1/λ less likely than under any member.
    bounds = [nll - len(text) * math.log(v) for nll, v in zip(members, weights.values, strict=True)]
    assert 0 < fused <= min(bounds)
    assert weights.unit == "word"


def test_weights_do_not_see_what_follows(pack, mixed_pack):
    """Changing the continuation changes no weight (leave no leak): they are Pack.weigh's on the prompt alone, up to
    the rounding of matrix products of another size."""
    prompt = "The court shall order relief under"
    for chosen in (pack, mixed_pack):
        methods = ready(chosen, None)
        alone = [chosen.weigh(prompt, **m.options.model_dump(exclude_unset=True)).values for m in methods]
        for rest in (" 30 days.", "objects", "\n\nfor i in range(10)", " ça, dit-elle"):
            with Reading(chosen.members, [prompt, rest]) as reading:
                weighed = [reading.weights(m.options, m.members).values for m in methods]
            for values, expected in zip(weighed, alone, strict=True):
                assert values == pytest.approx(expected, abs=1e-4)


def test_choices_do_not_move_weights(pack, tmp_path):
    changed = Question("p", "quiz", QUESTION.question, ("for i in range(10):", "insulin", "30 days"), 1)
    for template in choice.TEMPLATES:
        found = choice.evaluate(pack, [QUESTION, changed], tmp_path / f"{template}.jsonl", template=template)
        for label, method in found[0]["methods"].items():
            assert found[1]["methods"][label]["weights"] == pytest.approx(method["weights"], abs=1e-4)
            assert found[1]["methods"][label]["nats"] != method["nats"]
    assert [len(choice.pieces(QUESTION, t, [])) for t in choice.TEMPLATES.values()] == [2, 1, 1]


def test_pieces_are_tokenised_by_themselves(make_member):
    for tokenizer in ("bytes", "words"):
        encoder = make_member("llama", 0, tokenizer).encoder
        encoded, counts = encode_pieces(encoder, ["The court", " shall ça", " 5 €."])
        alone = [encoder.encode("The court").ids, encoder.continuation(" shall ça"), encoder.continuation(" 5 €.")]
        assert encoded.ids == [i for ids in alone for i in ids]
        assert counts[-1] == len(encoded.positions)
        assert encoded.ends[-1] == len("The court shall ça 5 €.")
        assert encoded.starts == sorted(encoded.starts)


def test_cuts_fall_between_words(make_member):
    encoder = make_member("llama").encoder
    for tokens in range(1, 60):
        at = cut_after(encoder, TEXT, tokens)
        assert TEXT[at].isspace()
        assert len(encoder.encode(TEXT[:at]).positions) >= min(tokens, 59) - 1
    assert cut_after(encoder, "日本語" * 40, 3) > 0


# Protocols


def test_prompt_lengths():
    assert [lm.PromptLength.parse("32|20%").of(n) for n in (1000, 100, 3)] == [32, 20, 1]
    assert lm.PromptLength.parse("64").of(1000) == 64
    assert lm.PromptLength.parse("5%").of(1000) == 50
    for bad in ("", "x", "0", "0%", "120%", "|20%"):
        with pytest.raises(OptionError, match="prompt="):
            lm.PromptLength.parse(bad)


def test_lm_by_hand(make_member, tmp_path):
    """Two members, fixed weights: bits per byte from log-probabilities computed without any cache."""
    pack = Pack([make_member("llama", 0), make_member("llama", 1)])
    method = Method("half", {"weighting": {"llama-0": 0.5, "llama-1": 0.5}})
    (record,) = lm.evaluate(pack, documents(1), tmp_path / "r.jsonl", methods=[method], prompts=("10",))
    cut = cut_after(pack.members[0].encoder, TEXT, 10)
    prompt, rest = pack.members[0].encoder.plain(TEXT[:cut]), pack.members[0].encoder.plain(TEXT[cut:])
    ids = torch.tensor([prompt + rest])
    given = []
    for member in pack.members:
        with torch.inference_mode():
            logprobs = member.model(ids).logits[0, :, : member.vocabulary_size].double().log_softmax(-1)
        given.append(logprobs[len(prompt) - 1 : -1].gather(-1, ids[0, len(prompt) :, None])[:, 0])
    expected = -float((torch.stack(given).exp().mean(0)).log().sum())
    assert record["prompts"]["10"]["methods"]["half"]["nats"] == pytest.approx(expected, rel=1e-5)
    assert record["members"]["llama-0"] == pytest.approx(-float(given[0].sum()), rel=1e-5)
    assert (record["bytes"], record["tokens"]) == (len(TEXT[cut:].encode()), len(rest))
    found = {e.method: e for e in tables.lm_table([record])}
    assert found["largest member"].score == found["member llama-0"].score  # both are as large: the first
    entry = found["half"]
    assert entry.score.value == pytest.approx(expected / math.log(2) / record["bytes"])
    assert entry.more == pytest.approx(math.exp(expected / len(rest)))


def test_mined_fuses_in_the_best_member_s_tokens(mixed_pack, tmp_path, monkeypatch):
    """Optimised weights and NLL across vocabularies equal those of the translated pack itself."""
    monkeypatch.setenv("PACKLLM_CACHE", str(tmp_path))
    (record,) = lm.evaluate(
        mixed_pack, documents(1), tmp_path / "r.jsonl", methods=["opt:decoding=mined", "em"], prompts=("10",)
    )
    cut = cut_after(mixed_pack.members[0].encoder, TEXT, 10)
    fresh = -mixed_pack.score(TEXT[:cut], [TEXT[cut:]], weighting="opt", decoding="mined")[0]
    found = record["prompts"]["10"]["methods"]["opt:decoding=mined"]
    assert found["nats"] == pytest.approx(fresh, rel=1e-4)
    expected = mixed_pack.weigh(TEXT[:cut], weighting="opt", decoding="mined").values
    assert list(found["weights"].values()) == pytest.approx(expected, abs=1e-4)


def test_several_prompt_lengths_score_the_same_text(pack, tmp_path):
    (record,) = lm.evaluate(pack, documents(1), tmp_path / "r.jsonl", methods=["uniform", "em"], prompts=("4", "20"))
    uniform = [record["prompts"][p]["methods"]["uniform"]["nats"] for p in ("4", "20")]
    em = [record["prompts"][p]["methods"]["em"]["nats"] for p in ("4", "20")]
    assert uniform[0] == pytest.approx(uniform[1])
    assert em[0] != em[1]


def test_short_documents_are_left_out_with_the_reason(pack, tmp_path):
    found = lm.evaluate(pack, [*documents(1), Document("s", "one", "Hi")], tmp_path / "r.jsonl", methods=["em"])
    assert "nothing after its prompt" in found[1]["left_out"]
    assert "1 of 2 rows left out" in report.left_out(found)
    with pytest.raises(DataError, match="no document could be scored"):
        lm.evaluate(pack, [Document("s", "one", "Hi")], tmp_path / "s.jsonl", methods=["em"])


def test_methods_are_checked_before_anything_runs(pack, mixed_pack, tmp_path):
    for spec, message in {
        "emm": "weighting='emm' is unknown",
        "em@nobody": "names member 'nobody'",
        "em:tau": "has no '='",
        "em:taw=1": "did you mean 'tau'",
        "": "is not WEIGHTING",
    }.items():
        with pytest.raises(OptionError, match=message):
            lm.evaluate(pack, documents(1), tmp_path / "r.jsonl", methods=[spec])
    with pytest.raises(OptionError, match="two methods are called 'em'"):
        ready(pack, ["em", "em"])
    with pytest.raises(OptionError, match="'opt' needs members of one vocabulary, or decoding=mined"):
        ready(mixed_pack, ["opt"])
    assert not list(tmp_path.iterdir())
    assert [m.label for m in ready(mixed_pack, None)] == ["em", "uniform", "top1", "sim", "sim:tau=1"]
    (subset,) = ready(pack, ["sim@qwen-2+llama-0:tau=1"])
    assert (subset.members, subset.options.tau) == ((2, 0), 1.0)


def test_choice_by_hand(pack, tmp_path):
    (record,) = choice.evaluate(pack, [QUESTION], tmp_path / "r.jsonl", methods=["em"], template="plain")
    scores = pack.score("Question: What is the capital of France?\nAnswer:", [f" {c}" for c in QUESTION.choices])
    assert record["methods"]["em"]["nats"] == pytest.approx(scores, rel=1e-4)
    record |= {"bytes": [5, 7, 13], "answer": 1}
    assert [choice.right(record, nats) for nats in ([-9, -8, -10], [-8, -8, -10])] == [True, False]
    assert choice.right(record, [-5.1, -7, -13.1], per_byte=True)
    assert not choice.right(record, [-5.1, -7, -13.1])


def test_worked_examples_are_read_once_a_subject(make_pack, tmp_path):
    shots = {
        subject: [Question(f"{subject}{n}", "quiz", f"{said} " * 9 + f"{n}?", ("yes", "no"), 0) for n in range(2)]
        for subject, said in (("law", "Who may sue"), ("sums", "How many are"))
    }
    asked = [
        Question(f"q{n}", "quiz", f"Is {n} the one?", ("yes", "no"), 0, subject=subject)
        for n, subject in enumerate(("law", "sums", "law", "sums", "law", "sums"))
    ]
    found, read = [], [0]
    for megabytes in (0, 64):
        pack = make_pack(prefix_cache_mb=megabytes)
        path = tmp_path / f"{megabytes}.jsonl"
        records = choice.evaluate(pack, asked, path, methods=["em", "map", "uniform"], shots=shots)
        found.append({record["id"]: record for record in records})
        read.append(sum(member.engine.tokens for member in pack.members) - sum(read))
    assert read[2] < 0.6 * read[1]
    for name, fresh in found[0].items():
        for label, method in fresh["methods"].items():
            reused = found[1][name]["methods"][label]
            assert reused["nats"] == pytest.approx(method["nats"], rel=1e-4)
            assert reused["weights"] == pytest.approx(method["weights"], abs=1e-4)


def test_templates_and_examples():
    shot = Question("s", "quiz", "Why?", ("so", "no"), 1, context="Once.", subject="law", split="dev")
    seen, rest = choice.pieces(QUESTION, choice.TEMPLATES["choices"], [shot])
    assert seen == (
        "Question: Once. Why?\nChoices: A. so B. no\nAnswer: no\n\nQuestion: What is the capital of France?"
    )
    assert rest == "\nChoices: A. Paris B. the dog C. an index scan\nAnswer:"
    with pytest.raises(DataError, match="27 choices are more than the letters"):
        choice.pieces(replace(QUESTION, choices=("a",) * 27), choice.TEMPLATES["choices"], [])
    with pytest.raises(OptionError, match="template='x' is unknown"):
        choice.evaluate(None, [], Path("r"), template="x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answer", "final"),
    [
        ("She has 3 + 4 = 7 eggs.\n#### 7", "7"),
        ("#### 1,200 dollars and 3", "1200"),
        ("15.0", "15"),
        ("$-2.50.", "-2.5"),
        ("1234567", "1234567"),
        ("The  Answer.", "the answer"),
        ("H2O", "h2o"),
        ("1/2", "1/2"),
    ],
)
def test_final_answers(answer, final):
    assert generate.final_answer(answer) == final


@pytest.mark.parametrize(
    ("written", "answer", "same"),
    [
        ("so it is 12, then 15.0", "15", True),
        ("#### 7 of the 9 eggs", "7", True),
        ("It is 1,234,567.", "1234567", True),
        ("1234568", "1234567", False),  # all digits count
        ("10-5", "5", True),  # a minus between numbers is no sign
        ("10 - -5", "-5", True),
        ("many", "5", False),
        ("CO2", "h2o", False),
        ("3/2", "1/2", False),
        ("9 + 2 = 11", "apollo 11", False),
        ("Apollo  11.", "apollo 11", True),
    ],
)
def test_exact_match(written, answer, same):
    assert generate.right(written, answer) == same


def test_generation_tells_examples_of_the_subject(pack, tmp_path):
    shots = {name: [Question(name, "sums", f"{name}?", (), "1", "", name)] for name in ("law", "food")}
    asked = [Question(f"q{name}", "sums", "Why?", (), "4", "", name) for name in ("law", "food")]
    (food, law) = generate.evaluate(pack, asked, tmp_path / "r.jsonl", methods=["top1"], shots=shots, max_tokens=4)
    for record, name in ((law, "law"), (food, "food")):
        prompt = f"Question: {name}?\nAnswer: 1\n\nQuestion: Why?\nAnswer:"
        fresh = pack.generate(prompt, max_tokens=4, stop=("\nQuestion:", "\n\n"), weighting="top1")
        assert record["methods"]["top1"]["text"] == fresh.text


def test_generation_is_the_packs(pack, tmp_path):
    asked = Question("g", "sums", "2 + 2?", (), "4")
    (record,) = generate.evaluate(pack, [asked], tmp_path / "r.jsonl", methods=["em", "top1"], max_tokens=5)
    prompt = "Question: 2 + 2?\nAnswer:"
    asked_as = {"max_tokens": 5, "stop": ("\nQuestion:", "\n\n"), "chat_template": False}
    fresh = pack.generate(prompt, weighting="top1", **asked_as)
    assert record["methods"]["top1"]["text"] == fresh.text
    alone = Pack([pack.members[1]]).generate(prompt, **asked_as)
    assert record["methods"]["member gpt2-1"]["text"] == alone.text
    labels = [entry.method for entry in tables.generate_table([record])]
    assert labels == ["em", "top1", *(f"member {m.name}" for m in pack.members), "best member", "largest member"]


def test_questions_answered_together_are_answered_as_alone(make_pack, tmp_path):
    asked = [Question(f"q{n}", "sums", f"{'1 + ' * n}{n}?", (), "4") for n in (1, 9, 3, 12, 5)]
    long = Question("long", "sums", "so " * 2000, (), "4")
    alone, together = make_pack(batch_size=1), make_pack(batch_size=4)
    passes = [0]
    runs = []
    for pack, path in ((together, "4.jsonl"), (alone, "1.jsonl")):
        runs.append(generate.evaluate(pack, asked, tmp_path / path, methods=["em", "top1"], max_tokens=12))
        passes.append(sum(member.engine.forwards for member in pack.members) - sum(passes))
    found, expected = runs
    assert passes[1] < passes[2] / 2
    for ours, theirs in zip(found, expected, strict=True):
        assert [m["text"] for m in ours["methods"].values()] == [m["text"] for m in theirs["methods"].values()]
    mixed = generate.evaluate(together, [*asked[:2], long], tmp_path / "m.jsonl", methods=["em"], max_tokens=12)
    assert [("left_out" in record) for record in mixed] == [False, False, True]


# Records


def test_a_killed_run_goes_on_where_it_stopped(make_member, tmp_path):
    """A process that is killed while it writes, then resumed: the records of an uninterrupted run."""
    pack = Pack([make_member("llama", 0), make_member("llama", 1)])
    for member in pack.members:
        member.model.save_pretrained(tmp_path / member.name)
        member.tokenizer.save_pretrained(tmp_path / member.name)
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": d.text}) + "\n" for d in documents(12)))
    code = (
        "import sys, time; from pathlib import Path; from packllm import Pack; from packllm_eval import lm, rows\n"
        "slow = lm._score\n"
        "lm._score = lambda *a: (time.sleep(0.3), slow(*a))[1]\n"
        "at = Path(sys.argv[1]); pack = Pack.load([str(at / 'llama-0'), str(at / 'llama-1')])\n"
        "lm.evaluate(pack, rows.read_documents(at / 'd.jsonl'), at / 'r.jsonl', methods=['em', 'opt'])\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    path = tmp_path / "r.jsonl"
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < 4):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = path.read_bytes()
    assert 3 <= len(records.read(path)) < 12
    path.write_bytes(kept + b'{"id": "half a li')  # as a kill within a write leaves it
    loaded = Pack.load([str(tmp_path / "llama-0"), str(tmp_path / "llama-1")])
    found = rows.read_documents(tmp_path / "d.jsonl")
    resumed = lm.evaluate(loaded, found, path, methods=["em", "opt"])
    whole = lm.evaluate(loaded, found, tmp_path / "whole.jsonl", methods=["em", "opt"])
    assert path.read_bytes().startswith(kept)
    assert without_seconds(resumed) == without_seconds(whole)
    assert without_seconds(records.read(path)) == without_seconds(records.read(tmp_path / "whole.jsonl"))


def test_a_failure_keeps_what_was_done(pack, tmp_path, monkeypatch):
    path, score, seen = tmp_path / "r.jsonl", lm._score, []

    def fails_at_third(*arguments):
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(lm, "_score", fails_at_third)
    with pytest.raises(KeyboardInterrupt):
        lm.evaluate(pack, documents(5), path, methods=["em"])
    assert [r["id"] for r in records.read(path)] == ["d0", "d1"]
    lm.evaluate(pack, documents(5), path, methods=["em"])
    assert len(seen) == 6


def test_records_of_another_question_are_refused(pack, tmp_path):
    lm.evaluate(pack, documents(1), tmp_path / "r.jsonl", methods=["em"])
    with pytest.raises(DataError, match="results for another methods;"):
        lm.evaluate(pack, documents(1), tmp_path / "r.jsonl", methods=["top1"])
    with pytest.raises(DataError, match="another fingerprint, members, methods"):
        lm.evaluate(Pack(pack.members[:2]), documents(1), tmp_path / "r.jsonl")


def test_methods_of_one_label_and_other_options_are_not_one(pack, tmp_path):
    path = tmp_path / "r.jsonl"
    lm.evaluate(pack, documents(1), path, methods=[Method("mine", {"weighting": "sim", "tau": 5.0})])
    others = [
        Method("mine", {"weighting": "sim"}),
        Method("mine", {"weighting": "sim", "tau": 5.0}, ("gpt2-1",)),
        Method("mine", {"weighting": "sim", "tau": 5.0, "pool": "linear"}),
    ]
    for other in others:
        with pytest.raises(DataError, match="results for another methods;"):
            lm.evaluate(pack, documents(1), path, methods=[other])
    with pytest.raises(DataError, match="results for another methods;"):
        lm.evaluate(Pack(pack.members, unit="byte"), documents(1), path, methods=[others[0]])


def test_a_fitted_file_must_be_there_and_is_part_of_the_question(pack, tmp_path):
    pytest.importorskip("sklearn")
    path, method = tmp_path / "r.jsonl", f"cbtm:fitted={tmp_path / 'c.npz'}"
    with pytest.raises(WeightsError, match="cannot be read"):
        lm.evaluate(pack, documents(1), path, methods=[method])
    corpora = [[f"{word} and {other}" for other in ("court", "index")] for word in ("law", "table", "blood")]
    names = [member.name for member in pack.members]
    cbtm.fit(dict(zip(names, corpora, strict=True)), tmp_path / "c.npz")
    lm.evaluate(pack, documents(1), path, methods=[method])
    cbtm.fit(dict(zip(names, corpora[::-1], strict=True)), tmp_path / "c.npz")
    with pytest.raises(DataError, match="results for another methods;"):
        lm.evaluate(pack, documents(1), path, methods=[method])


def test_rows_that_were_left_out_are_tried_again(pack, tmp_path, monkeypatch):
    path, score = tmp_path / "r.jsonl", lm._score

    def fails(pack, document, *rest):
        if document.id == "d1":
            raise MemberError("gpt2-1", "not finite")
        return score(pack, document, *rest)

    monkeypatch.setattr(lm, "_score", fails)
    for _ in range(2):  # the second time nothing is new
        lm.evaluate(pack, documents(3), path, methods=["em"])
        assert [r["id"] for r in records.read(path) if "left_out" in r] == ["d1"]
        assert len(path.read_text().splitlines()) == 4
    monkeypatch.setattr(lm, "_score", score)
    resumed = lm.evaluate(pack, documents(3), path, methods=["em"])
    whole = lm.evaluate(pack, documents(3), tmp_path / "whole.jsonl", methods=["em"])
    assert without_seconds(resumed) == without_seconds(whole)
    assert len(records.read(path)) == 3


def test_a_header_that_a_kill_cut_short_is_written_anew(pack, tmp_path):
    path = tmp_path / "r.jsonl"
    whole = lm.evaluate(pack, documents(1), path, methods=["em"])
    path.write_bytes(path.read_bytes()[:9])
    assert without_seconds(lm.evaluate(pack, documents(1), path, methods=["em"])) == without_seconds(whole)


@pytest.mark.parametrize("content", ["no json", '"text"\n', '{"a": 1}\n[]\n', '{"a": 1}'])
def test_files_that_hold_something_else_are_left_alone(pack, tmp_path, content):
    path = tmp_path / "r.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"is no record|results for another"):
        lm.evaluate(pack, documents(1), path, methods=["em"])
    assert path.read_text() == content
    with pytest.raises(DataError, match="cannot be a folder of records"):
        lm.evaluate(pack, documents(1), path / "r.jsonl", methods=["em"])
