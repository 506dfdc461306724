"""An engine and an encoder without torch models or tokenizers: counts of bytes that follow each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from packllm.align.vocabulary import Vocabulary
from packllm.chat.prompt import Encoded, Prompt
from packllm.engines import base
from packllm.engines.base import Read
from packllm.engines.prefix import PrefixCache

END = 256


class ByteSequence(base.Sequence):
    """What was read; `counts`, the distribution after it, is what a closed or forgetful one does not have."""

    def __init__(self, engine: ByteEngine, ids: Sequence[int] = (), prefixes: PrefixCache | None = None) -> None:
        self.engine, self.ids, self.prefixes = engine, list(ids), prefixes
        self.counts: np.ndarray | None = None
        self.closed = False

    def crop(self, length: int) -> None:
        if length < len(self.ids):
            del self.ids[length:]
            self.lose()

    def lose(self) -> None:
        self.counts = None

    def fork(self) -> ByteSequence:
        assert isinstance(self.engine, ByteEngine)
        twin = ByteSequence(self.engine, self.ids)
        twin.counts, twin.gate = self.counts, self.gate
        return twin

    def close(self) -> None:
        self.lose()
        self.closed = True


class ByteEngine(base.Engine):
    """p(x | a, b) = 0.6 f(x | b) + 0.3 f(x | a) + 0.1 f(x), from how often bytes follow each other in a text.

    Attributes:
        forwards, tokens: reads that were answered, and ids that were read for them.
        poison: an id that cannot be read.
    """

    vocabulary_size = 257

    def __init__(self, text: bytes, window: int | None = None) -> None:
        self.context_window = window
        self.end_ids = frozenset([END])
        ids = np.frombuffer(text, np.uint8).astype(np.int64)
        self.single = np.full(257, 0.05) + np.bincount(ids, minlength=257)
        self.next, self.second = np.full((257, 257), 1e-4), np.full((257, 257), 1e-4)
        np.add.at(self.next, (ids[:-1], ids[1:]), 1)
        np.add.at(self.second, (ids[:-2], ids[2:]), 1)
        self.next[ord("."), END] += 3
        self.forwards = self.tokens = 0
        self.poison: int | None = None

    def row(self, ids: Sequence[int]) -> np.ndarray:
        """float32 (257,), log-probabilities after at least one id."""
        shares = [(0.6, self.next[ids[-1]]), (0.1, self.single)]
        if len(ids) > 1:
            shares.append((0.3, self.second[ids[-2]]))
        total = sum(share for share, _ in shares)
        return np.log(sum(share / total * f / f.sum() for share, f in shares)).astype(np.float32)

    def open(self, adapter: int | None = None, prefixes: PrefixCache | None = None) -> ByteSequence:
        return ByteSequence(self, prefixes=prefixes)

    def read(self, reads: Sequence[Read]) -> list[Tensor | Exception]:
        answers: list[Tensor | Exception] = []
        for read in reads:
            try:
                answers.append(self._one(read))
            except Exception as error:
                answers.append(error)
        return answers

    def _one(self, read: Read) -> Tensor:
        sequence, ids = read.sequence, list(read.ids)
        assert isinstance(sequence, ByteSequence)
        sequence.gate()
        if sequence.closed:
            raise ValueError("this sequence is closed")
        if self.poison in ids:
            raise RuntimeError("out of memory")
        prompt = sequence.prefixes is not None and not sequence.ids and bool(ids)
        if prompt and sequence.prefixes is not None:
            found = sequence.prefixes.longest(self, None, ids)
            sequence.cached_tokens = found[1] if found else 0
            sequence.prefixes.note(sequence.cached_tokens)
        read_before = [*sequence.ids]
        rows = [self.row([*read_before, *ids[: n + 1]]) for n in range(len(ids))]
        sequence.ids += ids
        if rows:
            sequence.counts = rows[-1]
        self.forwards += 1
        self.tokens += len(ids) - (sequence.cached_tokens if prompt else 0)
        if prompt and sequence.prefixes is not None:
            sequence.prefixes.keep(None, sequence.fork(), 8 * len(ids))
        whole = torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, 257)
        if read.want == "all":
            return whole
        if read.want == "last":
            return whole[-1:]
        if read.want == "none":
            return whole[:0]
        targets = torch.tensor(list(read.want), dtype=torch.long)
        given = whole.double().gather(-1, targets.clamp_min(0)[:, None])[:, 0]
        return given.masked_fill(targets < 0, torch.nan)


class ByteEncoder:
    """What a pack asks of an encoder (packllm.chat.prompt.Encoder), where every byte is a token."""

    template = "role: content"
    end_of_turn = None
    has_words = False

    def __init__(self) -> None:
        tokens = [*(bytes([byte]) for byte in range(256)), b"<end>"]
        self.vocabulary = Vocabulary(tokens, {"eos": END}, frozenset([END]), frozenset(), frozenset())

    def encode(
        self,
        prompt: Prompt,
        score_on: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        json_schema: Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        window: int | None = None,
    ) -> Encoded:
        parts = [(prompt, True)] if isinstance(prompt, str) else self._chat(prompt)
        ids: list[int] = []
        text, positions, starts, ends = "", [], [], []
        for part, scored in parts:
            for character in part:
                for byte in character.encode():
                    if scored and ids:
                        positions.append(len(ids))
                        starts.append(len(text))
                        ends.append(len(text) + 1)
                    ids.append(byte)
                text += character if scored else ""
        return Encoded(ids, text, positions, starts, ends)

    def _chat(self, messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool]]:
        parts: list[tuple[str, bool]] = []
        for message in messages:
            parts += [
                (f"{message['role']}: ", False),
                (str(message["content"]), message["role"] == "user"),
                ("\n", False),
            ]
        return [*parts, ("assistant:", False)]

    def plain(self, text: str) -> list[int]:
        return list(text.encode())

    continuation = plain

    def starts(self, text: str) -> set[int]:
        return set(range(len(text)))
