"""What a pack keeps of recent prompts, so that a question over a context that was read before starts at once."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Sequence as List
from dataclasses import dataclass

from packllm.engines.base import Engine, Prefixes, Sequence

MINIMUM = 64
"""Fewest tokens that are worth keeping, and worth a copy of their own beside a prompt that begins alike."""


@dataclass(frozen=True, eq=False)
class Kept:
    """A sequence that nothing is read into any more, the bytes that it holds, and whose it is."""

    adapter: int | None
    sequence: Sequence
    nbytes: int
    salt: str | None


@dataclass(frozen=True)
class PrefixStats:
    """What a PrefixCache did so far.

    Attributes:
        entries, bytes: prompts kept now, and the memory that they hold.
        hits, misses: prompts, one a member, that could start from one, and that could not.
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
    """Recent prompts of all engines of a pack, the least recently used going first. Safe to use from several threads.

    Args:
        limit: most bytes that all of them may hold.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._kept: list[Kept] = []  # least recently used first
        self._hits = self._misses = self._tokens = self._evicted = 0
        self._closed = False

    def salted(self, salt: str | None) -> Salted:
        """The prompts that were kept under this salt, and no others."""
        return Salted(self, salt)

    def longest(
        self, engine: Engine, adapter: int | None, ids: List[int], salt: str | None = None
    ) -> tuple[Sequence, int] | None:
        """The kept sequence of these weights, under this salt, that begins most like `ids`, and how many first ids are
        the same; where an engine cannot go back, `ids` go on from its end."""
        with self._lock:
            same = []
            for at, kept in enumerate(self._kept):
                count = common(kept.sequence.ids, ids) if _of(kept, engine, adapter, salt) else 0
                if engine.rewinds or count == len(kept.sequence.ids):
                    same.append((count, at))
            count, at = max(same, default=(0, 0))
            if count < MINIMUM:
                return None
            kept = self._kept.pop(at)
            self._kept.append(kept)
            return kept.sequence, count

    def note(self, tokens: int) -> None:
        """A prompt starts, and need not read so many tokens."""
        with self._lock:
            self._hits += tokens > 0
            self._misses += tokens == 0
            self._tokens += tokens

    def keep(self, adapter: int | None, sequence: Sequence, nbytes: int, salt: str | None = None) -> None:
        """Keep a sequence, which nobody else uses; it is closed when its time has come."""
        gone = [sequence]
        with self._lock:
            if not self._closed and nbytes <= self.limit:
                new = Kept(adapter, sequence, nbytes, salt)
                gone = [old.sequence for old in self._kept if _covers(new, old)]
                self._kept = [*(old for old in self._kept if not _covers(new, old)), new]
                while sum(kept.nbytes for kept in self._kept) > self.limit:
                    gone.append(self._kept.pop(0).sequence)
                    self._evicted += 1
        for sequence in gone:
            sequence.close()

    @property
    def stats(self) -> PrefixStats:
        with self._lock:
            held = sum(kept.nbytes for kept in self._kept)
            return PrefixStats(len(self._kept), held, self._hits, self._misses, self._tokens, self._evicted)

    def clear(self) -> None:
        """Let go of everything."""
        with self._lock:
            gone, self._kept = self._kept, []
        for kept in gone:
            kept.sequence.close()

    def close(self) -> None:
        """Let go of everything, and keep nothing from now on."""
        self._closed = True
        self.clear()


class Beginnings:
    """What all prompts of one request begin with, read once, beside what is kept of earlier requests: Prefixes.

    Args:
        read: (adapter, sequence), one of each member that has read its beginning.
        kept: of earlier requests; None: nothing is.
    """

    def __init__(self, read: List[tuple[int | None, Sequence]], kept: Prefixes | None) -> None:
        self._read, self._kept = read, kept

    def longest(self, engine: Engine, adapter: int | None, ids: List[int]) -> tuple[Sequence, int] | None:
        found = None if self._kept is None else self._kept.longest(engine, adapter, ids)
        for own, sequence in self._read:
            if own == adapter and sequence.engine is engine and (found is None or found[1] < len(sequence.ids)):
                return sequence, common(sequence.ids, ids)
        return found

    def note(self, tokens: int) -> None:
        if self._kept is not None:
            self._kept.note(tokens)

    def keep(self, adapter: int | None, sequence: Sequence, nbytes: int) -> None:
        if self._kept is None:
            sequence.close()
        else:
            self._kept.keep(adapter, sequence, nbytes)


@dataclass(frozen=True)
class Salted:
    """The part of a cache that one salt's requests share: base.Prefixes."""

    cache: PrefixCache
    salt: str | None

    def longest(self, engine: Engine, adapter: int | None, ids: List[int]) -> tuple[Sequence, int] | None:
        return self.cache.longest(engine, adapter, ids, self.salt)

    def note(self, tokens: int) -> None:
        self.cache.note(tokens)

    def keep(self, adapter: int | None, sequence: Sequence, nbytes: int) -> None:
        self.cache.keep(adapter, sequence, nbytes, self.salt)


def common(ours: List[int], theirs: List[int]) -> int:
    """How many first ids are the same."""
    most = min(len(ours), len(theirs))
    return bisect_left(range(1, most + 1), True, key=lambda count: ours[:count] != theirs[:count])


def _of(kept: Kept, engine: Engine, adapter: int | None, salt: str | None) -> bool:
    return kept.sequence.engine is engine and kept.adapter == adapter and kept.salt == salt


def _covers(new: Kept, old: Kept) -> bool:
    """Whether the older one is of no use beside the newer: all but its last few tokens begin that too."""
    if not _of(old, new.sequence.engine, new.adapter, new.salt) or not new.sequence.engine.rewinds:
        return False
    return common(new.sequence.ids, old.sequence.ids) > len(old.sequence.ids) - MINIMUM
