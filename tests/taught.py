"""Members that were taught what to answer to which conversation: an engine that spells the answer token by token. It
keeps nothing beside the ids, so that any number of requests may share it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache

import torch
from conftest import CORPUS, _config, byte_level_tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from packllm import Member, Pack
from packllm.chat.prompt import Encoder
from packllm.engines import base
from packllm.engines.base import Read

SURE, KNOWN = 0.999, 0.1
"""The probability of each token of what was taught, and of each token of a prompt."""


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
        if isinstance(read.want, str):
            places = {"last": range(len(ids))[-1:], "none": range(0)}.get(read.want, range(len(ids)))
            follows = [*sequence.ids[before + 1 :], self._end]
            rows = [self._row(sequence.ids[: before + place + 1], start, follows[place]) for place in places]
            return torch.stack(rows) if rows else torch.empty(0, self.vocabulary_size)
        given = [math.nan if target < 0 else math.log(KNOWN) for target in read.want]
        for place in range(max(0, start - before - 1) if start else len(ids), len(ids)):
            given[place] = float(self._row(sequence.ids[: before + place + 1], start, 0)[read.want[place]])
        return torch.tensor(given, dtype=torch.float64)

    def _start(self, ids: Sequence[int]) -> int | None:
        """Where the answer under way begins."""
        size = len(self._opening)
        last = next((at for at in range(len(ids) - 1, -1, -1) if ids[at] == self._opening[0]), None)
        return last + size if last is not None and ids[last : last + size] == self._opening else None

    def _row(self, ids: Sequence[int], start: int | None, follows: int) -> Tensor:
        """(V,): in an answer, what goes on with it; else what `follows`."""
        if start is None or len(ids) < start:
            return self._peak(follows, KNOWN)
        written, answer = self._text(ids[start:]), self._answer(self._conversation(tuple(ids[:start])))
        left = self._ids(answer[len(written) :]) if answer.startswith(written) else []
        return self._peak(left[0] if left else self._end, SURE)

    def _peak(self, token: int, probability: float) -> Tensor:
        row = torch.full((self.vocabulary_size,), math.log((1 - probability) / (self.vocabulary_size - 1)))
        row[token] = math.log(probability)
        return row


@lru_cache(1)
def _tokenizer() -> PreTrainedTokenizerFast:
    """Its vocabulary holds the words of the frameworks' own prompts, where they are installed, as a real one does."""
    return byte_level_tokenizer(3000, [*CORPUS, *_prompts()])


def _prompts() -> Iterator[str]:
    with suppress(ImportError):
        from llama_index.core.prompts import BasePromptTemplate, chat_prompts, default_prompts

        for module in (chat_prompts, default_prompts):
            for prompt in vars(module).values():
                if isinstance(prompt, BasePromptTemplate):
                    yield prompt.get_template()


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
