"""What is evaluated on: documents and questions, read from files or hub datasets and checked row by row."""

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
"""What to do with a malformed row: refuse the file, or leave the row out and say so."""

DOCUMENT_CHARS = 2000
"""A text file is cut into documents of whole paragraphs, at most about this long."""


@dataclass(frozen=True)
class Document:
    """A text to model.

    Attributes:
        id: what its results are filed under: a hash of corpus and text.
        corpus: what it is reported under: the row's `domain`, or the file's name.
        text: at least one character that is not a space.
    """

    id: str
    corpus: str
    text: str


@dataclass(frozen=True)
class Question:
    """A question, with choices (multiple choice) or without (generation).

    Attributes:
        id: what its results are filed under: a hash of corpus and content, the answer too.
        corpus: the file's name.
        question, context: `context` may be empty.
        choices: empty for generation.
        answer: index of the right choice, or the right answer as text.
        subject, split: as in MMLU; empty where the row has none.
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
    .gz too. Of a folder: those of all such files in it, as one corpus.

    Args:
        corpus: what they are reported under, where a row has no `domain`; None: the file's name.

    Raises:
        DataError: no such file or dataset, a malformed row (named by line) unless bad="skip", or nothing in it.
        ExtraError: a dataset, and the extra `eval` is not installed.
    """
    name = corpus or files.name(path)

    def found(path: Path) -> list[Document]:
        if files.holds_rows(path):
            return list(_rows(path, bad, lambda row: _document(row, name)))
        return [Document(_key(name, text), name, text) for text in cut(files.text(path))]

    return _some(_all(path, found), path)


def read_questions(path: Path, bad: Bad = "raise", choices: bool = True, corpus: str | None = None) -> list[Question]:
    """Questions of a .jsonl file, `.gz` too, or of a hub dataset: rows with `question`, `choices` (a list) and `answer`
    (an index, or a letter), or without choices and with `answer` as text; `context`, `subject` and `split` where
    there are any. ARC's form, `choices` {"text", "label"} and `answerKey`, is read as well. Of a folder: of all files.

    Raises:
        DataError, ExtraError: as read_documents; also an answer out of range.
    """
    name = corpus or files.name(path)
    return _some(_all(path, lambda path: list(_rows(path, bad, lambda row: _question(row, name, choices)))), path)


def sample(rows: Sequence[Row], count: int | None, seed: int, default: int) -> list[Row]:
    """`count` rows of each corpus, drawn by the seed; None: `default`, or all where there are fewer.

    Raises:
        DataError: a corpus has fewer than `count` rows.
    """
    drawn: list[Row] = []
    for corpus in dict.fromkeys(row.corpus for row in rows):
        # The same text twice would be filed once.
        pool = list({row.id: row for row in rows if row.corpus == corpus}.values())
        if count is not None and count > len(pool):
            raise DataError(f"{corpus!r} has {len(pool)} rows, fewer than the {count} asked for; ask for fewer")
        wanted = min(default, len(pool)) if count is None else count
        drawn += random.Random(f"{seed} {corpus}").sample(pool, wanted)
    return drawn


def cut(text: str) -> Iterator[str]:
    """Documents of whole paragraphs, about DOCUMENT_CHARS long; a longer paragraph is one of its own."""
    held: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        if not paragraph.strip():
            continue
        if held and sum(map(len, held)) + len(paragraph) > DOCUMENT_CHARS:
            yield "\n\n".join(held)
            held = []
        held.append(paragraph.strip("\n"))
    if held:
        yield "\n\n".join(held)


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
    told = answer = row.get("answer", row.get("answerKey"))
    if not isinstance(question, str) or not question.strip():
        raise ValueError("no question")
    if wants_choices:
        if isinstance(choices, dict):
            labels, choices = choices.get("label"), choices.get("text")
            answer = labels.index(told) if isinstance(labels, list) and told in labels else None
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise ValueError("'choices' must be a list of at least two texts")
        if isinstance(answer, str) and re.fullmatch("[A-Z]", answer):
            answer = ord(answer) - ord("A")
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise ValueError(f"answer={told!r} is none of 0..{len(choices) - 1} (a number), and no letter of them")
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
                raise DataError(f"{path.name} line {number}: {reason}; mend it, or skip bad rows") from None
            log.warning("%s line %d left out: %s", path.name, number, reason)


def _all(path: Path, found: Callable[[Path], list[Row]]) -> list[Row]:
    """What is found in a file, or in all files of a folder."""
    paths = files.inside(path) if not files.on_hub(path) and path.is_dir() else [path]
    return [row for one in paths for row in found(one)]


def _some(rows: list[Row], path: Path) -> list[Row]:
    if not rows:
        raise DataError(f"{path.name} holds nothing to evaluate on")
    return rows


def _key(*parts: str) -> str:
    """A hash of the content: records of other content are never taken for its own. ValueError where a text holds
    half a surrogate pair, which no tokenizer reads."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
