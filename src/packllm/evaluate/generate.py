"""Protocol (c), generation: the pack writes an answer, and its last number (or the text) must be the right one."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packllm.errors import OptionError, PackError
from packllm.evaluate.methods import Method, ready
from packllm.evaluate.records import run_together
from packllm.evaluate.rows import Question
from packllm.pack import Pack

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def prompt_of(question: Question, shots: Sequence[Question] = ()) -> str:
    """Worked examples, then the question, each as "Question: ...\\nAnswer: ..."."""
    told = "".join(f"Question: {_asked(shot)}\nAnswer: {shot.answer}\n\n" for shot in shots)
    return f"{told}Question: {_asked(question)}\nAnswer:"


def _asked(question: Question) -> str:
    return f"{question.context} {question.question}" if question.context else question.question


def final_answer(text: str) -> str:
    """What an answer comes to: the number after ####, or its last number, or the text in lower case."""
    after = text.rpartition("####")[2] if "####" in text else text
    numbers = _NUMBER.findall(after)
    if not numbers:
        return " ".join(after.lower().split()).rstrip(".")
    number = numbers[0 if "####" in text else -1].replace(",", "")
    return f"{float(number):g}"


def evaluate(
    pack: Pack,
    questions: Sequence[Question],
    path: Path,
    *,
    methods: Sequence[Method | str] | None = None,
    shots: Sequence[Question] = (),
    max_tokens: int = 256,
    notes: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """A record of each question: what every method wrote, greedily, and whether it is right. As many questions as
    the pack's `batch_size` are answered together.

    Args:
        pack: the members; its options are the methods' defaults.
        questions: with answers as text; see rows.read_questions(choices=False).
        path, methods, notes: as in lm.evaluate.
        shots: worked examples before each question.
        max_tokens: most tokens of an answer; it also ends before the next "Question:".

    Returns:
        Records: id, corpus, `answer`, `methods` {label: {"text", "right", "weights", "tokens", "seconds"}}, the
        seconds those of a batch divided by its questions; or `left_out`, the reason.
    """
    checked = ready(pack, methods)
    packs = {m.label: Pack([pack.members[k] for k in m.members]) for m in checked}
    header = {
        "protocol": "generate",
        "members": [member.name for member in pack.members],
        "fingerprint": pack.fingerprint,
        "methods": [m.label for m in checked],
        "shots": [shot.id for shot in shots],
        "max_tokens": max_tokens,
        **(notes or {}),
    }

    def work(group: Sequence[Question]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [
            {"answer": final_answer(str(question.answer)), "methods": {}} for question in group
        ]
        for method in checked:
            options = method.options.model_dump(exclude_unset=True)
            options.update(max_tokens=max_tokens, stop=("\nQuestion:", "\n\n"))
            started = time.perf_counter()
            try:
                answers = packs[method.label].generate_batch([prompt_of(each, shots) for each in group], **options)
            except OptionError:
                raise
            except PackError as error:  # of one of them: which one shows where each is alone
                if len(group) == 1:
                    return [{"left_out": f"{method.label}: {error}"}]
                return [record for question in group for record in work([question])]
            seconds = (time.perf_counter() - started) / len(group)
            for record, answer in zip(found, answers, strict=True):
                record["methods"][method.label] = {
                    "text": answer.text,
                    "right": final_answer(answer.text) == record["answer"],
                    "weights": dict(zip(answer.weights.names, answer.weights.values, strict=True)),
                    "tokens": answer.usage.completion_tokens,
                    "seconds": seconds,
                }
        return found

    return run_together(questions, pack.options.batch_size, work, path, header, "Questions")
