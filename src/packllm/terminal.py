"""Input of the commands from files and the terminal, and their output."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from packllm.chat import messages
from packllm.errors import OptionError, PromptError

if TYPE_CHECKING:  # torch takes seconds to import; --help should not wait for it
    from packllm.explanation import Explanation
    from packllm.weights import Weights

BAR = 20  # width of the bar for a weight of 1


def typed(argument: str) -> str:
    if argument != "-":
        return argument
    return typer.get_text_stream("stdin", encoding="utf-8", errors="replace").read()


def weighed(text: str | None, files: list[Path]) -> str:
    """The text for `packllm weigh`: the argument, or the files' texts."""
    if files and text is not None:
        raise OptionError("weigh takes a text or --file, not both")
    if files:
        return "\n\n".join(map(content, files))
    if text is None:
        raise PromptError("there is nothing to weigh; give a text, - for standard input, or --file FILE")
    if os.path.isfile(text):  # Path.is_file() fails on long texts
        raise PromptError(
            f"{text!r} is a file's name: to weigh what is in it, give --file {text}; to weigh the name "
            f"itself, pipe it in: echo -n {text} | packllm weigh -"
        )
    return typed(text)


def content(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def with_context(question: str, files: list[Path]) -> str:
    if not question.strip():
        raise PromptError("the question is empty; give at least one word")
    return messages.with_context(question, [content(file) for file in files])


def explained(page: Path | None, files: list[Path]) -> dict[str, Any]:
    """The options for --explain, with each file as a passage."""
    if page is None:
        return {}
    if not page.parent.is_dir():
        raise OptionError(f"--explain {str(page)!r}: there is no folder {str(page.parent)!r}; make it first")
    return {"explain": True, "passages": [text for file in files if (text := content(file).strip())]}


def write(explanation: Explanation | None, page: Path | None) -> None:
    if explanation is not None and page is not None:
        page.write_text(explanation.html(), encoding="utf-8", errors="replace")


def printable(text: str) -> str:
    """Text without control characters, if it goes to a terminal: a model's text may contain escape sequences."""
    return "".join(c for c in text if c in "\n\t" or c.isprintable()) if sys.stdout.isatty() else text


def print_weights(weights: Weights) -> None:
    """Print a table with one line per member, and notes on the numbers below it."""
    console = Console(highlight=False)
    block = "█" if console.encoding.lower().startswith("utf") else "#"
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("member", max_width=24, overflow="fold")
    for heading in (f"NLL/{weights.unit}", "perplexity", "weight"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", min_width=BAR)
    perplexities = weights.perplexity or (None,) * len(weights.names)
    nlls = weights.nll or (None,) * len(weights.names)
    for name, nll, perplexity, value in zip(weights.names, nlls, perplexities, weights.values, strict=True):
        bar = Text(block * round(BAR * min(abs(value), 1)), style="red" if value < 0 else "green")
        style = "bold" if name == weights.top else "dim" if value == 0 else ""
        table.add_row(Text(name), number(nll), number(perplexity), f"{value:.3f}", bar, style=style)
    console.print(table)
    lines = [f"strategy {weights.strategy}, {weights.pool} pool, {weights.scored} {weights.unit}s scored"]
    if weights.fused_nll is not None:
        lines.append(f"fused NLL {weights.fused_nll:.4f} nats/{weights.unit}")
    if weights.gap is not None:
        lines[-1] += f", at most {weights.gap:.1e} above the optimum (gap)"
    if weights.note:
        lines.append(weights.note)
    console.print(Text("\n".join(lines), style="dim"))


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 1e4 else f"{value:.2e}"
