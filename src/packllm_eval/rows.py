"""Data for evaluation: documents and questions, read from files or hub datasets and checked row by row."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from packllm.errors import DataError
from packllm_eval import files

log = logging.getLogger("packllm")

Bad = Literal["raise", "skip"]
"""What to do with a malformed row: refuse the file, or skip the row with a warning."""

DOCUMENT_CHARS = 2000
"""Maximum length of the documents that a text file is split into, except single long paragraphs."""


@dataclass(frozen=True)
class Document:
    """A text to model.

    Attributes:
        id: key of its results: a hash of corpus and text.
        corpus: its corpus in reports: the row's `domain`, or the file's name.
        text: at least one character that is not white space.
    """

    id: str
    corpus: str
    text: str


@dataclass(frozen=True)
class Question:
    """A question, with choices (multiple choice) or without (generation).

    Attributes:
        id: key of its results: a hash of corpus and content, including the answer.
        corpus: the file's name.
        question, context: `context` may be empty.
        choices: empty for generation.
        answer: index of the right choice, or the right answer as text.
        subject, split: as in MMLU; "" if the row has none.
    """

    id: str
    corpus: str
    question: str
    choices: tuple[str, ...]
    answer: int | str
    context: str = ""
    subject: str = ""
    split: str = ""


Row = TypeVar("Row", Document, Question)


def read_documents(path: Path, bad: Bad = "raise", corpus: str | None = None) -> list[Document]:
    """Documents of a .jsonl file or a hub dataset (rows with `text`, or `question` and `answer`), or of a text file;
    also gzipped. Of a folder: the documents of all such files in it, as one corpus.

    Args:
        path: file, folder or dataset.
        bad: what to do with malformed rows.
        corpus: their corpus in reports, for rows without `domain`; None: the file's name.

    Raises:
        DataError: no such file or dataset, a malformed row (named by line) unless bad="skip", or no documents.
        ExtraError: it is a dataset, but the extra `eval` is not installed.
    """
    name = corpus or files.name(path)

    def read_file(path: Path) -> list[Document]:
        if files.holds_rows(path):
            return list(_rows(path, bad, lambda row: _document(row, name)))
        return [Document(_key(name, text), name, text) for text in cut(files.text(path))]

    return _some(_all(path, read_file), path)


def read_questions(path: Path, bad: Bad = "raise", choices: bool = True, corpus: str | None = None) -> list[Question]:
    """Questions of a .jsonl file, plain or gzipped, or of a hub dataset: rows with `question`, `choices` (a list) and
    `answer` (an index, or a letter), or without choices and with `answer` as text; optionally `context`, `subject` and
    `split`. ARC's format, `choices` {"text", "label"} and `answerKey`, is read too. Of a folder: of all its files.

    Raises:
        DataError, ExtraError: as read_documents; also for an answer out of range.
    """
    name = corpus or files.name(path)
    return _some(_all(path, lambda path: list(_rows(path, bad, lambda row: _question(row, name, choices)))), path)


def sample(rows: Sequence[Row], count: int | None, seed: int, default: int) -> list[Row]:
    """`count` rows of each corpus, drawn with the seed; None: `default` rows, or all if there are fewer.

    Raises:
        DataError: a corpus has fewer than `count` rows.
    """
    rows_: list[Row] = []
    for corpus in dict.fromkeys(row.corpus for row in rows):
        # Equal rows have one id, and so one result.
        pool = list({row.id: row for row in rows if row.corpus == corpus}.values())
        if count is not None and count > len(pool):
            raise DataError(f"{corpus!r} has {len(pool)} rows, fewer than the {count} asked for; ask for fewer")
        size = min(default, len(pool)) if count is None else count
        rows_ += random.Random(f"{seed} {corpus}").sample(pool, size)
    return rows_


def cut(text: str) -> Iterator[str]:
    """Documents of whole paragraphs, up to about DOCUMENT_CHARS long; a longer paragraph is a document by itself."""
    paragraphs: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        if not paragraph.strip():
            continue
        if paragraphs and sum(map(len, paragraphs)) + len(paragraph) > DOCUMENT_CHARS:
            yield "\n\n".join(paragraphs)
            paragraphs = []
        paragraphs.append(paragraph.strip("\n"))
    if paragraphs:
        yield "\n\n".join(paragraphs)


def _document(row: dict[str, Any], name: str) -> Document:
    if "text" in row:
        text = row["text"]
    elif "question" in row and "answer" in row:
        text = f"{row['question']}\n\n{row['answer']}"
    else:
        raise ValueError("no field 'text'")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("its text is empty or no text")
    name = str(row.get("domain") or name)
    return Document(_key(name, text), name, text)


def _question(row: dict[str, Any], name: str, wants_choices: bool) -> Question:
    question, choices = row.get("question"), row.get("choices")
    given_answer = answer = row.get("answer", row.get("answerKey"))
    if not isinstance(question, str) or not question.strip():
        raise ValueError("no question")
    if wants_choices:
        if isinstance(choices, dict):
            labels, choices = choices.get("label"), choices.get("text")
            answer = labels.index(given_answer) if isinstance(labels, list) and given_answer in labels else None
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise ValueError("'choices' must be a list of at least two texts")
        if isinstance(answer, str) and re.fullmatch("[A-Z]", answer):
            answer = ord(answer) - ord("A")
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise ValueError(
                f"answer={given_answer!r} must be 0..{len(choices) - 1} (a number) or the letter of a choice"
            )
    elif isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise ValueError("'answer' must be a text or a number")
    else:
        answer = str(answer)
    fields = {field: str(row.get(field) or "") for field in ("context", "subject", "split")}
    key = _key(name, json.dumps([question, choices, answer, *fields.values()], ensure_ascii=False))
    return Question(key, name, question, tuple(choices or ()) if wants_choices else (), answer, **fields)


def _rows(path: Path, bad: Bad, make: Callable[[dict[str, Any]], Row]) -> Iterator[Row]:
    for number, line in enumerate(files.lines(path), 1):
        try:
            row = json.loads(line) if isinstance(line, bytes) else line
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            yield make(row)
        except (ValueError, RecursionError) as error:
            reason = "empty" if isinstance(line, bytes) and not line.strip() else str(error)
            reason = "nested too deeply" if isinstance(error, RecursionError) else reason
            if bad == "raise":
                raise DataError(f"{path.name} line {number}: {reason}; correct it, or skip bad rows") from None
            log.warning("%s line %d left out: %s", path.name, number, reason)


def _all(path: Path, read: Callable[[Path], list[Row]]) -> list[Row]:
    """Apply `found` to a file, or to all files of a folder, and join the results."""
    paths = files.inside(path) if not files.on_hub(path) and path.is_dir() else [path]
    return [row for one in paths for row in read(one)]


def _some(rows: list[Row], path: Path) -> list[Row]:
    if not rows:
        raise DataError(f"{path.name} has no rows to evaluate on; give another file")
    return rows


def _key(*parts: str) -> str:
    """A hash of the content, so that records of other content are not taken for its own. ValueError if a text contains
    half of a surrogate pair, which no tokenizer reads."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
