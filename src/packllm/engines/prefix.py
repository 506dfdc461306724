"""The cache of recent prompts: a prompt that begins like an earlier one reads only the rest."""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_left
from collections.abc import Sequence as List
from dataclasses import dataclass

from packllm.engines.base import Engine, Prefixes, Sequence

MINIMUM = 64
"""Fewest tokens of a prefix that is worth caching, or worth a copy beside a cached one with the same beginning."""


@dataclass(frozen=True, eq=False)
class Entry:
    """A cached sequence that reads no more, its size, and the adapter and salt that may reuse it."""

    adapter: int | None
    sequence: Sequence
    nbytes: int
    salt: str | None


@dataclass(frozen=True)
class PrefixStats:
    """Statistics of a PrefixCache.

    Attributes:
        entries, bytes: number of cached prompts, and their memory.
        hits, misses: prompts, counted per member, that could or could not start from a cached one.
        tokens: tokens that the hits did not have to read.
        evicted: prompts that were removed to make room.
    """

    entries: int = 0
    bytes: int = 0
    hits: int = 0
    misses: int = 0
    tokens: int = 0
    evicted: int = 0


class PrefixCache:
    """The cached prompts of all engines of a pack. The least recently used one is evicted first. Safe to use from
    several threads.

    Args:
        limit: upper bound of their total size in bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._entries: list[Entry] = []  # least recently used first
        self._hits = self._misses = self._tokens = self._evicted = 0
        self._closed = False

    def salted(self, salt: str | None) -> Salted:
        """The part of the cache with this salt."""
        digest = None if salt is None else hashlib.sha256(salt.encode()).hexdigest()
        return Salted(self, digest)  # a salt of megabytes would be kept with every prompt

    def longest(
        self, engine: Engine, adapter: int | None, ids: List[int], salt: str | None = None
    ) -> tuple[Sequence, int] | None:
        """The cached sequence of these weights and this salt with the longest common prefix with `ids`, and its length.
        If the engine cannot go back, `ids` must begin with the whole cached sequence."""
        with self._lock:
            matches = []
            for at, entry in enumerate(self._entries):
                count = common(entry.sequence.ids, ids) if _of(entry, engine, adapter, salt) else 0
                if engine.rewinds or count == len(entry.sequence.ids):
                    matches.append((count, at))
            count, at = max(matches, default=(0, 0))
            if count < MINIMUM:
                return None
            entry = self._entries.pop(at)
            self._entries.append(entry)
            return entry.sequence, count

    def note(self, tokens: int) -> None:
        """Record that a prompt starts with so many cached tokens."""
        with self._lock:
            self._hits += tokens > 0
            self._misses += tokens == 0
            self._tokens += tokens

    def keep(self, adapter: int | None, sequence: Sequence, nbytes: int, salt: str | None = None) -> None:
        """Store a sequence that nobody else uses; it is closed when it is evicted."""
        evicted = [sequence]
        with self._lock:
            if not self._closed and nbytes <= self.limit:
                new = Entry(adapter, sequence, nbytes, salt)
                evicted = [old.sequence for old in self._entries if _covers(new, old)]
                self._entries = [*(old for old in self._entries if not _covers(new, old)), new]
                while sum(entry.nbytes for entry in self._entries) > self.limit:
                    evicted.append(self._entries.pop(0).sequence)
                    self._evicted += 1
        for sequence in evicted:
            sequence.close()

    @property
    def stats(self) -> PrefixStats:
        with self._lock:
            size = sum(entry.nbytes for entry in self._entries)
            return PrefixStats(len(self._entries), size, self._hits, self._misses, self._tokens, self._evicted)

    def clear(self) -> None:
        """Remove everything."""
        with self._lock:
            entries, self._entries = self._entries, []
        for entry in entries:
            entry.sequence.close()

    def close(self) -> None:
        """Remove everything, and store nothing from now on."""
        self._closed = True
        self.clear()


class Beginnings:
    """Prefixes (see base.py) of one request: the common beginning of its prompts, read once, and the cache of earlier
    requests.

    Args:
        read: (adapter, sequence) of each member that has read its beginning.
        cache: the cache of earlier requests; None: there is none.
    """

    def __init__(self, read: List[tuple[int | None, Sequence]], cache: Prefixes | None) -> None:
        self._sequences, self._cache = read, cache

    def longest(self, engine: Engine, adapter: int | None, ids: List[int]) -> tuple[Sequence, int] | None:
        match = None if self._cache is None else self._cache.longest(engine, adapter, ids)
        for of_adapter, sequence in self._sequences:
            if of_adapter == adapter and sequence.engine is engine and (match is None or match[1] < len(sequence.ids)):
                return sequence, common(sequence.ids, ids)
        return match

    def note(self, tokens: int) -> None:
        if self._cache is not None:
            self._cache.note(tokens)

    def keep(self, adapter: int | None, sequence: Sequence, nbytes: int) -> None:
        if self._cache is None:
            sequence.close()
        else:
            self._cache.keep(adapter, sequence, nbytes)


@dataclass(frozen=True)
class Salted:
    """The part of a cache that requests with one salt share: base.Prefixes."""

    cache: PrefixCache
    salt: str | None

    def longest(self, engine: Engine, adapter: int | None, ids: List[int]) -> tuple[Sequence, int] | None:
        return self.cache.longest(engine, adapter, ids, self.salt)

    def note(self, tokens: int) -> None:
        self.cache.note(tokens)

    def keep(self, adapter: int | None, sequence: Sequence, nbytes: int) -> None:
        self.cache.keep(adapter, sequence, nbytes, self.salt)


def common(one: List[int], other: List[int]) -> int:
    """Length of the common prefix."""
    limit = min(len(one), len(other))
    return bisect_left(range(1, limit + 1), True, key=lambda count: one[:count] != other[:count])


def _of(entry: Entry, engine: Engine, adapter: int | None, salt: str | None) -> bool:
    return entry.sequence.engine is engine and entry.adapter == adapter and entry.salt == salt


def _covers(new: Entry, old: Entry) -> bool:
    """Whether the newer entry replaces the older one: all of it but a few last tokens is a prefix of the newer."""
    if not _of(old, new.sequence.engine, new.adapter, new.salt) or not new.sequence.engine.rewinds:
        return False
    return common(new.sequence.ids, old.sequence.ids) > len(old.sequence.ids) - MINIMUM
