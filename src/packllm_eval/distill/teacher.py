"""The teacher: what the pack's fused distribution says after each token of a text, kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from packllm.decode.mined import translated
from packllm.decode.tokens import shared_by
from packllm.engines.member import Member
from packllm.errors import DataError
from packllm.options import Options
from packllm_eval.reading import Reading, cut_after
from packllm_eval.records import LEFT_OUT, run
from packllm_eval.rows import Document

TOP = 64
"""Tokens of each distribution that are kept, and the mass of all others as one (docs/results.md tells what is lost)."""

FIRST = 32
"""Tokens that all members read; those without weight by then do not read on."""


@dataclass(frozen=True)
class Lesson:
    """A text as the student reads it, and what the pack says of it.

    Attributes:
        ids: int64 (n,), the text in the student's ids.
        places: int64 (t,), after which of them the pack says what follows.
        top: int64 (t, TOP), ids that are likeliest there.
        logprobs: float32 (t, TOP), theirs.
    """

    ids: Tensor
    places: Tensor
    top: Tensor
    logprobs: Tensor

    def save(self, path: Path) -> None:
        kept = {"ids": self.ids.int(), "places": self.places.int(), "top": self.top.int()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({**kept, "logprobs": self.logprobs.half()}, path)

    @classmethod
    def load(cls, path: Path) -> Lesson:
        found = load_file(path)
        return cls(found["ids"].long(), found["places"].long(), found["top"].long(), found["logprobs"].float())


def teach(
    members: Sequence[Member], options: Options, documents: Sequence[Document], folder: Path, *, length: int, batch: int
) -> tuple[list[Path], dict[str, Any]]:
    """Let the pack read texts; a run that was interrupted goes on.

    Args:
        members: the pack's, in the ids of the student, which is the first of them (see in_ids_of).
        options: the pack's.
        documents: the texts.
        folder: where the lessons are kept.
        length: most tokens of a text.
        batch: the fewest texts that the student can learn from.

    Returns:
        Files of the lessons; and "texts", "tokens", "left_out", the mean "weights" of the members, and the mean "mass"
        of the tokens kept.

    Raises:
        DataError: fewer usable texts than a batch; the folder holds the lessons of another run.
    """
    _enough(len(documents), batch, "the corpus has", "give more texts")
    header = {
        "members": [member.name for member in members],
        "fingerprints": [member.fingerprint for member in members],
        "options": options.model_dump(mode="json", exclude_defaults=True),
        "length": length,
        "top": TOP,
    }

    def work(document: Document) -> dict[str, Any]:
        try:
            lesson, weights = read(members, document.text, length, options)
        except LEFT_OUT as error:
            return {"left_out": str(error)}
        lesson.save(folder / "lessons" / f"{document.id}.safetensors")
        mass = float(lesson.logprobs.exp().sum(-1).mean())
        return {"tokens": len(lesson.places), "weights": weights, "mass": mass}

    records = run(documents, work, folder / "lessons.jsonl", header, "The pack reads")
    good = [record for record in records if "left_out" not in record]
    reasons = [record["left_out"] for record in records if "left_out" in record]
    _enough(len(good), batch, f"{len(reasons)} of {len(records)} texts cannot be used ({(reasons or [''])[0]}), which "
            "leaves", "give longer texts or more of them")  # fmt: skip
    tokens = sum(record["tokens"] for record in good)
    told = {
        "texts": len(good),
        "tokens": tokens,
        "left_out": len(reasons),
        "weights": {m.name: sum(r["weights"].get(m.name, 0.0) for r in good) / len(good) for m in members},
        "mass": sum(record["mass"] * record["tokens"] for record in good) / tokens,
    }
    return [folder / "lessons" / f"{record['id']}.safetensors" for record in good], told


def _enough(count: int, batch: int, what: str, remedy: str) -> None:
    if count < batch:
        raise DataError(f"{what} {count} texts, fewer than batch_size={batch}; {remedy}, or lower batch_size")


def in_ids_of(student: Member, members: Sequence[Member]) -> list[Member]:
    """The members, the student first, and those of other vocabularies in its ids, through MinED."""
    others = [member for member in members if member is not student]
    return [
        student,
        *(m if m.vocabulary.akin(student.vocabulary) else translated([m], student)[0] for m in others),
    ]


def read(members: Sequence[Member], text: str, length: int, options: Options) -> tuple[Lesson, dict[str, float]]:
    """What members, the student first among them, say together of a text under the weights that it gives them; and
    these.

    Raises:
        DataError: the text is too short.
    """
    encoder = members[0].encoder
    if len(encoder.encode(text).positions) < 2:
        raise DataError(f"the text {text[:40]!r} is too short to say anything of; give texts of some sentences")
    text = text[: cut_after(encoder, text, length)]
    head = text[: cut_after(encoder, text, FIRST)]
    own = encoder.encode(text)
    running = list(range(len(members)))
    plain = options.weighting == "em" and getattr(options, "prior", None) is None  # what else may name all members
    if plain and len(head) < len(text) and len(members) > 1:
        with Reading(members, [head], keep=False) as reading:
            running = [k for k, weight in enumerate(reading.weights(options, running).values) if weight]
        if shared_by(members):  # the ids that are spoken are the first one's
            running = sorted({0, *running})
    with Reading([members[k] for k in running], [text]) as reading:
        weights = reading.weights(options, range(len(running)))
        places = torch.tensor(own.positions) - 1
        kept = [_top(block[:, : members[0].vocabulary_size]) for block in reading.fused(weights)]
    top, logprobs = (torch.cat(parts) for parts in zip(*kept, strict=True))
    lesson = Lesson(torch.tensor(own.ids), places[-len(top) :], top, logprobs)
    return lesson, dict(zip(weights.names, weights.values, strict=True))


def _top(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities of the likeliest of float32 (b, V)."""
    found = rows.topk(min(TOP, rows.shape[-1]))
    return found.indices.cpu(), found.values.cpu()
