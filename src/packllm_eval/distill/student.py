"""The student: a member that learns the pack's distributions, as a LoRA adapter or with all weights, with
transformers' Trainer."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import shutil
import sys
from collections.abc import Collection, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from packllm.engines.member import Member
from packllm.engines.transformers.lora import Factors
from packllm.engines.transformers.precision import fastest
from packllm.errors import ExtraError, OptionError
from packllm_eval.distill.teacher import Lesson

log = logging.getLogger("packllm")

RANK = 16

LEAST = 1e-6
"""Smallest mass of all tokens outside a lesson's top tokens, so that its logarithm is finite."""


@dataclass(frozen=True)
class Training:
    """Training settings.

    Attributes:
        full: train all weights instead of a LoRA adapter.
        rank: of the adapter, on all linear layers, initialised to zero. None: 16; if members are adapters of the
            student, the adapter starts from their mean, with the sum of their ranks.
        epochs: how often every text is learnt.
        batch_size: texts per step.
        rate: highest learning rate; None: 8e-4 for an adapter, 5e-5 for all weights.
        seed: of the adapter's initial weights and the order of texts.

    Raises:
        OptionError: a value out of range.
        ExtraError: an adapter is to be trained, but peft is not installed.
    """

    full: bool = False
    rank: int | None = None
    epochs: int = 2
    batch_size: int = 2
    rate: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "epochs", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise OptionError(f"{name}={value} must be at least 1")
        if self.rate is not None and not 0 < self.rate < 1:
            raise OptionError(f"rate={self.rate} must be between 0 and 1; 8e-4 is usual for an adapter")
        if not self.full and importlib.util.find_spec("peft") is None:
            raise ExtraError("training an adapter", "peft", "distill")

    def check(self, student: Member) -> None:
        """Raise OptionError if this member cannot be trained with these settings."""
        if not hasattr(student.engine, "merged"):
            raise OptionError(f"student={student.name!r} is no local transformers model; only these can be trained")
        if not self.full and student.adapter is not None:
            raise OptionError(
                f"student={student.name!r} is an adapter already; name its base as the student, or train it whole: "
                "full=True, --full"
            )

    @property
    def highest_rate(self) -> float:
        return self.rate if self.rate is not None else 5e-5 if self.full else 8e-4


