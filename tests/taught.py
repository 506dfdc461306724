"""Members that were taught what to answer to which conversation: an engine that spells the answer token by token. It
keeps nothing beside the ids, so that any number of requests may share it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch
from conftest import _config, byte_level_tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from packllm import Member, Pack
from packllm.chat.prompt import Encoder
from packllm.engines import base
from packllm.engines.base import Read

SURE = 0.999
"""The probability of each token of what was taught. Those of a prompt have 1 / V each."""


class TaughtSequence(base.Sequence):
    def __init__(self, engine: TaughtEngine, ids: Sequence[int] = ()) -> None:
        self.engine, self.ids = engine, list(ids)

    def crop(self, length: int) -> None:
        del self.ids[length:]

    def fork(self) -> TaughtSequence:
        assert isinstance(self.engine, TaughtEngine)
        twin = TaughtSequence(self.engine, self.ids)
        twin.gate = self.gate
        return twin

    def close(self) -> None:
        pass


class TaughtEngine(base.Engine):
    """Args:
        tokenizer: of byte_level_tokenizer.
        answer: from a conversation, as the template writes it, to what is answered.
        window: tokens.

    Attributes:
        asked: the conversations, each once for every request that read it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, answer: Callable[[str], str], window: int) -> None:
        self.vocabulary_size, self.context_window = len(tokenizer), window
        self.end_ids = frozenset([tokenizer.eos_token_id])
        self.asked: list[str] = []
        self._end, self._opening = tokenizer.eos_token_id, tokenizer("<|im_start|>assistant\n").input_ids
        self._text, self._ids, self._answer = tokenizer.decode, Encoder(tokenizer).plain, answer
        self._conversation = lru_cache(64)(tokenizer.decode)

    def open(self, adapter: int | None = None, prefixes: object = None) -> TaughtSequence:
        return TaughtSequence(self)

    def read(self, reads: Sequence[Read]) -> list[Tensor | Exception]:
        return [self._one(read) for read in reads]

    def _one(self, read: Read) -> Tensor:
        sequence, ids = read.sequence, list(read.ids)
        sequence.gate()
        before = len(sequence.ids)
        sequence.ids += ids
        start = self._start(sequence.ids)
        if start is not None and before < start <= len(sequence.ids):
            self.asked.append(self._text(sequence.ids[:start]))
        wanted = {"all": range(len(ids)), "last": range(len(ids) - 1, len(ids)), "none": range(0)}
        places = wanted[read.want] if isinstance(read.want, str) else range(len(ids))
        rows = torch.full((len(places), self.vocabulary_size), -math.log(self.vocabulary_size))
        for row, place in enumerate(places):
            if start is not None and before + place + 1 >= start:
                rows[row] = self._row(sequence.ids[: before + place + 1], start)
        if isinstance(read.want, str):
            return rows
        targets = torch.tensor(list(read.want), dtype=torch.long)
        return rows.double().gather(-1, targets.clamp_min(0)[:, None])[:, 0].masked_fill(targets < 0, torch.nan)

    def _start(self, ids: Sequence[int]) -> int | None:
        """Where the answer under way begins."""
        size = len(self._opening)
        last = next((at for at in range(len(ids) - 1, -1, -1) if ids[at] == self._opening[0]), None)
        return last + size if last is not None and ids[last : last + size] == self._opening else None

    def _row(self, ids: Sequence[int], start: int) -> Tensor:
        written, answer = self._text(ids[start:]), self._answer(self._conversation(tuple(ids[:start])))
        left = self._ids(answer[len(written) :]) if answer.startswith(written) else []
        row = torch.full((self.vocabulary_size,), (1 - SURE) / (self.vocabulary_size - 1))
        row[left[0] if left else self._end] = SURE
        return row.log()


@lru_cache(1)
def _tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer(800)


def taught(answers: Mapping[str, str] | Callable[[str], str], name: str = "taught", window: int = 8192) -> Member:
    """A member that answers.

    Args:
        answers: what to answer to a conversation; or {piece of one: answer}, of which the first that occurs counts.
    """
    tokenizer = _tokenizer()

    def known(conversation: str) -> str:
        return next((said for piece, said in answers.items() if piece in conversation), "I do not know.")

    engine = TaughtEngine(tokenizer, answers if callable(answers) else known, window)
    return Member(name=name, encoder=Encoder(tokenizer), engine=engine)


@lru_cache(4)
def _stranger(window: int) -> Member:
    torch.manual_seed(0)
    config = _config("llama", len(_tokenizer()))
    config.max_position_embeddings = window
    return Member(LlamaForCausalLM(config).eval(), _tokenizer(), "stranger")


def taught_pack(answers: Mapping[str, str] | Callable[[str], str], window: int = 8192, **options: object) -> Pack:
    """A pack of a member that answers and a Llama with random weights; prompts give the first most of the weight."""
    return Pack([taught(answers, window=window), _stranger(window)], **options)


def asked(pack: Pack) -> list[str]:
    """The conversations that the taught member of a pack read, in order."""
    engine = pack.members[0].engine  # type: ignore[attr-defined]
    assert isinstance(engine, TaughtEngine)
    return engine.asked
