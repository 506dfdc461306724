"""packllm distill: texts in, an adapter and a table out."""

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
"""One text in so many is held out, by its hash, where no files are given for that."""


def texts(
    files: Sequence[Path], held_out: Sequence[Path], documents: int | None, compared: int | None, seed: int
) -> tuple[list[Document], list[Document]]:
    """Texts to learn and texts to compare on; none is among both.

    Raises:
        DataError: files that cannot be read; nothing to compare on.
    """
    found, others = _read(files), _read(held_out)
    if not held_out:
        others = [one for one in found if int(one.id, 16) % HELD_OUT == 0]
    apart = {one.text for one in others}
    learnt = sample([one for one in found if one.text not in apart], documents, seed, 200)
    if not others:
        raise DataError("none of so few texts is held out to compare on; give more texts, or --held-out FILE")
    return learnt, sample(others, compared, seed, 20)


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
    """Distil, and print what came of it."""
    result = distill(pack, student, documents, held_out, out, training, length=length)
    taught = result.lessons
    weights = ", ".join(f"{name} {weight:.2f}" for name, weight in taught["weights"].items())
    parts = [
        f"The pack taught {taught['tokens']:,} tokens of {taught['texts']} texts ({taught['left_out']} left out); "
        f"mean weights: {weights}; the tokens kept hold {taught['mass']:.1%} of its distributions.",
        "Bits per byte of held-out texts:",
        grid(result.table),
        "\n".join(f"- {_told(one)}" for one in result.closed),
    ]
    content = {
        "lessons": taught,
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
