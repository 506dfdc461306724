"""The README and the pages of docs/, taken apart: their blocks, links and headings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]}
NEEDS = re.compile(r"<!-- needs: (\w+) -->")
"""Says, right before a block, which package it needs that no extra of `dev` brings."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, text, first line in the page, and the package that it says it needs."""

    language: str
    text: str
    line: int
    needs: str | None


def blocks(text: str) -> Iterator[Block]:
    """All fenced blocks of a page, indented ones too."""
    lines, at = text.splitlines(), 0
    while at < len(lines):
        opening = re.match(r"( *)```(.*)$", lines[at])
        if opening:
            indent, end = len(opening[1]), at + 1
            while lines[end].strip() != "```":
                end += 1
            told = NEEDS.search("\n".join(lines[max(0, at - 2) : at]))
            body = "\n".join(line[indent:] for line in lines[at + 1 : end])
            yield Block(opening[2].strip(), body, at + 1, told and told[1])
            at = end
        at += 1


def read(name: str) -> str:
    return PAGES[name].read_text(encoding="utf-8")


def commands(block: Block) -> list[str]:
    """The commands of a shell block, without comments; continued lines joined, chains taken apart."""
    joined = re.sub(r"\\\n\s*", " ", block.text)
    lines = [re.sub(r"(^|\s)#.*$", "", line).strip() for line in joined.splitlines()]
    return [command.strip() for line in lines for command in line.split(" && ") if command.strip()]


def without_fences(text: str) -> list[str]:
    """The lines of a page; those in fenced blocks are empty."""
    kept, fenced = [], False
    for line in text.splitlines():
        fence = line.lstrip().startswith("```")
        fenced ^= fence
        kept.append("" if fenced or fence else line)
    return kept


def anchors(text: str) -> set[str]:
    """What headings are linked by."""
    headings = [line.lstrip("#") for line in without_fences(text) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@contextmanager
def registries() -> Iterator[None]:
    """Weightings and decodings that are added meanwhile are gone afterwards."""
    from packllm.decode.decodings import DECODINGS
    from packllm.weights import WEIGHTINGS

    before = [(registry, dict(registry)) for registry in (WEIGHTINGS, DECODINGS)]
    try:
        yield
    finally:
        for registry, entries in before:
            registry.clear()
            registry.update(entries)


def definitions(name: str) -> dict[str, Any]:
    """What the Python blocks of a page import, define and register, without what they run."""
    space: dict[str, Any] = {}
    for block in blocks(read(name)):
        if block.language == "python":
            tree = ast.parse(block.text)
            tree.body = [one for one in tree.body if _defines(one)]
            exec(compile(tree, name, "exec"), space)
    return space


def _defines(statement: ast.stmt) -> bool:
    registers = isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Subscript)
    return registers or isinstance(statement, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)
