"""The README and the pages: every Python block runs, every command is one, every link leads somewhere."""

from __future__ import annotations

import ast
import json
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import CORPUS
from pages import PAGES, ROOT, Block, anchors, blocks, commands, read, registries, without_fences

LANGUAGES = {"python", "sh", "text", "json", "dockerfile", "ini"}
TABLES_OF_RUNS = ("docs/results.md", "docs/results/", "docs/log.md")
PROGRAMS = {name: [block for block in blocks(read(name)) if block.language == "python"] for name in PAGES}
PROGRAMS = {name: found for name, found in PROGRAMS.items() if found}
SHELL = {name: [block for block in blocks(read(name)) if block.language == "sh"] for name in PAGES}
SHELL = {name: found for name, found in SHELL.items() if found}


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= 7000
    assert len(PROGRAMS["README.md"]) == 3
    for block, says in zip(
        PROGRAMS["README.md"], ("Pack", "langchain_packllm", "llama_index.llms.packllm"), strict=True
    ):
        assert f"from {says}" in block.text or says == "Pack"
        assert len(block.text.splitlines()) <= 15


def test_blocks_say_what_they_are():
    """A block without a language would be run by nobody."""
    odd = [
        (name, block.line, block.language)
        for name in PAGES
        if not name.startswith(TABLES_OF_RUNS)
        for block in blocks(read(name))
        if block.language not in LANGUAGES
    ]
    assert not odd
    assert sum(map(len, PROGRAMS.values())) > 30
    hidden = [
        (name, block.line)
        for name in PAGES
        for block in blocks(read(name))
        if block.language == "text" and re.search(r"^(import|from) \w+", block.text, re.MULTILINE)
    ]
    assert not hidden


def test_lists_and_tables_stand_apart():
    """Markdown as the site reads it takes a list or a table right after a line of prose for prose."""
    wrong = []
    for name in PAGES:
        before = ""
        for number, line in enumerate(without_fences(read(name)), 1):
            starts = re.match(r"([-*]|\d+\.) |\|", line)
            goes_on = not before.strip() or before.startswith(("#", " ")) or re.match(r"([-*]|\d+\.) |\|", before)
            if starts and not goes_on:
                wrong.append((name, number, line[:40]))
            before = line
    assert not wrong


