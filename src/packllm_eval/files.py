"""Where rows come from: lines of a file, gzipped or not, or rows of a hub dataset; and what they are reported under."""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from packllm.errors import DataError, ExtraError

HUB = "hub:"
"""What a dataset's name begins with: hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT (default: test)."""

FOREIGN = (".json", ".csv", ".tsv", ".parquet", ".pdf", ".docx", ".zip")
"""Kinds of files that would pass for text and are none."""


TEXTS = (".txt", ".md", ".jsonl")
"""Kinds of files that are read of a folder, gzipped or not."""


def on_hub(path: Path) -> bool:
    return str(path).startswith(HUB)


def holds_rows(path: Path) -> bool:
    """Whether it is read row by row, not as a text."""
    return on_hub(path) or ".jsonl" in path.name


def names(paths: Sequence[Path]) -> list[str]:
    """What each is reported under; where two would be called the same, the folder (of a dataset: the split) is told.

    Raises:
        DataError: two that cannot be told apart.
    """
    short = [name(path) for path in paths]
    found = [_long(path) if short.count(own) > 1 else own for path, own in zip(paths, short, strict=True)]
    twice = [own for own, count in Counter(found).items() if count > 1]
    if twice:
        raise DataError(f"two of the files are called {twice[0]!r}; rename one, or give it once")
    return found


def name(path: Path) -> str:
    """The file's or dataset's own name, fit to be part of a file's name."""
    if on_hub(path):
        return "-".join(part for part in path.name.removeprefix(HUB).split(":")[:2] if part)
    if path.is_dir():
        return path.resolve().name
    plain = path.name.removesuffix(".gz")
    return next((plain.removesuffix(kind) for kind in TEXTS if plain.endswith(kind)), plain)


def inside(folder: Path) -> list[Path]:
    """The files of a folder and of those in it that can be read, in order; none of hidden ones.

    Raises:
        DataError: there are none.
    """
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name.removesuffix(".gz").endswith(TEXTS)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise DataError(f"the folder {str(folder)!r} holds no .jsonl, .txt or .md file")
    return found


def _long(path: Path) -> str:
    if on_hub(path):
        return "-".join(part for part in str(path).removeprefix(HUB).replace("/", ":").split(":") if part)
    return f"{path.absolute().parent.name}-{name(path)}"


def lines(path: Path) -> Iterator[bytes | dict[str, Any]]:
    """Lines of a file as they are, or rows of a dataset.

    Raises:
        DataError: no such file or dataset, or a damaged one.
        ExtraError: a dataset, and the extra `eval` is not installed.
    """
    if on_hub(path):
        yield from _dataset(str(path).removeprefix(HUB))
        return
    if not path.is_file():
        raise DataError(
            f"{str(path)!r} is no file; give a .jsonl, .txt or .md file, gzipped or not, a folder, or hub:NAME"
        )
    if path.suffix.lower() in FOREIGN:
        raise DataError(
            f"{path.name} is no text; give a .jsonl file (a row a line), or a .txt or .md file, gzipped or not"
        )
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file):
                yield line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path.name} is damaged: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path.name}: {error}") from error


def text(path: Path) -> str:
    """A text file's content; DataError as lines(), and where it is not UTF-8."""
    try:
        return b"".join(line for line in lines(path) if isinstance(line, bytes)).decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8: {error}") from None


def _dataset(spec: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ExtraError("reading a hub dataset", "datasets", "eval") from None
    dataset, config, split = [*spec.split(":", 2), "", ""][:3]
    if not dataset:
        raise DataError("hub: names no dataset; write hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT")
    try:
        return datasets.load_dataset(dataset, config or None, split=split or "test")
    except Exception as error:  # of many kinds: no such dataset, config or split, no network
        raise DataError(f"cannot load dataset {dataset!r}: {str(error).splitlines()[0]}") from error
