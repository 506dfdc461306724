from __future__ import annotations

import ast
import importlib
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import logging
from typer.testing import CliRunner

import packllm
from packllm import Pack
from packllm.chat.messages import CONTEXT
from packllm.cli import app
from packllm.progress import SLOW, bars_if_slow
from packllm.terminal import printable

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def models(make_member, tmp_path_factory) -> list[str]:
    """Folders of two tiny members of one vocabulary."""
    folders = []
    for architecture, seed in (("llama", 0), ("gpt2", 1)):
        folder = tmp_path_factory.mktemp("models") / architecture
        member = make_member(architecture, seed)
        member.model.save_pretrained(folder)
        member.tokenizer.save_pretrained(folder)
        folders.append(str(folder))
    return folders


@pytest.fixture
def run(models, monkeypatch):
    """run(command, *arguments, input=None): the command on the two tiny members, at 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def invoke(command: str, *arguments: str, stdin: str | None = None):
        chosen = [word for model in models for word in ("--model", model)]
        return CliRunner().invoke(app, [command, *chosen, *arguments], input=stdin)

    return invoke


@pytest.fixture
def reference(models) -> Pack:
    return Pack.load(models)


def test_ask_prints_the_answer_and_the_weights(run, reference) -> None:
    result = run("ask", QUESTION, "--max-tokens", "6")
    assert result.exit_code == 0, result.output
    expected = reference.generate([{"role": "user", "content": QUESTION}], max_tokens=6)
    assert result.stdout.startswith(expected.text + "\n")
    table = result.stdout[len(expected.text) :]
    assert "llama" in table
    assert "gpt2" in table
    for value in expected.weights.values:
        assert f"{value:.3f}" in table
    assert "strategy em, linear pool" in table
    assert max(map(len, table.splitlines())) <= 80


def test_ask_as_json_is_the_generation(run, reference) -> None:
    result = run("ask", QUESTION, "--max-tokens", "6", "--weighting", "sim", "--option", "tau=1", "--json")
    answer = json.loads(result.stdout)
    expected = reference.generate([{"role": "user", "content": QUESTION}], max_tokens=6, weighting="sim", tau=1)
    assert answer | {"timings": None} == expected.as_dict() | {"timings": None}
    assert result.stdout.count("\n") == 1


def test_raw_continues_the_text(run, reference) -> None:
    answer = json.loads(run("ask", QUESTION, "--raw", "--max-tokens", "6", "--json").stdout)
    assert answer["text"] == reference.generate(QUESTION, max_tokens=6, chat_template=False).text
    assert answer["usage"]["prompt_tokens"] == reference.count_tokens(QUESTION)


def test_files_come_before_the_question(run, reference, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("Paris is a city.\n", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"Broken \xff bytes are read.")
    files = ["--file", str(tmp_path / "a.txt"), "--file", str(tmp_path / "b.txt")]
    answer = json.loads(run("ask", QUESTION, *files, "--max-tokens", "4", "--json").stdout)
    prompt = CONTEXT.format(context="Paris is a city.\n\nBroken � bytes are read.", question=QUESTION)
    expected = reference.generate([{"role": "user", "content": prompt}], max_tokens=4)
    assert (answer["text"], answer["usage"]) == (expected.text, expected.usage.as_dict())


def test_context_may_hold_braces(run, tmp_path) -> None:
    (tmp_path / "code.txt").write_text("{question} {0} {", encoding="utf-8")
    result = run("ask", "What {is} this?", "--file", str(tmp_path / "code.txt"), "--max-tokens", "2", "--json")
    assert result.exit_code == 0, result.output


def test_a_dash_reads_standard_input(run) -> None:
    named = run("ask", QUESTION, "--max-tokens", "4", "--quiet")
    piped = run("ask", "-", "--max-tokens", "4", "--quiet", stdin=QUESTION)
    assert named.stdout == piped.stdout
    assert "NLL" not in named.stdout


def test_stop_and_sampling_reach_the_pack(run, reference) -> None:
    drawn = ("--temperature", "1.5", "--seed", "3", "--max-tokens", "8", "--json")
    answer = json.loads(run("ask", QUESTION, *drawn).stdout)
    options = {"temperature": 1.5, "seed": 3, "max_tokens": 8}
    assert answer["text"] == reference.generate([{"role": "user", "content": QUESTION}], **options).text
    piece = next(c for c in answer["text"] if c.isprintable() and c != "�")
    stopped = json.loads(run("ask", QUESTION, *drawn, "--stop", piece).stdout)
    assert stopped["text"] == answer["text"].partition(piece)[0]
    assert stopped["finish_reason"] == "stop"


def test_weigh_shows_every_member(run, reference) -> None:
    result = run("weigh", QUESTION, "--weighting", "exact")
    assert result.exit_code == 0, result.output
    weights = reference.weigh(QUESTION, weighting="exact")
    for name, nll, value in zip(weights.names, weights.nll, weights.values, strict=True):
        assert re.search(rf"{name}\s+{nll:.3f}\s+[\d.e+]+\s+{value:.3f}", result.stdout)
    assert f"{weights.scored} tokens scored" in result.stdout
    assert f"fused NLL {weights.fused_nll:.4f}" in result.stdout
    assert "gap" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_weigh_as_json_is_the_weights(run, reference) -> None:
    result = run("weigh", "-", "--json", stdin=QUESTION)
    assert json.loads(result.stdout) == reference.weigh(QUESTION).as_dict()


def test_fixed_weights(run) -> None:
    weights = json.loads(run("weigh", QUESTION, "--weighting", "llama=0.7,gpt2=0.3", "--json").stdout)
    assert weights["strategy"] == "fixed"
    assert weights["weights"] == pytest.approx([0.7, 0.3])


def test_a_text_with_nothing_to_score_says_why_weights_are_uniform(run) -> None:
    raw = "--option", "chat_template=false"  # in a template, what comes before it tells
    result = run("weigh", "a", *raw)
    assert result.exit_code == 0, result.output
    assert "0.500" in result.stdout
    assert "nothing was scored, so all members have the same weight" in " ".join(result.stdout.split())
    assert json.loads(run("weigh", "a", "--json", *raw).stdout)["note"].startswith("nothing was scored")
    assert json.loads(run("weigh", QUESTION, "--json").stdout)["note"] is None
    assert "nothing was scored" not in run("weigh", QUESTION).stdout


def test_weigh_reads_files(run, reference, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.md").write_text(QUESTION, encoding="utf-8")
    Path("more.txt").write_text("Paris.", encoding="utf-8")
    one = json.loads(run("weigh", "--file", "notes.md", "--json").stdout)
    assert one == reference.weigh(QUESTION).as_dict()
    both = json.loads(run("weigh", "-f", "notes.md", "-f", "more.txt", "--json").stdout)
    assert both == reference.weigh(f"{QUESTION}\n\nParis.").as_dict()
    for arguments, remedy in (
        (["notes.md"], "--file notes.md"),
        (["some text", "-f", "notes.md"], "not both"),
        ([], "--file FILE"),
    ):
        refused = run("weigh", *arguments)
        assert refused.exit_code == 2
        assert remedy in refused.stderr
    long = "a text longer than any file's name may be " * 7
    assert json.loads(run("weigh", long, "--json").stdout) == reference.weigh(long).as_dict()
    piped = run("weigh", "-", "--json", stdin="notes.md")  # the name itself, when it is meant
    assert json.loads(piped.stdout) == reference.weigh("notes.md").as_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ask", QUESTION, "--option", "tua=1"), "did you mean 'tau'"),
        (("ask", QUESTION, "--option", "tau"), "NAME=VALUE"),
        (("ask", QUESTION, "--weighting", "emm"), "em"),
        (("ask", QUESTION, "--weighting", "llama=much"), "NAME=NUMBER"),
        (("ask", QUESTION, "--max-tokens", "0"), "max_tokens=0"),
        (("ask", QUESTION, "--max-tokens", "5000"), "context window"),
        (("ask", " "), "empty"),
        (("weigh", ""), "empty"),
        (("weigh", QUESTION, "--model", "/no/such/model"), "/no/such/model"),
    ],
)
def test_errors_are_one_line_on_stderr(run, arguments, message) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_a_missing_file_is_a_usage_error(run) -> None:
    result = run("ask", QUESTION, "--file", "/no/such/file")
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.stdout == f"packllm {packllm.__version__}\n"


@pytest.mark.parametrize("command", ["ask", "weigh", "bench"])
def test_help_says_what_it_does_with_an_example(command, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert f"packllm {command}" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    listed = CliRunner().invoke(app, ["--help"]).stdout
    assert command in listed


def test_answers_cannot_steer_a_terminal(monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    assert printable("a\x1b[2J\tb\nü\x07") == "a[2J\tb\nü"


HEAVY = ("torch", "transformers", "tokenizers", "numpy", "packllm_eval")


def imported(code: str) -> list[str]:
    """What of HEAVY a process of its own imports by this code; its last line of output is that."""
    code += f"\nimport sys\nprint('\\n', sorted(set({HEAVY}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return ast.literal_eval(done.stdout.splitlines()[-1].strip())


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["ask", "--help"], ["weigh", "--help"]], ids=" ".join)
def test_help_and_version_import_nothing_heavy(arguments) -> None:
    code = f"from packllm.cli import app\ntry: app({arguments})\nexcept SystemExit as end: assert not end.code"
    assert imported(code) == []


def test_the_package_imports_what_is_asked_for() -> None:
    assert imported("import packllm; packllm.__version__, dir(packllm); packllm.PackError") == []
    assert "torch" in imported("from packllm import Pack; assert Pack.__name__ == 'Pack'")
    code = """
