"""Sources of rows: lines of a file, plain or gzipped, or rows of a hub dataset; and their names in reports."""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from packllm.errors import DataError, ExtraError

HUB = "hub:"
"""Prefix of a dataset's name: hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT (default: test)."""

FOREIGN = (".json", ".csv", ".tsv", ".parquet", ".pdf", ".docx", ".zip")
"""File types that are refused, because they are no plain text."""


TEXTS = (".txt", ".md", ".jsonl")
"""File types that are read from a folder, plain or gzipped."""


def on_hub(path: Path) -> bool:
    return str(path).startswith(HUB)


def holds_rows(path: Path) -> bool:
    """Whether it is read row by row, not as one text."""
    return on_hub(path) or ".jsonl" in path.name


def names(paths: Sequence[Path]) -> list[str]:
    """Names of paths for reports. If two have the same name, their folder (of a dataset: the split) is added.

    Raises:
        DataError: two have the same name nevertheless.
    """
    short = [name(path) for path in paths]
    results = [
        _long(path) if short.count(short_name) > 1 else short_name
        for path, short_name in zip(paths, short, strict=True)
    ]
    twice = [short_name for short_name, count in Counter(results).items() if count > 1]
    if twice:
        raise DataError(f"two of the files are called {twice[0]!r}; rename one, or give it once")
    return results


def name(path: Path) -> str:
    """The file's or dataset's name, valid as a part of a file name."""
    if on_hub(path):
        return "-".join(part for part in path.name.removeprefix(HUB).split(":")[:2] if part)
    if path.is_dir():
        return path.resolve().name
    plain = path.name.removesuffix(".gz")
    return next((plain.removesuffix(kind) for kind in TEXTS if plain.endswith(kind)), plain)


def inside(folder: Path) -> list[Path]:
    """The readable files in a folder and its subfolders, in order, without hidden ones.

    Raises:
        DataError: there are none.
    """
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name.removesuffix(".gz").endswith(TEXTS)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not paths:
        raise DataError(f"the folder {str(folder)!r} contains no .jsonl, .txt or .md file; give another folder")
    return paths


def _long(path: Path) -> str:
    if on_hub(path):
        return "-".join(part for part in str(path).removeprefix(HUB).replace("/", ":").split(":") if part)
    return f"{path.absolute().parent.name}-{name(path)}"


def lines(path: Path) -> Iterator[bytes | dict[str, Any]]:
    """Yield the lines of a file, or the rows of a dataset.

    Raises:
        DataError: there is no such file or dataset, or it is damaged.
        ExtraError: it is a dataset, but the extra `eval` is not installed.
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
    """The content of a text file. DataError as in lines(), or if it is not UTF-8."""
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
    except Exception as error:  # for many reasons: no such dataset, config or split, no network
        raise DataError(f"cannot load dataset {dataset!r}: {str(error).splitlines()[0]}") from error
