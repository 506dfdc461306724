"""From records to tables, reports and the command line; statistics."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest

from packllm.cli import app
from packllm.errors import DataError, ExtraError
from packllm_eval import lm, records, report, statistics, tables
from packllm_eval.rows import Document

TEXT = (
    "The court shall order relief under chapter 7 unless the debtor objects within 30 days of the notice. "
    "A query planner chooses an index scan or a sequential scan from statistics of the table."
)


def documents(count: int) -> list[Document]:
    """Of two corpora in turn."""
    return [Document(str(i), ("two", "one")[i % 2], f"Number {i}. {TEXT[i:]}") for i in range(count)]


def made_up(corpus: str, nats: dict[str, float], size: int = 100) -> dict:
    weights = {"a": 0.75, "b": 0.25}
    methods = {"em": {"nats": nats["em"], "weights": weights, "pool": "linear", "seconds": 0.1}}
    methods["em without a"] = {"nats": nats["b"], "weights": {"b": 1.0}, "pool": "linear", "seconds": 0.1}
    methods["em without b"] = {"nats": nats["em"], "weights": {"a": 1.0}, "pool": "linear", "seconds": 0.1}
    return {
        "id": str(nats),
        "corpus": corpus,
        "bytes": size,
        "tokens": 20,
        "members": {"a": nats["a"], "b": nats["b"]},
        "seconds": {"a": 1.0, "b": 2.0},
        "prompts": {"32": {"tokens": 32, "methods": methods}},
    }


def test_tables_by_hand():
    bit = math.log(2)
    found = [
        made_up("x", {"a": 100 * bit, "b": 200 * bit, "em": 80 * bit}),
        made_up("x", {"a": 300 * bit, "b": 400 * bit, "em": 280 * bit}, 300),
        made_up("y", {"a": 90 * bit, "b": 50 * bit, "em": 60 * bit}),
        {"id": "z", "corpus": "x", "left_out": "too short"},
    ]
    entries = {(e.corpus, e.method): e for e in tables.lm_table(found)}
    assert entries["x", "em"].score.value == pytest.approx(360 / 400)
    assert entries["x", "em"].against.difference.value == pytest.approx(-40 / 400)
    assert entries["x", "best member"].score.value == entries["x", "member a"].score.value == pytest.approx(1.0)
    assert entries["y", "best member"].score.value == pytest.approx(0.5)
    assert entries["y", "em"].against.difference.value == pytest.approx(0.1)
    assert entries[tables.AVERAGE, "best member"].score.value == pytest.approx(0.75)
    assert entries[tables.AVERAGE, "em"].against.difference.value == pytest.approx(0.0)
    assert entries["x", "em"].more == pytest.approx(math.exp(360 * bit / 40))
    found_uses = {(u.corpus, u.member): u for u in tables.uses(found, "em")}
    assert found_uses["x", "a"].helps.value == pytest.approx((200 + 400 - 360) / 400)
    assert found_uses["x", "b"].helps.value == 0
    assert (found_uses["x", "a"].weight, found_uses["x", "a"].top, found_uses["x", "b"].runs) == (0.75, 1.0, 1.0)
    assert (found_uses["x", "b"].alone, found_uses["x", "b"].cost) == (pytest.approx(1.5), 2.0)
    text = report.audit([replace(use, rows=10) for use in found_uses.values()])
    assert "Helps: a." in text
    assert "Too few documents (2) to say who helps" in report.audit(list(found_uses.values()))


def chosen(corpus: str, at: int, answer: int, members: dict[str, int]) -> dict:
    """A record where each member, and `em`, finds the choice of its number the likeliest."""
    nats = {name: [0.0 if i == pick else -5.0 for i in range(2)] for name, pick in members.items()}
    methods = {"em": {"nats": nats.pop("em"), "weights": {}}}
    return {
        "id": f"{corpus}{at}",
        "corpus": corpus,
        "answer": answer,
        "bytes": [1, 2],
        "members": nats,
        "methods": methods,
    }


def test_choice_tables_by_hand():
    found = [chosen("x", i, 0, {"a": 0, "b": i % 2, "em": 0}) for i in range(4)]
    found += [chosen("y", i, 1, {"a": int(i == 0), "b": 1, "em": int(i < 2)}) for i in range(4)]
    entries = {(e.corpus, e.method): e for e in tables.choice_table(found)}
    assert [entries["x", m].score.value for m in ("member a", "member b", "em", "best member")] == [1, 0.5, 1, 1]
    assert [entries["y", m].score.value for m in ("member a", "member b", "em", "best member")] == [0.25, 1, 0.5, 1]
    assert entries["y", "em"].against.difference.value == -0.5
    # An average of shares is their arithmetic mean, whichever way they are normalised.
    for method, share in (("member a", 0.625), ("member b", 0.75), ("em", 0.75)):
        average = entries[tables.AVERAGE, method]
        assert average.score.value == pytest.approx(share)
        assert average.more == pytest.approx((entries["x", method].more + entries["y", method].more) / 2)
    assert entries[tables.AVERAGE, "member a"].more == pytest.approx(0.625)


def test_generation_is_compared_with_the_best_member():
    cells = {"em": (1, 0, 1), "member a": (1, 0, 0), "member b": (1, 1, 1)}
    found = [
        {"id": str(i), "corpus": "x", "largest": "a"}
        | {"methods": {m: {"right": bool(right[i]), "seconds": 2.0, "weights": {}} for m, right in cells.items()}}
        for i in range(3)
    ]
    entries = {e.method: e for e in tables.generate_table(found)}
    assert entries["em"].against.difference.value == pytest.approx(-1 / 3)
    assert entries["best member"].score.value == entries["member b"].score.value == 1
    assert entries["member b"].against is None
    assert entries["largest member"].score.value == pytest.approx(1 / 3)
    assert entries["em"].more == 2.0


def test_shares_that_are_all_alike_are_not_certain():
    z = 1.96**2
    assert statistics.proportion([False] * 16).low == 0
    assert statistics.proportion([False] * 16).high == pytest.approx(z / (16 + z))
    assert statistics.proportion([True] * 16).low == pytest.approx(16 / (16 + z))
    assert statistics.proportion([True, False]) == statistics.interval([1.0, 0.0])


def test_an_average_is_over_all_corpora_or_none():
    found = [made_up("x", {"a": 90.0, "b": 50.0, "em": 60.0}), made_up("y", {"a": 90.0, "b": 50.0, "em": 60.0})]
    del found[1]["prompts"]["32"]["methods"]["em without a"]
    labels = {e.corpus: set() for e in tables.lm_table(found)}
    for entry in tables.lm_table(found):
        labels[entry.corpus].add(entry.method)
    assert labels["x"] - labels[tables.AVERAGE] == {"em without a"}
    assert labels["y"] == labels[tables.AVERAGE]


def test_reports_are_written_with_plots(pack, tmp_path):
    pytest.importorskip("matplotlib")
    found = lm.evaluate(pack, documents(4), tmp_path / "r.jsonl", methods=["em", "top1"], prompts=("4", "16"))
    entries = tables.lm_table(found, "16")
    report.write(
        tmp_path, "Title", [report.markdown(entries, report.LM, True)], {"table": [e.as_dict() for e in entries]}
    )
    report.plot_weights(tmp_path / "weights.png", entries, "em")
    report.plot_scores(tmp_path / "scores.png", entries, "bits/byte", tables.AVERAGE)
    report.plot_lengths(tmp_path / "lengths.png", found)
    assert {p.name for p in tmp_path.glob("*.png")} == {"weights.png", "scores.png", "lengths.png"}
    assert all(p.stat().st_size > 5000 for p in tmp_path.glob("*.png"))
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Title")
    assert "| em | " in text
    assert json.loads((tmp_path / "report.json").read_text())["table"][0]["corpus"] == "two"


@pytest.fixture
def no_matplotlib(monkeypatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else found(name))


def test_plots_without_matplotlib_say_which_extra(no_matplotlib, caplog):
    with pytest.raises(ExtraError, match=r"install packllm\[eval\]"):
        report.can_plot(True)
    assert not report.can_plot(False)
    assert not caplog.messages
    assert not report.can_plot(None)
    assert "install packllm[eval]" in caplog.text


def test_the_audit_makes_its_table_without_matplotlib(no_matplotlib, saved, tmp_path, caplog):
    (tmp_path / "notes.md").write_text("\n\n".join(d.text for d in documents(4)))
    result = run(tmp_path / "notes.md", "-m", saved[0], "--documents", "1", "--report", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "### Members on notes" in (tmp_path / "out/report.md").read_text()
    assert "plots need matplotlib" in caplog.text
    assert not list(tmp_path.rglob("*.png"))
    refused = run(tmp_path / "notes.md", "-m", saved[0], "--plots", "--report", tmp_path / "other")
    assert refused.exit_code == 2
    assert "matplotlib" in refused.stderr


HOLD = """
import sys
from pathlib import Path
from packllm_eval.records import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_on_a_folder_is_refused_until_the_first_ends(saved, tmp_path):
    (tmp_path / "notes.txt").write_text("\n\n".join(d.text for d in documents(4)))
    audit = [tmp_path / "notes.txt", "-m", saved[0], "--documents", "1", "--no-plots", "--report", tmp_path / "out"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], **pipes) as first:
        assert first.stdout.readline() == "held\n"
        second = run(*audit)
        assert second.exit_code == 2
        assert f"another run writes to '{tmp_path / 'out'}'" in second.stderr
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
        first.kill()
    assert run(*audit).exit_code == 0


