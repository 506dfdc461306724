"""Knowledge distillation from the fused distribution of a pack to one member (FuseLLM, arXiv 2401.10491; PackLLM Table
2).

The pack reads each training text once (teacher.py) and its distributions are stored on disk. The student then learns
them with transformers' Trainer (student.py). An interrupted run is continued. TRL's trainers are not used: they expect
a teacher that is one torch module with the student's tokenizer, and run it at every step. A pack is no such module, and
costs more per text than the student's step.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packllm.decode.tokens import shared_by
from packllm.engines.load import Loader
from packllm.engines.member import Member
from packllm.engines.transformers.merged_adapters import merge
from packllm.errors import OptionError, guess
from packllm.pack import Pack
from packllm_eval import lm
from packllm_eval.distill.student import Training, train
from packllm_eval.distill.teacher import TOP, in_ids_of, teach
from packllm_eval.methods import Method
from packllm_eval.records import alone_in
from packllm_eval.rows import Document
from packllm_eval.tables import Entry, lm_table

__all__ = ["TOP", "Closed", "Result", "Training", "distill"]

PACK, NAME = "the pack", "distilled"
WORK = "work"
"""Folder of intermediate results, to continue an interrupted run; not needed after the run."""


@dataclass(frozen=True)
class Closed:
    """The progress of distillation on one corpus, in bits per byte of held-out text.

    Attributes:
        corpus: its name.
        before, after: the student's.
        pack: the pack's.
    """

    corpus: str
    before: float
    after: float
    pack: float

    @property
    def share(self) -> float | None:
        """The share of the gap between student and pack that was closed; None if the pack is no better."""
        return (self.before - self.after) / (self.before - self.pack) if self.before > self.pack else None


@dataclass(frozen=True)
class Result:
    """The result of a distillation.

    Attributes:
        folder: the adapter or model; a spec for Pack.load.
        member: the distilled member.
        table: bits per byte of held-out texts of every member ("member NAME"), including the distilled one, and of the
            pack. A member with another vocabulary has two rows: by itself, and in the student's tokens, as it taught.
        closed: progress by corpus.
        lessons: statistics of the lessons (see teacher.teach).
    """

    folder: Path
    member: Member
    table: list[Entry]
    closed: list[Closed]
    lessons: dict[str, Any]


def distill(
    pack: Pack,
    student: str,
    documents: Sequence[Document],
    held_out: Sequence[Document],
    folder: Path,
    training: Training | None = None,
    *,
    length: int = 512,
) -> Result:
    """Train a member on the pack's distributions over texts, and compare both on other texts.

    Args:
        pack: the teacher, with its own options.
        student: name of the member that learns.
        documents: the training texts.
        held_out: the texts for the comparison.
        folder: where the adapter (or the model) is written. An interrupted run is continued from it.
        training: the training settings; None: the defaults.
        length: maximum tokens of a text, in the student's tokens.

    Raises:
        OptionError: no such member, or one that cannot be trained in this way.
        DataError: fewer usable texts than a batch; the folder belongs to another run.
    """
    training = training or Training()
    names = [member.name for member in pack.members]
    if student not in names:
        raise OptionError(f"student={student!r} is no member{guess(student, names)} Members: {', '.join(names)}")
    learner = pack.models[names.index(student)]
    training.check(learner)
    with alone_in(folder / WORK):
        members, work = in_ids_of(learner, pack.models), folder / WORK
        lessons, statistics = teach(members, pack.options, documents, work, length=length, batch=training.batch_size)
        train(members, lessons, learner.end_ids if shared_by(members) else (), folder, work, training)
        distilled = _loaded(folder, pack, learner, training)
        table = _compared(pack, members, distilled, held_out, work, length)
    closed = [
        Closed(
            corpus,
            _score(table, corpus, f"member {student}"),
            _score(table, corpus, f"member {distilled.name}"),
            _score(table, corpus, PACK),
        )
        for corpus in dict.fromkeys(entry.corpus for entry in table)
    ]
    return Result(folder, distilled, table, closed, statistics)


def _loaded(folder: Path, pack: Pack, learner: Member, training: Training) -> Member:
    """The distilled member as a pack loads it, under a name that no other member has."""
    model: Any = f"{NAME}={folder}"
    if not training.full:
        model = Member(merge(learner.model, str(folder)), learner.tokenizer, NAME, learner.encoder)
    return Loader().members([*pack.members, model])[-1]


def _compared(
    pack: Pack, members: Sequence[Member], distilled: Member, documents: Sequence[Document], work: Path, length: int
) -> list[Entry]:
    """Bits per byte of held-out texts for every member, for members that taught through MinED also in this way, and for
    the pack."""
    names = tuple(member.name for member in pack.members)
    mapped = [copy.copy(member) for member in members if member not in pack.members]
    for member in mapped:
        member.name = f"{member.name} in {members[0].name}'s tokens"
    all_members = Pack([*pack.members, *mapped, distilled], **pack.options.model_dump(exclude_unset=True))
    method = Method(PACK, {"weighting": pack.options.weighting}, names)
    path = work / f"held-out-{distilled.fingerprint[:12]}.jsonl"  # one file per training
    records = lm.evaluate(all_members, documents, path, methods=[method], length=length)
    return lm_table(records, best_of=names)


def _score(table: Sequence[Entry], corpus: str, method: str) -> float:
    return next(entry.score.value for entry in table if (entry.corpus, entry.method) == (corpus, method))
