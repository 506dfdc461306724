"""Results on disk, one line per row; an interrupted run is continued."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

try:
    import fcntl
except ImportError:  # no file locks on this system: concurrent runs are not detected
    fcntl = None  # type: ignore[assignment]

from tqdm import tqdm

from packllm.errors import DataError, MemberError, PromptError
from packllm.progress import SLOW
from packllm_eval.rows import Document, Question

LEFT_OUT = (DataError, PromptError, MemberError)
"""Errors of a single row. Any other error ends the run."""

Row = TypeVar("Row", Document, Question)


class Records:
    """A .jsonl file: a header with the settings, then one record per row. Only one run may have it open.

    If a killed run left its last line incomplete, this line is dropped.

    Args:
        path: the file; created, with its folder, if it does not exist.
        header: the settings that the records depend on, JSON-safe.

    Attributes:
        rows: the records so far, by id.

    Raises:
        DataError: the file has results of other settings, or another run writes to it.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path, self.rows = path, dict[str, dict[str, Any]]()
        header = json.loads(json.dumps(header))
        self._file = _opened(path)
        try:
            size = self._read(header)
            self._file.truncate(size)
            if not size:
                self._write(header)
        except BaseException:
            self._file.close()
            raise

    def _read(self, header: dict[str, Any]) -> int:
        """Read the existing records; return the number of bytes to keep."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        size = 0
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
            size += len(line)
        return size

    def _compare(self, stored: dict[str, Any], header: dict[str, Any]) -> None:
        differs = [name for name in {**stored, **header} if stored.get(name) != header.get(name)]
        if differs:
            raise DataError(
                f"{str(self.path)!r} has results for another {', '.join(sorted(differs))}; "
                f"name another folder for this run, or delete that file"
            )

    def add(self, record: dict[str, Any]) -> None:
        """Write a record (it has an "id"); it is on disk when this returns."""
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
    """Lock a folder of results for one run; it is created if it does not exist.

    Raises:
        DataError: another run has the lock. A killed run loses it.
    """
    with _opened(folder / ".lock"):
        yield


def _opened(path: Path) -> IO[bytes]:
    """A file to append to, locked for this run while it is open; its folder is created."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")  # noqa: SIM115 (the caller closes it)
    except OSError as error:
        raise DataError(f"{str(path.parent)!r} cannot be a folder of records: {error.strerror}") from None
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system unlocks it when the process ends
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
    """A record of each row, in order. Records on disk are reused, the others computed and written, with a progress bar.
    Rows that were left out are tried again, because the cause may be gone."""
    return run_together(rows, 1, lambda group: [work(group[0])], path, header, name)


def run_together(
    rows: Sequence[Row],
    size: int,
    work: Callable[[Sequence[Row]], list[dict[str, Any]]],
    path: Path,
    header: dict[str, Any],
    name: str,
) -> list[dict[str, Any]]:
    """As run(), with up to `size` rows computed together."""
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
    """The complete records of a file, without its header; the last one if a row has several."""
    lines = path.read_bytes().splitlines(keepends=True)[1:]
    records = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return list({record["id"]: record for record in records}.values())