def test_records_are_one_writers(tmp_path):
    with records.Records(tmp_path / "r.jsonl", {"a": 1}) as open_:
        open_.add({"id": "x"})
        with pytest.raises(DataError, match="another run writes"):
            records.Records(tmp_path / "r.jsonl", {"a": 1})
    with records.Records(tmp_path / "r.jsonl", {"a": 1}) as again:
        assert again.rows == {"x": {"id": "x"}}


def test_importing_needs_no_extra():
    code = (
        "import sys\n"
        "for name in ('sklearn', 'matplotlib', 'lm_eval'): sys.modules[name] = None\n"
        "import packllm_eval.command, packllm_eval.report, packllm.engines.transformers.merge, packllm.weights\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def saved(make_member, tmp_path_factory) -> list[str]:
    """Folders of two tiny members."""
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        member = make_member("llama", seed)
        member.model.save_pretrained(folder / member.name)
        member.tokenizer.save_pretrained(folder / member.name)
    return [str(folder / name) for name in ("llama-0", "llama-1")]


def run(*arguments: str):
    from typer.testing import CliRunner

    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_the_five_minute_audit(saved, tmp_path):
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"text": d.text}) + "\n" for d in documents(4)))
    result = run(tmp_path / "mine.jsonl", "--models", ",".join(saved), "--report", tmp_path / "out")
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [use["member"] for use in content["audit"]] == ["llama-0", "llama-1"]
    assert {"em", "em without llama-0", "member llama-1"} <= {entry["method"] for entry in content["table"]}
    assert (tmp_path / "out" / "weights.png").exists()
    assert "Members on mine" in (tmp_path / "out" / "report.md").read_text()


