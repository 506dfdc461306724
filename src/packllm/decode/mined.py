"""Token-by-token fusion across vocabularies through MinED mappings (PackLLM §3.4).

The pack speaks the token ids of one member, the reference: the one that predicts the prompt best, by its own
tokenizer. Every other member reads the reference's ids mapped to the nearest of its own, and its logits are
gathered back: the reference token r gets the logit of the member's token nearest to r (Eq. 1 then fuses as usual).

What this does to text, and why it is never the default:
- The mapping is many-to-one. What a member reads is not the text but a near miss: "gets" may be read as "get", a
  character that it has no token for as another one. Where its tokens are few, little of the text is left.
- Even where every token matches exactly, the member reads the text in pieces that it would not have cut itself.
- All reference tokens that map to one token share its logit, so the mass of that token counts once for each.
- Tokens that no reference token maps to are lost to the fused distribution.
- A member gets a BOS only where the reference has one, and sees the reference's chat template, not its own.
- A special token without a counterpart gets no mass from a member; one without an end of its own never ends an
  answer in the linear pool, and keeps the logarithmic pool from ending it.
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
"""Ids of which whole rows are read at once, where only targets are asked for."""


class MinedSequence(Sequence):
    """A sequence that takes another vocabulary's ids.

    Args:
        engine: what maps them.
        inner: the sequence that reads them mapped.
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
    """An engine that takes and predicts another vocabulary's ids: mapped on their way in, gathered on their way out.

    Args:
        engine: the model, which goes on serving others in its own ids.
        vocabulary: that model's.
        reference: the vocabulary to speak.
        size: how many of its ids; those that its own model has.
    """

    def __init__(self, engine: Engine, vocabulary: Vocabulary, reference: Vocabulary, size: int) -> None:
        self.inner, self.vocabulary_size, self.context_window = engine, size, engine.context_window
        self.place, self.rewinds, self.size, self.packing = engine.place, engine.rewinds, engine.size, engine.packing
        self.token_bytes = engine.token_bytes
        found = alignment(reference, vocabulary.first(engine.vocabulary_size))
        self._ids = found.ids[:size]
        self._list = self._ids.tolist()
        self._absent = found.distances[:size] == NONE

    @property
    def requests(self) -> int:  # type: ignore[override]
        return self.inner.requests

    def open(self, adapter: int | None = None, prefixes: Prefixes | None = None) -> MinedSequence:
        return MinedSequence(self, self.inner.open(adapter))  # what is kept is kept in the text's own tokens

    def fingerprint(self, adapter: int | None = None) -> str:
        return f"mined {self.inner.fingerprint(adapter)}"

    def read(self, reads: List[Read]) -> list[Tensor | Exception]:
        queues: dict[int, list[tuple[int, slice]]] = {}
        for at, read in enumerate(reads):
            size = len(read.ids)
            whole = [slice(0, size)]
            blocks = [slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]
            cuts = whole if isinstance(read.want, str) else blocks
            queues.setdefault(id(read.sequence), []).extend((at, cut) for cut in cuts)
        parts: list[list[Tensor]] = [[] for _ in reads]
        failed: dict[int, Exception] = {}
        while any(queues.values()):
            now = [piece for queue in queues.values() for piece in _next(queue)]
            wants: list[Want] = [want if isinstance(want := reads[at].want, str) else "all" for at, _ in now]
            asked = [Read(reads[at].sequence, reads[at].ids[cut], w) for (at, cut), w in zip(now, wants, strict=True)]
            for (at, cut), answer in zip(now, self._rows(asked), strict=True):
                if isinstance(answer, Exception):
                    left = queues[id(reads[at].sequence)]
                    failed |= dict.fromkeys([at, *(later for later, _ in left)], answer)
                    left.clear()
                else:
                    want = reads[at].want
                    parts[at].append(answer if isinstance(want, str) else _given(answer, want[cut]))
        nothing = torch.empty(0, dtype=torch.float64)
        return [failed.get(at) or (torch.cat(found) if found else nothing) for at, found in enumerate(parts)]

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
    """Take the next ids of a sequence, about a block of them."""
    taken, count = [], 0
    while queue and count < BLOCK:
        taken.append(queue.pop(0))
        count += taken[-1][1].stop - taken[-1][1].start
    return taken


def _given(rows: Tensor, targets: List[int]) -> Tensor:
    chosen = torch.tensor(targets, dtype=torch.long)
    given = rows.gather(-1, chosen.clamp_min(0)[:, None].to(rows.device))[:, 0].double().cpu()
    return given.masked_fill(chosen < 0, torch.nan)


def translated(members: List[Member], reference: Member) -> list[Member]:
    """The members in the reference's ids; those that share an engine share one again."""
    engines: dict[int, MinedEngine] = {}
    found = []
    for member in members:
        if id(member.engine) not in engines:
            ids = reference.vocabulary, reference.vocabulary_size
            engines[id(member.engine)] = MinedEngine(member.engine, member.vocabulary, *ids)
        twin = copy.copy(member)
        twin.engine, twin.tokenizer, twin.encoder = engines[id(member.engine)], reference.tokenizer, reference.encoder
        twin.vocabulary, twin.vocabulary_size = reference.vocabulary, reference.vocabulary_size
        twin.end_ids = reference.end_ids
        found.append(twin)
    return found
