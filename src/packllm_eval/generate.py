"""Protocol (c), generation: the pack writes an answer, whose last number (or text) must be the right one."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from packllm.errors import DataError
from packllm.pack import Pack
from packllm_eval.methods import Method, described, largest, ready, singles
from packllm_eval.records import LEFT_OUT, run_together
from packllm_eval.rows import Question

_NUMBER = re.compile(r"(?<![\d.])-?\d[\d,]*(?:\.\d+)?")
_FINAL = "####"
"""Precedes the number in GSM8K's answers."""


def prompt_of(question: Question, shots: Sequence[Question] = ()) -> str:
    """Worked examples, then the question, each as "Question: ...\\nAnswer: ..."."""
    examples = "".join(f"Question: {_asked(shot)}\nAnswer: {shot.answer}\n\n" for shot in shots)
    return f"{examples}Question: {_asked(question)}\nAnswer:"


def _asked(question: Question) -> str:
    return f"{question.context} {question.question}" if question.context else question.question


def final_answer(answer: str) -> str:
    """The essence of a right answer: the number after ####, the number that it consists of, or its text."""
    _, final, rest = answer.rpartition(_FINAL)
    text = _plain(rest)
    number = _NUMBER.search(text) if final else _NUMBER.fullmatch(text.strip("$"))
    return _canonical(number[0]) if number else text


def right(text: str, answer: str) -> bool:
    """Whether a text gives `answer`, the result of final_answer(). A number must be the last one in the text, or the
    first after ####. A text must match completely, except for case, spaces and a full stop."""
    _, final, rest = text.rpartition(_FINAL)
    if not _NUMBER.fullmatch(answer):
        return _plain(rest) == answer
    numbers = _NUMBER.findall(rest)
    return bool(numbers) and _canonical(numbers[0 if final else -1]) == answer


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def _canonical(number: str) -> str:
    """A number without thousands separators and redundant zeros."""
    return f"{Decimal(number.replace(',', '')).normalize() + 0:f}"


def evaluate(
    pack: Pack,
    questions: Sequence[Question],
    path: Path,
    *,
    methods: Sequence[Method | str] | None = None,
    shots: Mapping[str, Sequence[Question]] | None = None,
    max_tokens: int = 256,
    notes: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Compute a record per question: what every member alone ("member NAME") and every method writes, greedily, and
    whether it is right. The pack's `batch_size` questions are answered together.

    Args:
        pack: the members; its options are the methods' defaults.
        questions: with answers as text; see rows.read_questions(choices=False).
        path, methods, notes: as in lm.evaluate.
        shots: worked examples by subject, before each question; see choice.draw().
        max_tokens: maximum tokens of an answer; it also ends before the next "Question:".

    Returns:
        Records: id, corpus, `answer`, `largest`, `methods` {label: {"text", "right", "weights", "tokens",
        "seconds"}}, where the seconds are those of the batch divided by its questions; or `left_out`, the reason.
    """
    checked = ready(pack, methods)
    checked += ready(pack, [m for m in singles(pack) if m.label not in {other.label for other in checked}])
    packs = {m.label: Pack([pack.members[k] for k in m.members]) for m in checked}
    header = {
        "protocol": "generate",
        "members": [member.name for member in pack.members],
        "fingerprint": pack.fingerprint,
        "methods": described(checked),
        "shots": {subject: [shot.id for shot in group_records] for subject, group_records in (shots or {}).items()},
        "max_tokens": max_tokens,
        **(notes or {}),
    }

    def work(group: Sequence[Question]) -> list[dict[str, Any]]:
        group_records: list[dict[str, Any]] = [
            {"answer": final_answer(str(question.answer)), "largest": largest(pack), "methods": {}}
            for question in group
        ]
        prompts = [prompt_of(question, (shots or {}).get(question.subject, ())) for question in group]
        for method in checked:
            options = method.options.model_dump(exclude_unset=True)
            options.update(max_tokens=max_tokens, stop=("\nQuestion:", "\n\n"))
            options["chat_template"] = bool(options.get("chat_template"))  # worked examples are text to continue
            started = time.perf_counter()
            try:
                answers = packs[method.label].generate_batch(prompts, **options)
            except LEFT_OUT as error:  # one of them failed; done alone, each shows whether it was it
                if len(group) == 1:
                    return [{"left_out": f"{method.label}: {error}"}]
                return [record for question in group for record in work([question])]
            seconds = (time.perf_counter() - started) / len(group)
            for record, answer in zip(group_records, answers, strict=True):
                record["methods"][method.label] = {
                    "text": answer.text,
                    "right": right(answer.text, record["answer"]),
                    "weights": dict(zip(answer.weights.names, answer.weights.values, strict=True)),
                    "tokens": answer.usage.completion_tokens,
                    "seconds": seconds,
                }
        return group_records

    ordered = sorted(questions, key=lambda question: question.subject)
    records = run_together(ordered, pack.options.batch_size, work, path, header, "Questions")
    if records and all("left_out" in record for record in records):
        raise DataError(f"no question could be answered; the first: {records[0]['left_out']}")
    return records