import packllm
for name in packllm.__all__:
    assert getattr(packllm, name).__name__ == name, name
assert packllm.align.Vocabulary and packllm.weights.WEIGHTINGS and set(packllm.__all__) <= set(dir(packllm))
try: packllm.Packet
except AttributeError as error: assert "'Packet'" in str(error)
else: raise AssertionError
exec("from packllm import *")
"""
    assert "packllm_eval" not in imported(code)


def test_types_are_told_what_is_imported_late() -> None:
    """Type checkers and editors read what runs only for them."""
    tree = ast.parse(Path(packllm.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    told = {alias.name: node.module for node in block.body for alias in node.names}
    assert set(told) == set(packllm.__all__)
    for name, module in told.items():
        assert getattr(importlib.import_module(module), name) is getattr(packllm, name)


@pytest.mark.parametrize("command", ["eval", "bench"])
def test_commands_of_the_evaluation_say_what_they_lack(command, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.startswith("packllm_eval")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "packllm_eval", None)
    result = CliRunner().invoke(app, [command])
    assert result.exit_code == 2
    assert result.stderr == "Error: this command needs packllm_eval; install packllm[eval]\n"


def test_no_bar_for_what_is_quick(models) -> None:
    """Loading two tiny models takes no two seconds, and nobody watches: not a bar, not a warning."""
    code = f"from packllm import Pack; print(len(Pack.load({models!r}).members))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("2\n", "")


def test_bars_of_loading_wait_and_hooks_of_others_stay() -> None:
    seen: list[dict] = []

    def theirs(make, args, options):
        seen.append(options)
        return make(*args, **options)

    before = logging.set_tqdm_hook(theirs)
    try:
        with bars_if_slow():
            assert list(logging.tqdm(range(3), desc="Loading weights")) == [0, 1, 2]
        assert logging.set_tqdm_hook(theirs) is theirs
    finally:
        logging.set_tqdm_hook(before)
    assert seen == [{"delay": SLOW, "disable": None, "desc": "Loading weights"}]


def test_json_is_finite(run) -> None:
    answer = json.loads(run("ask", QUESTION, "--max-tokens", "2", "--json").stdout)
    assert all(math.isfinite(seconds) for seconds in answer["timings"].values())


def test_ask_and_weigh_explain_on_a_page(run, tmp_path) -> None:
    passage, page = tmp_path / "ruling.txt", tmp_path / "out.html"
    passage.write_text("The court shall order <b>relief</b>.\n")
    result = run("ask", QUESTION, "--max-tokens", "4", "--file", str(passage), "--explain", str(page))
    assert result.exit_code == 0, result.output
    told = page.read_text(encoding="utf-8")
    assert "passage 1" in told
    assert "shall order &lt;b&gt;relief&lt;/b&gt;." in told
    assert "Weights over the answer" in told
    answer = json.loads(run("ask", QUESTION, "--max-tokens", "4", "--json", "--explain", str(page)).stdout)
    assert len(answer["explanation"]["tokens"]) == 4
    page.unlink()
    assert run("weigh", "--file", str(passage), "--explain", str(page)).exit_code == 0
    assert "Weights over the answer" not in page.read_text(encoding="utf-8")
    nowhere = run("weigh", QUESTION, "--explain", str(tmp_path / "none" / "out.html"))
    assert nowhere.exit_code == 2
    assert "no folder" in nowhere.stderr