def train(
    members: Sequence[Member],
    lessons: Sequence[Path],
    ends: Collection[int],
    folder: Path,
    work: Path,
    training: Training,
) -> None:
    """Train the student on lessons and write the result to `folder`. An interrupted run continues at its last
    checkpoint.

    Args:
        members: the pack's members, the student first.
        lessons: files of Lessons.
        ends: the student's end ids; the lessons count them as one, under the first of them.
        folder: for the result.
        work: folder of the checkpoints; those of another training are deleted.
        training: the settings.
    """
    from transformers import Trainer, TrainingArguments
    from transformers.trainer import TRAINER_STATE_NAME
    from transformers.trainer_utils import get_last_checkpoint, set_seed

    settings = json.loads(json.dumps({**asdict(training), "lessons": [path.stem for path in lessons]}))
    state_file, checkpoints = work / "training.json", work / "checkpoints"
    state: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        state = json.loads(state_file.read_text())
    if state.get("settings") != settings:
        shutil.rmtree(checkpoints, ignore_errors=True)
        state = {"settings": settings, "bfloat16": _in_halves(), "done": False}
        state_file.write_text(json.dumps(state))
    if state["done"]:
        return
    set_seed(training.seed)
    model = _trainable(members, training)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=training.epochs,
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.highest_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.0,
        bf16=state["bfloat16"],
        use_cpu=not torch.accelerator.is_available(),
        save_steps=0.1,
        save_total_limit=1,
        logging_steps=0.02,
        report_to=[],
        remove_unused_columns=False,
        seed=training.seed,
        disable_tqdm=not sys.stderr.isatty(),
    )
    loss = Loss(members[0], ends)

    class Learning(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            tensors = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            value = loss(model(**tensors, use_cache=False).logits, inputs["lessons"])
            return (value, None) if return_outputs else value

    trainer = Learning(model, arguments, train_dataset=_Lessons(lessons), data_collator=_together)
    for path in checkpoints.glob("checkpoint-*"):
        if not (path / TRAINER_STATE_NAME).is_file():  # it is written last, so this checkpoint is incomplete
            shutil.rmtree(path)
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    with redirect_stdout(sys.stderr):  # without a terminal the losses are printed line by line
        trainer.train(resume_from_checkpoint=last)
    model.save_pretrained(folder)
    if training.full:
        members[0].tokenizer.save_pretrained(folder)
    state_file.write_text(json.dumps({**state, "done": True}))


class Loss:
    """KL(pack || student) over the top tokens of a lesson, with all others as one token: a lower bound of the full KL.

    Args:
        student: the member whose logits it takes.
        ends: as in train().
    """

    def __init__(self, student: Member, ends: Collection[int] = ()) -> None:
        self._real = student.real
        self._ends = sorted(i for i in ends if i < student.vocabulary_size)

    def __call__(self, logits: Tensor, lessons: Sequence[Lesson]) -> Tensor:
        """Mean nats per token, for logits (batch, n, V)."""
        losses = [self._one(row, lesson) for row, lesson in zip(logits, lessons, strict=True)]
        return torch.cat(losses).mean()

    def _one(self, logits: Tensor, lesson: Lesson) -> Tensor:
        """KL of each place, (t,)."""
        rows = self._real(logits[lesson.places])
        top, pack = lesson.top.to(rows.device), lesson.logprobs.to(rows.device)
        student = rows.gather(-1, top)
        if len(self._ends) > 1:
            student = torch.where(top == self._ends[0], rows[:, self._ends].logsumexp(-1, keepdim=True), student)
        student = student - rows.logsumexp(-1, keepdim=True)
        rest, student_rest = (1 - one.exp().sum(-1) for one in (pack, student))
        rest, student_rest = rest.clamp_min(0), student_rest.clamp_min(LEAST)
        return (pack.exp() * (pack - student)).sum(-1) + rest * (rest.clamp_min(LEAST).log() - student_rest.log())


class _Lessons(torch.utils.data.Dataset):
    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, at: int) -> Lesson:
        return Lesson.load(self._paths[at])


def _together(lessons: Sequence[Lesson]) -> dict[str, Any]:
    """A batch: ids padded on the right, and the lessons."""
    ids = [lesson.ids for lesson in lessons]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
        "lessons": list(lessons),
    }


def _trainable(members: Sequence[Member], training: Training) -> Any:
    """A copy of the first member's model, with the parameters to train."""
    student = members[0]
    model = copy.deepcopy(student.merged())
    if training.full:
        return model.float().requires_grad_(True)
    from peft import LoraConfig, get_peft_model

    experts = [m for m in members if m.engine is student.engine and m.adapter is not None]
    start = _mean(experts) if experts and training.rank is None else {}
    rank = max((down.shape[0] for down, _ in start.values()), default=training.rank or RANK)
    where = sorted(start) or "all-linear"
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=where, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    for name, (down, up) in start.items():
        module: Any = model.get_submodule(f"base_model.model.{name}")
        module.lora_A["default"].weight.data.copy_(down)
        module.lora_B["default"].weight.data.copy_(up / 2)  # lora_alpha doubles it
    return model


def _mean(experts: Sequence[Member]) -> Factors:
    """One adapter equal to the mean of several adapters of one engine."""
    factors_of = [expert.engine.adapters.factors(expert.adapter) for expert in experts]  # type: ignore[attr-defined]
    return {
        name: (
            torch.cat([factors[name][0] for factors in factors_of]),
            torch.cat([factors[name][1] for factors in factors_of], dim=1) / len(factors_of),
        )
        for name in factors_of[0]
    }


def _in_halves() -> bool:
    """Whether matrix products are faster in bfloat16 on this machine."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return not torch.accelerator.is_available() and fastest() == torch.bfloat16