# Links of pages in docs/ are held by `make docs` too, these with their anchors.
@pytest.mark.parametrize("name", [*PAGES, "CONTRIBUTING.md", "SECURITY.md"])
def test_links_lead_somewhere(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", "\n".join(without_fences(page.read_text(encoding="utf-8")))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = page if not path else (page.parent / path).resolve()
        assert found.is_file(), target
        if anchor and "reference" not in found.parts:  # those are made of docstrings
            assert anchor in anchors(found.read_text(encoding="utf-8")), target


def test_tables_are_whole():
    from packllm import Options
    from packllm.decode.decodings import DECODINGS
    from packllm.weights import WEIGHTINGS

    rows = [line.split("|")[1] for line in read("docs/options.md").splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(Options.model_fields)
    assert all(f"| `{name}`" in read("docs/methods.md") for name in WEIGHTINGS)
    assert all(f'| `"{name}"`' in read("docs/vocabularies.md") for name in DECODINGS)


def test_the_reference_has_all_public_names():
    import packllm
    import packllm.weights

    told = "".join(read(name) for name in PAGES if name.startswith("docs/reference/"))
    missing = [name for name in [*packllm.__all__, *packllm.weights.__all__] if not re.search(rf"\b{name}\b", told)]
    assert not missing
    adapters = "PackLLM", "ChatPackLLM", "PackReranker", "PackDecisions", "PackRerank"
    assert all(re.search(rf"::: \S+\.{name}$", told, re.MULTILINE) for name in adapters)


def test_the_citation_is_cff_and_names_both_papers():
    cited = pytest.importorskip("yaml").safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "version"} <= cited.keys()
    assert [one["identifiers"][0]["value"] for one in cited["references"]] == ["arXiv:2404.11531", "arXiv:2407.19807"]
    assert all({"type", "title", "authors"} <= one.keys() for one in cited["references"])


# Programs


@pytest.fixture(scope="session")
def samples(make_member, tmp_path_factory) -> Path:
    """A folder with all files that the pages name: tiny models, texts, questions."""
    import peft
    from test_gguf import write_gguf

    folder = tmp_path_factory.mktemp("samples")
    general = make_member("llama", 0)
    saved = {"general": general, "medicine": make_member("llama", 1), "other": make_member("llama", 2, "words")}
    for name, member in saved.items():
        member.model.save_pretrained(folder / name)
        member.tokenizer.save_pretrained(folder / name)
    write_gguf(general, folder / "model.gguf")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    peft.get_peft_model(type(general.model)(general.model.config), config).save_pretrained(folder / "law-lora")
    (folder / "notes").mkdir()
    for name in ("notes/a.md", "notes/b.md", "notes.md", "ruling.txt"):
        (folder / name).write_text("\n\n".join(CORPUS[:5]), encoding="utf-8")
    questions = [{"question": "What is it?", "context": text, "answer": text.split(".")[0]} for text in CORPUS[:4]]
    rows = {"mycorpus.jsonl": [{"text": text} for text in CORPUS[:5]], "qa.jsonl": questions}
    for name, written in rows.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
    (folder / "prior.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.fixture
def inside(samples, tmp_path, monkeypatch) -> Path:
    """The working directory of a page: links to the samples, and nothing else."""
    for path in samples.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PACKLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def starter(request, monkeypatch) -> None:
    """Pack.starter() with the members of the one that is loaded once; its load is test_starter's."""
    from packllm import Pack

    members = request.getfixturevalue("starter_pack").members

    def made(cls, *, dtype="auto", device_map="auto", model_kwargs=None, engine=None, **options):
        return cls(members, **options)

    monkeypatch.setattr(Pack, "starter", classmethod(made))


def needed(found: list[Block]) -> Iterator[str]:
    """Packages outside packllm that blocks import, or say that they need."""
    for block in found:
        yield from [block.needs] if block.needs else []
        for node in ast.walk(ast.parse(block.text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            yield from (top for name in names if (top := name.partition(".")[0]) not in sys.stdlib_module_names)


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_run(name, request, inside, monkeypatch, capsys):
    """Page by page, in order, each page in a namespace of its own."""
    found = [block for block in PROGRAMS[name] if not (block.needs and find_spec(block.needs) is None)]
    if not found:
        pytest.skip(f"{name} needs {PROGRAMS[name][0].needs}, which is not installed")
    for package in {*needed(found)} - {"packllm"}:
        pytest.importorskip(package, reason=f"{name} needs {package}, which is not installed")
    if any("starter" in block.text for block in found):
        request.getfixturevalue("starter")
    space: dict[str, Any] = {"__name__": "__main__"}
    with ExitStack() as stack:
        stack.enter_context(registries())
        replaced = stack.enter_context(_served(make=request.getfixturevalue("make_member"))) if name in SERVED else {}
        monkeypatch.setenv("EXAMPLE_KEY", "none")
        for block in found:
            text = block.text
            for old, new in replaced.items():
                text = text.replace(old, new)
            exec(compile("\n" * block.line + text, name, "exec"), space)
    assert capsys.readouterr().out.strip()


SERVED = ("docs/serve.md", "docs/servers.md")
"""Pages that ask servers, which listen here on loopback instead."""


def _served(make) -> Any:
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    from contextlib import contextmanager

    from test_serve_clients import on_loopback

    from packllm import Pack
    from packllm.serve.app import create_app

    @contextmanager
    def listening():
        pack = Pack([make("llama", 0, name="qwen2.5-7b"), make("llama", 1, name="big")], max_tokens=8)
        with on_loopback(create_app(pack)) as url:
            hosts = ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8080/v1", "https://api.example.com/v1")
            yield dict.fromkeys(hosts, url)

    return listening()


for _name in SERVED:
    assert _name in PROGRAMS


# Commands


def parsed(words: list[str]) -> None:
    """What the command line makes of a command, short of running it; a usage error where it is none."""
    from packllm.cli import app

    command: Any = typer.main.get_command(app)
    context = command.make_context("packllm", words[:1])
    name, command, rest = command.resolve_command(context, words)
    while hasattr(command, "resolve_command"):
        context = command.make_context(name, [*rest], parent=context)
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    command.make_context(name, [*rest], parent=context)


@pytest.mark.parametrize("name", SHELL)
def test_commands_are_commands(name, inside):
    """Names, options, values, and files that must exist; targets of make; extras of pip; programs of Python."""
    pyproject, makefile = (ROOT / "pyproject.toml").read_text(), (ROOT / "Makefile").read_text()
    for command in [command for block in SHELL[name] for command in commands(block)]:
        words = shlex.split(command.replace("$PORT", "8000"))
        if words[0] == "packllm":
            parsed(words[1:])
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), command
        elif words[0] == "pip":
            for extra in re.findall(r"\[([\w,-]+)\]", command):
                assert all(re.search(rf"^{one} = \[", pyproject, re.MULTILINE) for one in extra.split(",")), command
        elif words[0] == "python" and words[1] != "-m":
            assert (ROOT / words[1]).is_file(), command
        else:
            assert words[0] in ("python", "docker", "curl", "git", "ray", "systemctl", "cd"), command
