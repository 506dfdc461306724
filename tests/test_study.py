"""The study behind docs/results.md: no leak from training to held-out text, and the whole path on tiny members."""

from __future__ import annotations

import importlib
import json
import random
import sys
from pathlib import Path

import pytest

from packllm import Pack

EXAMPLES = Path(__file__).parents[1] / "examples"
TEXT = "the court shall hear a party index table rows scan insulin level blood sum of two numbers is four"
WORDS = TEXT.split()


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def load(name: str):
    return importlib.import_module(name)


def test_code_is_held_out_by_file():
    """The code expert reads the standard library's packages, and is asked about its modules."""
    held_out = load("held_out")
    asked, read = held_out.standard_library(), held_out.standard_library("*/*.py")
    assert min(len(asked), len(read)) > 100
    assert not set(asked) & set(read)
    assert {row["file"] for row in held_out.code_of_python()} <= {"/".join(path.parts[-3:]) for path in read}


def test_passages_of_a_file_are_few_and_held_out_together(tmp_path):
    held_out, train = load("held_out"), load("train_expert")
    rng = random.Random(0)
    rows = [
        row
        for number in range(60)
        for row in held_out.passages(tmp_path / f"{number}.h", " ".join(rng.choices(WORDS, k=rng.randint(1, 3000))))
    ]
    assert all(len(row["text"]) >= held_out.LEAST for row in rows)
    assert max(sum(other["file"] == row["file"] for other in rows) for row in rows) == 3
    held_out.write(tmp_path / "rows.jsonl", rows)
    documents = train.read_documents(tmp_path / "rows.jsonl", "file", 10)
    unseen = {d.key for d in documents if d.held_out}
    assert unseen
    assert not unseen & {d.key for d in documents if not d.held_out}


def test_mixed_documents_are_halves_of_two_domains():
    held_out = load("held_out")
    texts = {name: [name[0] * 1000] for name in ("law", "maths", "code")}
    for text in held_out.mixed(texts):
        first, second = text.split("\n\n")
        assert (len(first), len(second), len({*first})) == (500, 500, 1)
        assert first[0] != second[0]


@pytest.fixture
def study(make_member, monkeypatch):
    """study.py, its members tiny ones of one architecture."""
    study = load("study")
    monkeypatch.setattr(study.starter, "specs", lambda: list(study.FIVE[:4]))
    monkeypatch.setattr(study.starter, "base_model", lambda: "base")

    def load_tiny(specs, **options):
        names = [spec.partition("=")[0] for spec in specs]
        return Pack([make_member("llama", study.EIGHT.index(name), name=name) for name in names])

    monkeypatch.setattr(study.Pack, "load", load_tiny)
    return study


def run(module, monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def test_studies_and_their_report(study, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    rng = random.Random(1)
    for name in {*study.CORPORA, *study.EIGHT[1:], "mixed_all"}:
        texts = [{"text": " ".join(rng.choices(WORDS, k=40))} for _ in range(4)]
        (tmp_path / "corpora").mkdir(exist_ok=True)
        for path in (tmp_path / f"{name}.jsonl", tmp_path / "corpora" / f"{name}.jsonl"):
            path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    threads = "--threads", study.torch.get_num_threads()
    for name in ("corpora", "eight"):
        run(study, monkeypatch, name, "--data", tmp_path, "--count", 2, *threads)
    out = tmp_path / "out"
    out.mkdir()
    run(load("study_report"), monkeypatch, "--data", tmp_path, "--out", out)
    table = (out / "eight.md").read_text()
    assert all(f"| {weighting} K={count} |" in table for weighting in study.COUNTED for count in study.COUNTS)
    # One member is one member, however it is weighed.
    scores = {entry["method"]: entry["value"] for entry in json.loads((out / "eight.json").read_text())}
    assert len({scores[f"{weighting} K=1"] for weighting in study.COUNTED} | {scores["member general"]}) == 1
    assert "| cbtm, experts |" in (out / "corpora.md").read_text()
    assert (out / "eight.png").stat().st_size > 1000