def test_the_protocols_on_the_command_line(saved, tmp_path):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": d.text}) + "\n" for d in documents(3)))
    quiz = [{"question": f"Is {i} odd?", "choices": ["yes", "no"], "answer": i % 2} for i in range(6)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in quiz))
    sums = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(4)]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    models = ["-m", saved[0], "-m", saved[1], "--method", "em", "--method", "sim:tau=1"]
    result = run("lm", tmp_path / "d.jsonl", *models, "--prompt", "8", "--prompt", "16", "--report", tmp_path / "lm")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "lm" / "lengths.png").exists()
    result = run(
        "choice", tmp_path / "q.jsonl", *models, "--shots", "2", "--questions", "3", "--report", tmp_path / "c"
    )
    assert result.exit_code == 0, result.output
    assert len(records.read(tmp_path / "c" / "records-q.jsonl")) == 3
    result = run(
        "generate", tmp_path / "s.jsonl", *models, "--shots", "1", "--questions", "2", "--max-tokens", "4",
        "--report", tmp_path / "g",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    result = run("lm", tmp_path / "d.jsonl", *models, "--documents", "9", "--report", tmp_path / "x")
    assert result.exit_code == 2
    result = run("choice", tmp_path / "d.jsonl", *models, "--report", tmp_path / "y")
    assert result.exit_code == 2


def test_files_of_one_name_are_two_tasks(saved, tmp_path):
    for folder, count in (("law", 3), ("food", 4)):
        (tmp_path / folder).mkdir()
        quiz = [{"question": f"Is {i} {folder}?", "choices": ["yes", "no"], "answer": i % 2} for i in range(count)]
        (tmp_path / folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in quiz))
    paths = [tmp_path / folder / "test.jsonl" for folder in ("law", "food")]
    result = run("choice", *paths, "--models", ",".join(saved), "--method", "em", "--shots", "1", "--report", tmp_path)
    assert result.exit_code == 0, result.output
    found = {(e["corpus"], e["rows"]) for e in json.loads((tmp_path / "report.json").read_text())["table"]}
    assert found == {("law-test", 2), ("food-test", 3), (tables.AVERAGE, 5)}


