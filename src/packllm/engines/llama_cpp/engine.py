"""An engine that runs a GGUF file in llama.cpp. One llama_decode call serves all sequences of an adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from collections.abc import Sequence as List
from typing import Any

import torch
from torch import Tensor

from packllm.align.vocabulary import Vocabulary
from packllm.engines.base import Prefixes
from packllm.engines.llama_cpp.context import BLOCK, SLOTS, Context, State
from packllm.engines.llama_cpp.model import Model
from packllm.engines.meeting import Meeting
from packllm.engines.passes import Cached, Numbers, Passes, Row
from packllm.machine import settle_threads

PASS_TOKENS, PASS_TOKENS_ELSEWHERE = 256, 4096

PACKING, PACKING_ELSEWHERE = 0.6, 0.01
"""Cost of each further token of a pass, relative to the first. Products with quantized weights gain little from
batching on a CPU: eight tokens of SmolLM2-135M in Q4_1 take 5.3 times as long as one."""


class Sequence(Cached):
    """See Cached.

    Attributes:
        cache: a State, in the context of the sequence's adapter.
    """

    def shorten(self, length: int) -> None:
        self.cache.length = length

    def twin(self) -> State:
        return self.cache.context.fork(self.cache)

    def snapshot(self, cache: State) -> State:
        return cache.context.copied(cache)

    def nbytes(self) -> int:
        return self.cache.nbytes if self.cache is not None else 0


class Engine(Passes[Sequence]):
    """Runs one GGUF file for all members that share it.

    Args:
        model: the weights.
        vocabulary: of the file's tokenizer.
        window: longest sequence in ids; None if the file does not say.
        token_bytes: KV cache bytes of one id.
        fingerprint: hash of the file.
    """

    def __init__(
        self, model: Model, vocabulary: Vocabulary, window: int | None, token_bytes: int, fingerprint: str
    ) -> None:
        settle_threads()
        self._model, self._fingerprint = model, fingerprint
        self._adapters: list[tuple[Any, str, int]] = []
        self._contexts: dict[int | None, Context] = {}
        self.vocabulary_size = min(len(vocabulary), model.vocabulary_size)
        self.context_window, self.token_bytes = window, token_bytes
        self.end_ids = model.end_ids()
        self.size, self.rewinds = model.nbytes, model.rewinds
        self.place = "gpu of llama.cpp" if model.on_gpu else "cpu"
        self.packing = PACKING_ELSEWHERE if model.on_gpu else PACKING
        self.most = PASS_TOKENS_ELSEWHERE if model.on_gpu else PASS_TOKENS
        self.meeting = Meeting.at(self.place)
        self._unused = torch.tensor(sorted(i for i in vocabulary.unused if i < self.vocabulary_size))

    def attach(self, adapter: Any, fingerprint: str, nbytes: int) -> int:
        """Register an adapter, which Model.attach returned, and return its index."""
        self._adapters.append((adapter, fingerprint, nbytes))
        return len(self._adapters) - 1

    @property
    def forwards(self) -> int:
        return sum(context.forwards for context in self._contexts.values())

    @property
    def tokens(self) -> int:
        return sum(context.tokens for context in self._contexts.values())

    def open(self, adapter: int | None = None, prefixes: Prefixes | None = None) -> Sequence:
        return Sequence(self, self.meeting, adapter, prefixes)

    def fingerprint(self, adapter: int | None = None) -> str:
        suffix = "" if adapter is None else self._adapters[adapter][1]
        return hashlib.sha256(f"{self._fingerprint} {suffix}".encode()).hexdigest()

    def held(self, adapter: int | None = None) -> dict[Hashable, int]:
        sizes: dict[Hashable, int] = {id(self): self.size}
        if adapter is not None:
            sizes[id(self), adapter] = self._adapters[adapter][2]
        return sizes

    # One pass (see passes.py)

    def groups(self, rows: List[Row[Sequence]]) -> list[list[Row[Sequence]]]:
        """Rows of one adapter share a group, of at most SLOTS sequences."""
        by_adapter: dict[int | None, list[Row[Sequence]]] = {}
        for row in rows:
            by_adapter.setdefault(row.sequence.adapter, []).append(row)
        return [group[at : at + SLOTS] for group in by_adapter.values() for at in range(0, len(group), SLOTS)]

    def copy_for_cache(self, sequence: Sequence) -> Sequence:
        return sequence.beside(sequence.snapshot(sequence.cache))

    def catch_up(self, sequence: Sequence) -> None:
        if sequence.cache is None:
            sequence.cache = State(self._context(sequence.adapter))
        missing = sequence.ids[sequence.cached :]
        for at in range(0, len(missing), BLOCK):
            block = missing[at : at + BLOCK]
            sequence.cache.context.decode([sequence.cache] * len(block), block, [], len(sequence.ids))
            sequence.cached += len(block)
        if missing and not self.rewinds:
            sequence.remember()

    def compute(self, rows: List[Row[Sequence]], whole: List[int], some: List[int], targets: List[int]) -> Numbers:
        context = self._context(rows[0].sequence.adapter)
        flat = [(row.sequence.cache, i) for row in rows for i in row.ids]
        least = sum(row.sequence.cached + sum(part.job.left for part in row.parts) for row in rows)
        at_whole = {place: index for index, place in enumerate(whole)}
        at_some = {place: index for index, place in enumerate(some)}
        logprobs = torch.empty(len(whole), self.vocabulary_size) if whole else None
        sound, scores = [True] * len(whole), [0.0] * len(some)
        for at in range(0, len(flat), BLOCK):
            block = flat[at : at + BLOCK]
            wanted = [place for place in range(at, at + len(block)) if place in at_whole or place in at_some]
            logits = context.decode([s for s, _ in block], [i for _, i in block], [p - at for p in wanted], least)
            if not wanted:
                continue
            logits = self._real(logits)
            normaliser = logits.logsumexp(-1)
            for row, place in enumerate(wanted):
                if place in at_whole:
                    assert logprobs is not None
                    torch.sub(logits[row], normaliser[row], out=logprobs[at_whole[place]])
                    sound[at_whole[place]] = bool(normaliser[row].isfinite())
            rows_of = [row for row, place in enumerate(wanted) if place in at_some]
            chosen = [targets[at_some[wanted[row]]] for row in rows_of]
            target_logprobs = (logits[rows_of, chosen] - normaliser[rows_of]).tolist() if rows_of else []
            for row, score in zip(rows_of, target_logprobs, strict=True):
                scores[at_some[wanted[row]]] = score
        return Numbers(logprobs, sound, scores)

    def _context(self, adapter: int | None) -> Context:
        if adapter not in self._contexts:
            pointer = None if adapter is None else self._adapters[adapter][0]
            self._contexts[adapter] = Context(self._model, pointer, torch.get_num_threads())
        return self._contexts[adapter]

    def _real(self, logits: Tensor) -> Tensor:
        logits = logits[:, : self.vocabulary_size]
        return logits.index_fill(-1, self._unused, -torch.inf) if len(self._unused) else logits
