"""What a pack keeps of recent prompts, so that a question over a context that was read before starts at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from packllm.engines.transformers import kv

if TYPE_CHECKING:
    from packllm.engines.transformers.member import Member
    from packllm.engines.transformers.session import Session

MINIMUM = 64
"""Fewest tokens that are worth keeping, and worth a copy of their own beside a prompt that begins alike."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prompt as the members of one engine read it. Nothing in it is ever written into.

    Attributes:
        owners: the member of each row.
        ids: int64 (B, n), what the rows read, on the CPU; prompts share what has the same ids, not the same text.
        cache: keys and values of all n tokens.
        hidden: (B, n, d), the body's output; None where the model's own path to its logits is needed.
        logprobs: float64 (B, n), of each token; NaN where none was asked for.
    """

    owners: tuple[Member, ...]
    ids: Tensor
    cache: DynamicCache
    hidden: Tensor | None
    logprobs: Tensor

    def __len__(self) -> int:
        return self.ids.shape[1]

    @cached_property
    def nbytes(self) -> int:
        """Memory held, in whole allocations."""
        held = [self.ids, self.logprobs, *kv.tensors(self.cache)]
        storages = [t.untyped_storage() for t in (held if self.hidden is None else [*held, self.hidden])]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def rows_of(self, owners: Sequence[Member]) -> list[int] | None:
        """Where each of these members is; None if one is missing."""
        places = {id(owner): row for row, owner in enumerate(self.owners)}
        rows = [places.get(id(owner)) for owner in owners]
        return None if None in rows else rows  # type: ignore[return-value]

    def serves(self, owners: Sequence[Member], ids: Tensor, scored: Sequence[Sequence[int]]) -> int:
        """How many tokens of these prompts can be taken from here: with their cache and all their scores.

        Args:
            owners: the member of each row.
            ids: int64 (B, m), the prompts.
            scored: for each row, the positions to score.
        """
        rows = self.rows_of(owners)
        if rows is None:
            return 0
        same = common(self.ids[rows], ids)
        count = min(same, ids.shape[1] - 1)  # the last token is read, for the distribution that follows it
        if self.hidden is None:  # what is not known cannot be made up for: the token before it is read again
            for row, positions in zip(rows, scored, strict=True):
                at = torch.tensor([p for p in positions if p <= count], dtype=torch.long)
                unknown = at[(at >= same) | self.logprobs[row, at.clamp_max(len(self) - 1)].isnan()]
                count = min([count, *(unknown - 1).tolist()])
        return count if count == len(self) or kv.is_whole(self.cache) else 0

    def of(self, owners: Sequence[Member]) -> Prefix:
        """The rows of these members only."""
        rows = self.rows_of(owners)
        assert rows is not None
        if rows == list(range(len(self.owners))):
            return self
        index = kv.index(rows)
        hidden = None if self.hidden is None else self.hidden[index]
        return Prefix(tuple(owners), self.ids[index], kv.take(self.cache, rows), hidden, self.logprobs[index])


@dataclass(frozen=True)
class PrefixStats:
    """What a PrefixCache did so far.

    Attributes:
        entries, bytes: prompts kept now, and the memory that they hold.
        hits, misses: prompts, an engine each, that could start from one, and that could not.
        tokens: tokens that the hits did not have to read.
        evicted: prompts that were let go to make room.
    """

    entries: int = 0
    bytes: int = 0
    hits: int = 0
    misses: int = 0
    tokens: int = 0
    evicted: int = 0


class PrefixCache:
    """Recent prompts, the least recently used going first. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: list[Prefix] = []  # least recently used first
        self._hits = self._misses = self._tokens = self._evicted = 0
        self._closed = False

    def resume(self, session: Session, scored: Sequence[Sequence[int]]) -> int:
        """Let a session that has read nothing yet start from what was read before.

        Args:
            session: one prompt, a row for each member.
            scored: as for its prefill, which is to follow with keep=True.

        Returns:
            Tokens that it need not read.
        """
        prompt = session.prompt
        if prompt is None or not _worth(session):
            return 0
        session.remember()
        with self._lock:
            kept = list(self._kept)
        found: Prefix | None = None
        count = MINIMUM - 1
        for prefix in reversed(kept):
            if (tokens := prefix.serves(session.owners, prompt, scored)) > count:
                found, count = prefix, tokens
        with self._lock:
            if found is None:
                self._misses += 1
                return 0
            self._hits += 1
            self._tokens += count
            if found in self._kept:  # it may have gone meanwhile
                self._kept.remove(found)
                self._kept.append(found)
        session.resume(found.of(session.owners), count)
        return count

    def keep(self, session: Session, limit: int) -> None:
        """Keep what a session has read, right after its prefill.

        Args:
            session: as resume() took it.
            limit: most bytes that all kept prompts may hold.
        """
        new = session.snapshot() if _worth(session) else None
        if new is None or new.nbytes > limit:
            return
        with self._lock:
            if self._closed:
                return
            self._kept = [*(old for old in self._kept if not _covers(new, old)), new]
            while sum(prefix.nbytes for prefix in self._kept) > limit:
                del self._kept[0]
                self._evicted += 1

    @property
    def stats(self) -> PrefixStats:
        with self._lock:
            held = sum(prefix.nbytes for prefix in self._kept)
            return PrefixStats(len(self._kept), held, self._hits, self._misses, self._tokens, self._evicted)

    def clear(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._kept = []

    def close(self) -> None:
        """Let go of everything, and keep nothing from now on."""
        with self._lock:
            self._kept, self._closed = [], True


def common(ours: Tensor, theirs: Tensor) -> int:
    """How many first columns of (B, n) and (B, m) are the same."""
    width = min(ours.shape[1], theirs.shape[1])
    differ = (ours[:, :width] != theirs[:, :width]).any(0).nonzero()
    return int(differ[0, 0]) if len(differ) else width


def _covers(new: Prefix, old: Prefix) -> bool:
    """Whether a newer prompt does for all but a few tokens what an older one did."""
    rows = new.rows_of(old.owners)
    return rows is not None and kv.is_whole(new.cache) and common(new.ids[rows], old.ids) > len(old) - MINIMUM


def _worth(session: Session) -> bool:
    """Whether a session is long enough, its keys are the same however long the prompt goes on, and what follows can be
    read at once."""
    architecture = session.engine.architecture
    return session.width >= MINIMUM and architecture.steady and architecture.blocks