def test_rivals_are_fitted_and_merged_on_the_command_line(saved, tmp_path):
    """cbtm and the router are trained from files; the average is a member that only the methods that name it mix."""
    for name, text in (("llama-0", "court law order relief"), ("llama-1", "bread flour salt water")):
        words = text.split()
        texts = [" ".join(words[i:] + words[:i] + [word]) for i, word in enumerate(words)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    pairs = [f"{name}={tmp_path / name}.jsonl" for name in ("llama-0", "llama-1")]
    for weighting in ("cbtm", "router"):
        result = run("fit", weighting, *pairs, "--out", tmp_path / f"{weighting}.npz")
        assert result.exit_code == 0, result.output
        assert json.loads(result.output)["texts"] == {"llama-0": 4, "llama-1": 4}
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": d.text}) + "\n" for d in documents(3)))
    methods = ["em", "uniform@average", *(f"{w}:fitted={tmp_path / w}.npz" for w in ("cbtm", "router"))]
    given = [part for method in methods for part in ("--method", method)]
    result = run("lm", tmp_path / "d.jsonl", "-m", ",".join(saved), *given, "--average", "--report", tmp_path / "o")
    assert result.exit_code == 0, result.output
    (record, *_) = records.read(tmp_path / "o" / "records.jsonl")
    assert [*record["members"]] == ["llama-0", "llama-1", "average"]
    (found,) = record["prompts"].values()
    weights = {label: [*method["weights"]] for label, method in found["methods"].items()}
    assert weights == {m: ["average"] if "average" in m else ["llama-0", "llama-1"] for m in methods}
    assert found["methods"]["uniform@average"]["nats"] == pytest.approx(record["members"]["average"])
    assert found["methods"][methods[2]]["weights"]["llama-0"] > 0.5  # its text is law
    for wrong, message in (
        (("fit", "opt", *pairs), "cannot be fitted"),
        (("fit", "cbtm", "law"), "is not MEMBER=FILE"),
    ):
        result = run(*wrong)
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())


def test_what_was_left_out_is_said(saved, tmp_path):
    rows = [{"text": d.text} for d in documents(2)] + [{"text": "a"}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("lm", tmp_path / "d.jsonl", "-m", ",".join(saved), "--method", "em", "--report", tmp_path / "o")
    assert result.exit_code == 0, result.output
    assert "1 of 3 rows left out; the first:" in result.output
