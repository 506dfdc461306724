"""The teacher: it stores the pack's fused distribution after each token of a text on disk."""

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
"""Number of top tokens stored per distribution; the rest is one mass (docs/results.md has the loss by this)."""

FIRST = 32
"""Tokens that all members read; members without weight after them stop reading."""


@dataclass(frozen=True)
class Lesson:
    """A text in the student's tokens with the pack's distributions.

    Attributes:
        ids: int64 (n,), the text in the student's ids.
        places: int64 (t,), indices of the ids after which there is a distribution.
        top: int64 (t, TOP), the most likely ids there.
        logprobs: float32 (t, TOP), their log-probabilities.
    """

    ids: Tensor
    places: Tensor
    top: Tensor
    logprobs: Tensor

    def save(self, path: Path) -> None:
        arrays = {"ids": self.ids.int(), "places": self.places.int(), "top": self.top.int()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({**arrays, "logprobs": self.logprobs.half()}, path)

    @classmethod
    def load(cls, path: Path) -> Lesson:
        arrays = load_file(path)
        return cls(arrays["ids"].long(), arrays["places"].long(), arrays["top"].long(), arrays["logprobs"].float())


def teach(
    members: Sequence[Member], options: Options, documents: Sequence[Document], folder: Path, *, length: int, batch: int
) -> tuple[list[Path], dict[str, Any]]:
    """Let the pack read texts and store its distributions; an interrupted run is continued.

    Args:
        members: the pack's members, in the student's ids, the student first (see in_ids_of).
        options: the pack's.
        documents: the texts.
        folder: where the lessons are stored.
        length: maximum tokens of a text.
        batch: texts per training step; at least so many texts are needed.

    Returns:
        Files of the lessons; and "texts", "tokens", "left_out", the mean "weights" of the members, and the mean "mass"
        of the top tokens.

    Raises:
        DataError: fewer usable texts than a batch; the folder has the lessons of another run.
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
    statistics = {
        "texts": len(good),
        "tokens": tokens,
        "left_out": len(reasons),
        "weights": {m.name: sum(r["weights"].get(m.name, 0.0) for r in good) / len(good) for m in members},
        "mass": sum(record["mass"] * record["tokens"] for record in good) / tokens,
    }
    return [folder / "lessons" / f"{record['id']}.safetensors" for record in good], statistics


def _enough(count: int, batch: int, what: str, remedy: str) -> None:
    if count < batch:
        raise DataError(f"{what} {count} texts, fewer than batch_size={batch}; {remedy}, or lower batch_size")


def in_ids_of(student: Member, members: Sequence[Member]) -> list[Member]:
    """The members, the student first; those with other vocabularies are mapped to its ids by MinED."""
    others = [member for member in members if member is not student]
    return [
        student,
        *(m if m.vocabulary.akin(student.vocabulary) else translated([m], student)[0] for m in others),
    ]


def read(members: Sequence[Member], text: str, length: int, options: Options) -> tuple[Lesson, dict[str, float]]:
    """The fused distributions of members (the student first) over a text under its weights; and the weights by name.

    Raises:
        DataError: the text is too short.
    """
    encoder = members[0].encoder
    if len(encoder.encode(text).positions) < 2:
        raise DataError(f"the text {text[:40]!r} is too short; give texts of several sentences")
    text = text[: cut_after(encoder, text, length)]
    head = text[: cut_after(encoder, text, FIRST)]
    encoded = encoder.encode(text)
    running = list(range(len(members)))
    plain = options.weighting == "em" and getattr(options, "prior", None) is None  # other options may name all members
    if plain and len(head) < len(text) and len(members) > 1:
        with Reading(members, [head], keep=False) as reading:
            running = [k for k, weight in enumerate(reading.weights(options, running).values) if weight]
        if shared_by(members):  # the shared ids are the first member's
            running = sorted({0, *running})
    with Reading([members[k] for k in running], [text]) as reading:
        weights = reading.weights(options, range(len(running)))
        places = torch.tensor(encoded.positions) - 1
        tops = [_top(block[:, : members[0].vocabulary_size]) for block in reading.fused(weights)]
    top, logprobs = (torch.cat(parts) for parts in zip(*tops, strict=True))
    lesson = Lesson(torch.tensor(encoded.ids), places[-len(top) :], top, logprobs)
    return lesson, dict(zip(weights.names, weights.values, strict=True))


def _top(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely ids of rows float32 (b, V), and their log-probabilities."""
    top = rows.topk(min(TOP, rows.shape[-1]))
    return top.indices.cpu(), top.values.cpu()
