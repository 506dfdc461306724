"""packllm distill: it reads texts, and writes an adapter and a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import typer
from rich.console import Console
from rich.markdown import Markdown

from packllm.errors import DataError
from packllm.pack import Pack
from packllm_eval.distill import WORK, Closed, Training, distill
from packllm_eval.files import names
from packllm_eval.report import grid, write
from packllm_eval.rows import Document, read_documents, sample

HELD_OUT = 10
"""Without files for it, one text in this many is held out, chosen by its hash."""


def texts(
    files: Sequence[Path], held_out: Sequence[Path], documents: int | None, compared: int | None, seed: int
) -> tuple[list[Document], list[Document]]:
    """Texts for training and texts for the comparison, without overlap.

    Raises:
        DataError: a file cannot be read, or no text is left for the comparison.
    """
    all_texts, compared_texts = _read(files), _read(held_out)
    if not held_out:
        compared_texts = [one for one in all_texts if int(one.id, 16) % HELD_OUT == 0]
    excluded = {one.text for one in compared_texts}
    training = sample([one for one in all_texts if one.text not in excluded], documents, seed, 200)
    if not compared_texts:
        raise DataError("too few texts: none was held out for the comparison; give more texts, or --held-out FILE")
    return training, sample(compared_texts, compared, seed, 20)


def _read(paths: Sequence[Path]) -> list[Document]:
    return [row for path, name in zip(paths, names(paths), strict=True) for row in read_documents(path, "raise", name)]


def run(
    pack: Pack,
    student: str,
    documents: Sequence[Document],
    held_out: Sequence[Document],
    out: Path,
    training: Training,
    length: int,
    as_json: bool,
) -> None:
    """Distil, and print the results."""
    result = distill(pack, student, documents, held_out, out, training, length=length)
    statistics = result.lessons
    weights = ", ".join(f"{name} {weight:.2f}" for name, weight in statistics["weights"].items())
    parts = [
        f"The pack taught {statistics['tokens']:,} tokens of {statistics['texts']} texts ({statistics['left_out']} "
        f"left out); mean weights: {weights}; the tokens kept hold {statistics['mass']:.1%} of its distributions.",
        "Bits per byte of held-out texts:",
        grid(result.table),
        "\n".join(f"- {_told(one)}" for one in result.closed),
    ]
    content = {
        "lessons": statistics,
        "closed": [{**asdict(one), "share": one.share} for one in result.closed],
        "table": [entry.as_dict() for entry in result.table],
    }
    write(out / WORK, "Distillation", parts, content)
    if as_json:
        typer.echo(json.dumps({"folder": str(out), **content}))
    else:
        Console().print(Markdown("\n\n".join(parts)))
        typer.echo(json.dumps({"folder": str(out), "report": str(out / WORK)}))


def _told(one: Closed) -> str:
    if one.share is None:
        return f"{one.corpus}: {one.before:.4f} -> {one.after:.4f}; the pack, {one.pack:.4f}, has nothing to teach"
    return f"{one.corpus}: {one.before:.4f} -> {one.after:.4f}, {one.share:.0%} of the way to the pack's {one.pack:.4f}"
