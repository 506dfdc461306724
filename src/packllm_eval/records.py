"""Results on disk, a line a row: a run that was interrupted goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

try:
    import fcntl
except ImportError:  # no such locks on this system: two runs are not told apart
    fcntl = None  # type: ignore[assignment]

from tqdm import tqdm

from packllm.errors import DataError, MemberError, PromptError
from packllm.progress import SLOW
from packllm_eval.rows import Document, Question

LEFT_OUT = (DataError, PromptError, MemberError)
"""What is wrong with a row; every other error is one of the run, and ends it."""

Row = TypeVar("Row", Document, Question)


class Records:
    """A .jsonl file: a header that says what was asked for, then one record a row.

    A last line that was cut short by a kill is dropped; everything before it is kept. Open in one run at a time.

    Args:
        path: the file; made, with its folder, where it does not exist.
        header: what the records depend on, JSON-safe.

    Attributes:
        rows: the records so far, by id.

    Raises:
        DataError: the file holds the results of another question, or another run writes to it.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path, self.rows = path, dict[str, dict[str, Any]]()
        header = json.loads(json.dumps(header))
        self._file = _opened(path)
        try:
            kept = self._read(header)
            self._file.truncate(kept)
            if not kept:
                self._write(header)
        except BaseException:
            self._file.close()
            raise

    def _read(self, header: dict[str, Any]) -> int:
        """Reads what is there; the number of bytes to keep."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = 0
        for at, line in enumerate(lines):
            if not line.endswith(b"\n") and (at or _line(header).startswith(line)):
                break
            try:
                record = json.loads(line)
                if at == 0:
                    self._compare(record, header)
                else:
                    self.rows[record["id"]] = record
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                if isinstance(error, DataError):
                    raise
                raise DataError(f"{str(self.path)!r} line {at + 1} is no record; delete or move that file") from None
            kept += len(line)
        return kept

    def _compare(self, found: dict[str, Any], header: dict[str, Any]) -> None:
        differs = [name for name in {**found, **header} if found.get(name) != header.get(name)]
        if differs:
            raise DataError(
                f"{str(self.path)!r} holds results for another {', '.join(sorted(differs))}; "
                f"name another folder for this run, or delete that file"
            )

    def add(self, record: dict[str, Any]) -> None:
        """File a record (it has an "id"); on disk when this returns."""
        if self.rows.get(record["id"]) != record:
            self._write(record)
        self.rows[record["id"]] = record

    def _write(self, content: dict[str, Any]) -> None:
        self._file.write(_line(content))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder of results, made where it does not exist, for one run.

    Raises:
        DataError: another run holds it. Where that was killed, it does not any more.
    """
    with _opened(folder / ".lock"):
        yield


def _opened(path: Path) -> IO[bytes]:
    """A file to append to, its folder made, that is no other run's while it is open."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")  # noqa: SIM115 (the caller closes it)
    except OSError as error:
        raise DataError(f"{str(path.parent)!r} cannot be a folder of records: {error.strerror}") from None
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when the process ends
    except BlockingIOError:
        file.close()
        raise DataError(f"another run writes to {str(path.parent)!r}; wait for it, or name another folder") from None
    except OSError:
        pass  # a file system without locks
    return file


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"


def run(
    rows: Sequence[Row], work: Callable[[Row], dict[str, Any]], path: Path, header: dict[str, Any], name: str
) -> list[dict[str, Any]]:
    """A record of each row, in order: those on disk as they are, the others worked out and filed, with a bar. Rows
    that were left out are tried again: what kept them out may have been mended."""
    return run_together(rows, 1, lambda group: [work(group[0])], path, header, name)


def run_together(
    rows: Sequence[Row],
    size: int,
    work: Callable[[Sequence[Row]], list[dict[str, Any]]],
    path: Path,
    header: dict[str, Any],
    name: str,
) -> list[dict[str, Any]]:
    """The same where up to `size` rows are worked out at a time."""
    with Records(path, header) as records:
        missing = [row for row in rows if "left_out" in records.rows.get(row.id, {"left_out": None})]
        with tqdm(
            total=len(rows), initial=len(rows) - len(missing), desc=name, unit="row", disable=None, delay=SLOW
        ) as bar:
            for start in range(0, len(missing), size):
                group = missing[start : start + size]
                for row, record in zip(group, work(group), strict=True):
                    records.add({"id": row.id, "corpus": row.corpus, **record})
                bar.update(len(group))
        return [records.rows[row.id] for row in rows]


def read(path: Path) -> list[dict[str, Any]]:
    """The complete records of a file, without its header; the last where there are several of a row."""
    lines = path.read_bytes().splitlines(keepends=True)[1:]
    found = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return list({record["id"]: record for record in found}.values())
