"""Shared by the RAG examples: the passages, three questions, and printing of answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

console = Console()
BAR = 24  # width of the bar for a weight of 1

QUESTIONS = (
    "How does hepatitis B spread?",
    "How much can a copyright owner recover in statutory damages?",
    "When is a hash index faster than a B-tree index?",
)


def passages() -> list[dict[str, str]]:
    """The passages of data/passages.jsonl: id, domain, title, text."""
    lines = (Path(__file__).parent / "data" / "passages.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def questions(default: Sequence[str] = QUESTIONS) -> Sequence[str]:
    """The question from the command line, or `default`: one per domain. Options such as --help print the program's
    description."""
    question = " ".join(sys.argv[1:]).strip()
    if question.startswith("-"):
        print((sys.modules["__main__"].__doc__ or "").strip())
        raise SystemExit(0)
    if sys.argv[1:] and not question:
        raise SystemExit("The question is empty. Give a question, or no argument at all.")
    return [question] if question else default


def show_question(question: str) -> None:
    console.print(f"[bold cyan]{escape(question)}")


def show_sources(titles: Sequence[str]) -> None:
    console.print("[dim]retrieved:[/] " + escape("; ".join(titles)))


def show_weights(weights: dict[str, Any]) -> None:
    """Print a line for each member. `weights` is `Weights.as_dict()`, which every answer has."""
    # "start" is set if the option adapt updates the weights during the answer.
    unit, counted = weights["unit"], weights["start"] or weights["weights"]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("member")
    table.add_column("weight", justify="right")
    table.add_column("", min_width=BAR)
    table.add_column(f"NLL / {unit}", justify="right")
    table.add_column(f"perplexity / {unit}", justify="right")
    for name, weight, nll, perplexity in zip(
        weights["names"], counted, weights["nll"], weights["perplexity"], strict=True
    ):
        style = "bold green" if weight == max(counted) else ""
        bar = "█" * round(BAR * max(weight, 0))
        table.add_row(escape(name), f"{weight:.3f}", bar, _number(nll, 3), _number(perplexity, 2), style=style)
    console.print(table, "")


def show_answer(answer: str) -> None:
    answer = answer.strip()
    cut = "" if answer.endswith((".", "!", "?")) else " …"
    console.print("[dim]answer:[/] " + escape(answer) + cut + "\n")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
