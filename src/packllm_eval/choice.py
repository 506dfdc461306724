"""Protocol (b), multiple choice: weights from the question only, accuracy of the fused likelihoods (PackLLM §5.1)."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packllm.engines.prefix import PrefixCache
from packllm.errors import DataError, OptionError
from packllm.pack import Pack
from packllm_eval.lm import alone, reads_logits
from packllm_eval.methods import Method, described, largest, ready
from packllm_eval.reading import Reading
from packllm_eval.records import LEFT_OUT, run
from packllm_eval.rows import Question, sample

SAMPLE = 256
"""Questions per task, as in the paper."""


@dataclass(frozen=True)
class Template:
    """The format of a question. The weights see only `question`; if the options are shown, they are in `rest`."""

    question: str
    rest: str


TEMPLATES = {
    "choices": Template("Question: {question}", "\nChoices:{choices}\nAnswer:"),
    "plain": Template("Question: {question}", "\nAnswer:"),
    "continue": Template("{question}", ""),
}
"""Templates by name. `choices` is the paper's for MMLU, ARC, OpenBookQA and PubMedQA, `continue` for USMLE (appendix
C)."""


def pieces(question: Question, template: Template, shots: Sequence[Question]) -> list[str]:
    """The prompt: if the template shows the options, in two pieces, what the weights see and the rest; else in one."""
    examples = "".join(
        f"{_fill(template.question, shot)}{_fill(template.rest, shot)} {shot.choices[int(shot.answer)]}\n\n"
        for shot in shots
    )
    weighed, rest = examples + _fill(template.question, question), _fill(template.rest, question)
    return [weighed, rest] if "{choices}" in template.rest else [weighed + rest]


def _fill(text: str, question: Question) -> str:
    if "{choices}" in text and len(question.choices) > len(string.ascii_uppercase):
        raise DataError(f"{len(question.choices)} choices are more than the letters that name them")
    text_ = f"{question.context} {question.question}" if question.context else question.question
    options = "".join(f" {letter}. {c}" for letter, c in zip(string.ascii_uppercase, question.choices, strict=False))
    return text.format(question=text_, choices=options)


def draw(
    rows: Sequence[Question], count: int | None, shots: int, seed: int
) -> tuple[list[Question], dict[str, list[Question]]]:
    """Draw questions and worked examples from the rows of one task.

    Args:
        rows: of one task.
        count: number of questions; None: SAMPLE, or all if there are fewer.
        shots: number of examples per subject: rows of the split "dev" if the subject has any, otherwise other rows,
            which are then no questions.
        seed: of the draw.

    Returns:
        Questions, and examples by subject.

    Raises:
        DataError: there are fewer rows than requested, or than needed for examples.
    """
    questions = [row for row in rows if row.split != "dev"]
    examples: dict[str, list[Question]] = {}
    for subject in dict.fromkeys(row.subject for row in questions) if shots else ():
        of_subject = [row for row in rows if row.subject == subject]
        pool = [row for row in of_subject if row.split == "dev"] or of_subject
        if len(pool) < shots + (pool is of_subject):  # at least one must remain as a question
            of = f" of subject {subject!r}" if subject else ""
            raise DataError(f"shots={shots} needs more examples: {rows[0].corpus!r} has {len(pool)} rows{of}; lower it")
        examples[subject] = random.Random(f"{seed} {subject}").sample(pool, shots)
    example_ids = {row.id for pool in examples.values() for row in pool}
    questions = [row for row in questions if row.id not in example_ids]
    if not questions:
        raise DataError(f"{rows[0].corpus!r} has only examples (split 'dev'); add questions of another split")
    return sample(questions, count, seed, SAMPLE), examples


def evaluate(
    pack: Pack,
    questions: Sequence[Question],
    path: Path,
    *,
    methods: Sequence[Method | str] | None = None,
    template: str = "choices",
    shots: dict[str, list[Question]] | None = None,
    notes: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Compute a record per question: the log-likelihood of every choice under every member and every method. Questions
    are done subject by subject, so that the worked examples of each are read once.

    Args:
        pack: the members; its options are the methods' defaults.
        questions: with choices; see rows.read_questions and rows.sample.
        path: .jsonl file of the records; an interrupted run is continued from it.
        methods: what to compare (see Method.parse); None for methods.DEFAULT.
        template: a key of TEMPLATES.
        shots: worked examples by subject, see draw(); None for none.
        notes: other facts that the records depend on (the seed of the sample), for the header.

    Returns:
        Records: id, corpus, subject, `answer`, `bytes` of each choice, `members` {name: [nats]}, `largest`, `methods`
        {label: {"nats": [of each choice], "weights"}}; or `left_out`, the reason for leaving it out.

    Raises:
        OptionError, WeightsError: an unknown method, option, member or template, or an invalid fitted file.
        DataError: the file has other results, or no question could be scored.
    """
    if template not in TEMPLATES:
        raise OptionError(f"template={template!r} is unknown; valid: {', '.join(TEMPLATES)}")
    checked = ready(pack, methods)
    header = {
        "protocol": "choice",
        "members": [member.name for member in pack.members],
        "fingerprint": pack.fingerprint,
        "methods": described(checked),
        "template": template,
        "shots": {subject: [shot.id for shot in examples] for subject, examples in (shots or {}).items()},
        **(notes or {}),
    }
    keep = any(reads_logits(m) for m in checked)
    room = pack.options.prefix_cache_mb * 2**20
    prefixes = PrefixCache(room) if shots and room else None

    def work(question: Question) -> dict[str, Any]:
        prompt = pieces(question, TEMPLATES[template], (shots or {}).get(question.subject, []))
        singles = [((k,), alone(pack, k)) for k in range(len(pack.members))]
        try:
            with Reading(pack.models, prompt, keep, prefixes) as reading:
                weighed = [(m.members, reading.weights(m.options, m.members)) for m in checked]
                nats = reading.options([f" {choice}" for choice in question.choices], [*singles, *weighed])
        except LEFT_OUT as error:
            return {"left_out": str(error)}
        return {
            "subject": question.subject,
            "answer": question.answer,
            "bytes": [len(choice.encode()) for choice in question.choices],
            "members": dict(zip((m.name for m in pack.members), nats, strict=False)),
            "largest": largest(pack),
            "methods": {
                m.label: {"nats": scores, "weights": dict(zip(w.names, w.values, strict=True))}
                for m, scores, (_, w) in zip(checked, nats[len(singles) :], weighed, strict=True)
            },
        }

    ordered = sorted(questions, key=lambda question: question.subject)
    records = run(ordered, work, path, header, "Questions")
    if records and all("left_out" in record for record in records):
        raise DataError(f"no question could be scored; the first: {records[0]['left_out']}")
    return records


def right(record: dict[str, Any], nats: Sequence[float], per_byte: bool = False) -> bool:
    """Whether the most likely choice (per byte of it, if per_byte) is the answer; ties go to the earlier choice."""
    scores = [n / b for n, b in zip(nats, record["bytes"], strict=True)] if per_byte else list(nats)
    return max(range(len(scores)), key=scores.__getitem__) == record["answer"]
