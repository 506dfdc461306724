"""Token-by-token fusion across vocabularies through MinED mappings (PackLLM §3.4).

The pack uses the token ids of one member, the reference: the one with the lowest perplexity on the prompt, measured
with its own tokenizer. Every other member reads the reference's ids mapped to its own nearest tokens. Its logits are
mapped back: reference token r gets the logit of the member's token nearest to r. Then Eq. 1 fuses them as usual.

What this does to a text, and why it is never the default:
- The mapping is many-to-one. The member reads a slightly different text: "gets" may become "get", and a character
  without a token becomes another one. A member with few tokens reads little of the text.
- Even where every token matches exactly, the tokens are not those that the member's own tokenizer would produce.
- All reference tokens that map to one token get its logit, so that token's mass counts several times.
- Tokens that no reference token maps to are missing from the fused distribution.
- A member gets a BOS only if the reference has one, and sees the reference's chat template, not its own.
- A special token without a counterpart gets no mass from a member. So a member without an end token of its own never
  ends an answer in the linear pool, and prevents its end in the logarithmic pool.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence as List

import torch
from torch import Tensor

from packllm.align.mined import NONE, alignment
from packllm.align.vocabulary import Vocabulary
from packllm.engines.base import Engine, Prefixes, Read, Sequence, Want
from packllm.engines.member import Member

BLOCK = 64
"""Ids whose full distributions are read at once, where only the targets' log-probabilities are wanted."""


class MinedSequence(Sequence):
    """A sequence that takes another vocabulary's ids.

    Args:
        engine: maps the ids.
        inner: the sequence that reads the mapped ids.
    """

    def __init__(self, engine: MinedEngine, inner: Sequence) -> None:
        self.engine, self.inner, self.ids = engine, inner, []

    def crop(self, length: int) -> None:
        del self.ids[length:]
        self.inner.crop(length)

    def fork(self) -> MinedSequence:
        twin = MinedSequence(self.mined, self.inner.fork())
        twin.ids, twin.gate = list(self.ids), self.gate
        return twin

    def close(self) -> None:
        self.inner.close()

    @property
    def mined(self) -> MinedEngine:
        assert isinstance(self.engine, MinedEngine)
        return self.engine


class MinedEngine(Engine):
    """An engine that takes and predicts another vocabulary's ids: it maps ids before a read and logits after it.

    Args:
        engine: the model's engine, which also serves others in its own ids.
        vocabulary: the model's vocabulary.
        reference: the vocabulary to use.
        size: how many of its ids are used: those that the reference's model predicts.
    """

    def __init__(self, engine: Engine, vocabulary: Vocabulary, reference: Vocabulary, size: int) -> None:
        self.inner, self.vocabulary_size, self.context_window = engine, size, engine.context_window
        self.place, self.rewinds, self.size, self.packing = engine.place, engine.rewinds, engine.size, engine.packing
        self.token_bytes = engine.token_bytes
        mapping = alignment(reference, vocabulary.first(engine.vocabulary_size))
        self._ids = mapping.ids[:size]
        self._list = self._ids.tolist()
        self._absent = mapping.distances[:size] == NONE

    @property
    def requests(self) -> int:  # type: ignore[override]
        return self.inner.requests

    def open(self, adapter: int | None = None, prefixes: Prefixes | None = None) -> MinedSequence:
        return MinedSequence(
            self, self.inner.open(adapter)
        )  # cached prefixes are in the model's own tokens of the text

    def fingerprint(self, adapter: int | None = None) -> str:
        return f"mined {self.inner.fingerprint(adapter)}"

    def read(self, reads: List[Read]) -> list[Tensor | Exception]:
        queues: dict[int, list[tuple[int, slice]]] = {}
        for at, read in enumerate(reads):
            size = len(read.ids)
            all_ids = [slice(0, size)]
            blocks = [slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]
            cuts = all_ids if isinstance(read.want, str) else blocks
            queues.setdefault(id(read.sequence), []).extend((at, cut) for cut in cuts)
        parts: list[list[Tensor]] = [[] for _ in reads]
        failed: dict[int, Exception] = {}
        while any(queues.values()):
            batch = [piece for queue in queues.values() for piece in _next(queue)]
            wants: list[Want] = [want if isinstance(want := reads[at].want, str) else "all" for at, _ in batch]
            inner_reads = [
                Read(reads[at].sequence, reads[at].ids[cut], w) for (at, cut), w in zip(batch, wants, strict=True)
            ]
            for (at, cut), answer in zip(batch, self._rows(inner_reads), strict=True):
                if isinstance(answer, Exception):
                    rest = queues[id(reads[at].sequence)]
                    failed |= dict.fromkeys([at, *(later for later, _ in rest)], answer)
                    rest.clear()
                else:
                    want = reads[at].want
                    parts[at].append(answer if isinstance(want, str) else _target_logprobs(answer, want[cut]))
        nothing = torch.empty(0, dtype=torch.float64)
        return [failed.get(at) or (torch.cat(rows) if rows else nothing) for at, rows in enumerate(parts)]

    def _rows(self, reads: List[Read]) -> list[Tensor | Exception]:
        inner = []
        for read in reads:
            assert isinstance(read.sequence, MinedSequence)
            read.sequence.inner.gate = read.sequence.gate
            inner.append(Read(read.sequence.inner, [self._list[i] for i in read.ids], read.want))
        answers = self.inner.read(inner)
        for read, answer in zip(reads, answers, strict=True):
            if not isinstance(answer, Exception):
                read.sequence.ids += read.ids
        return [answer if isinstance(answer, Exception) else self._gathered(answer) for answer in answers]

    def _gathered(self, rows: Tensor) -> Tensor:
        logits = rows.index_select(-1, self._ids.to(rows.device)).masked_fill(self._absent.to(rows.device), -torch.inf)
        return logits.log_softmax(-1)


def _next(queue: list[tuple[int, slice]]) -> list[tuple[int, slice]]:
    """Remove the next slices from a sequence's queue, about BLOCK ids in total."""
    slices, count = [], 0
    while queue and count < BLOCK:
        slices.append(queue.pop(0))
        count += slices[-1][1].stop - slices[-1][1].start
    return slices


def _target_logprobs(rows: Tensor, targets: List[int]) -> Tensor:
    ids = torch.tensor(targets, dtype=torch.long)
    logprobs = rows.gather(-1, ids.clamp_min(0)[:, None].to(rows.device))[:, 0].double().cpu()
    return logprobs.masked_fill(ids < 0, torch.nan)


def translated(members: List[Member], reference: Member) -> list[Member]:
    """Copies of the members that use the reference's ids; those that shared an engine share one again."""
    engines: dict[int, MinedEngine] = {}
    results = []
    for member in members:
        if id(member.engine) not in engines:
            ids = reference.vocabulary, reference.vocabulary_size
            engines[id(member.engine)] = MinedEngine(member.engine, member.vocabulary, *ids)
        twin = copy.copy(member)
        twin.engine, twin.tokenizer, twin.encoder = engines[id(member.engine)], reference.tokenizer, reference.encoder
        twin.vocabulary, twin.vocabulary_size = reference.vocabulary, reference.vocabulary_size
        twin.end_ids = reference.end_ids
        results.append(twin)
    return results
