"""What every engine does. A suite for any of them: give its tests a fixture `subject`, see Subject.

from engines.contract import *  # noqa: F403

@pytest.fixture(params=[...])
def subject(request) -> Subject: ...
"""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from packllm.engines import base
from packllm.engines.base import Engine, Read
from packllm.engines.prefix import PrefixCache

__all__ = [
    "Subject",
    "short_prefixes",
    "test_a_closed_sequence_is_freed",
    "test_a_fork_is_independent",
    "test_a_read_equals_a_fresh_one",
    "test_a_read_that_fails_leaves_the_others_right",
    "test_any_cuts_of_a_read_equal_the_whole",
    "test_any_history_of_reads_and_crops",
    "test_company_changes_nothing",
    "test_every_want",
    "test_ids_survive_a_lost_cache",
    "test_nothing_to_read",
    "test_prompts_that_begin_alike",
    "test_several_reads_of_one_sequence",
    "test_threads",
]


@dataclass
class Subject:
    """An engine and the truth about it.

    Attributes:
        engine: to be tested.
        truth: float (n, V), log-probabilities after each of n ids (given the adapter), made anew, without a cache.
        ids: 40 ids or more.
        poisoned: while it is open, a pass that reads this id fails.
        lose: lets a sequence lose its cache.
        held: how many caches are alive, whoever's they are.
        adapters: what open() takes.
    """

    engine: Engine
    truth: Callable[[Sequence[int], int | None], Tensor]
    ids: list[int]
    poisoned: Callable[[int], AbstractContextManager[object]]
    lose: Callable[[base.Sequence], None]
    held: Callable[[], int]
    adapters: tuple[int | None, ...] = (None,)


APART, LOGS_APART = 2e-5, 1e-3
"""How far probabilities, and logarithms of likely ones, may be apart between two ways of reading the same. Quantised
engines say more: they round what goes into a product too."""


def read(sequence: base.Sequence, ids: Sequence[int], want: base.Want = "all") -> Tensor:
    (answer,) = sequence.engine.read([Read(sequence, ids, want)])
    if isinstance(answer, Exception):
        raise answer
    return answer


def assert_close(found: Tensor | Exception, right: Tensor) -> None:
    assert isinstance(found, Tensor), found
    assert found.shape == right.shape
    found = found.cpu()
    apart = (found.exp().double() - right.exp().double()).abs().amax(-1)
    assert bool((apart < APART).all()), apart
    likely = right > -20
    assert torch.allclose(found[likely].double(), right[likely].double(), atol=LOGS_APART)


def test_a_read_equals_a_fresh_one(subject: Subject) -> None:
    for adapter in subject.adapters:
        sequence = subject.engine.open(adapter)
        found = read(sequence, subject.ids)
        assert found.shape == (len(subject.ids), subject.engine.vocabulary_size)
        assert found.dtype == torch.float32
        assert_close(found, subject.truth(subject.ids, adapter))
        assert sequence.ids == subject.ids
        sequence.close()


def test_every_want(subject: Subject) -> None:
    ids, right = subject.ids[:20], subject.truth(subject.ids[:20], None)
    assert_close(read(subject.engine.open(), ids, "last"), right[-1:])
    assert read(subject.engine.open(), ids, "none").shape == (0, subject.engine.vocabulary_size)
    targets = [*ids[1:], -1]
    targets[3], targets[5] = -1, (targets[5] + 1) % subject.engine.vocabulary_size
    given = read(subject.engine.open(), ids, targets)
    assert given.dtype == torch.float64
    assert given.isnan().nonzero()[:, 0].tolist() == [3, 19]
    wanted = [place for place, target in enumerate(targets) if target >= 0]
    expected = right[wanted, [targets[place] for place in wanted]].double()
    assert torch.allclose(given[wanted], expected, atol=LOGS_APART)
    assert not given.is_inference()


def test_nothing_to_read(subject: Subject) -> None:
    sequence = subject.engine.open()
    for ids in ([], subject.ids[:3], []):
        assert read(sequence, ids, "all").shape == (len(ids), subject.engine.vocabulary_size)
    assert read(sequence, [], "none").shape == (0, subject.engine.vocabulary_size)
    assert read(sequence, [], []).shape == (0,)


def test_any_cuts_of_a_read_equal_the_whole(subject: Subject) -> None:
    right = subject.truth(subject.ids, None)
    for cuts in ([1], [20], [2, 3, 30], [13, 14, 15, 16], list(range(1, len(subject.ids)))):
        sequence, bounds = subject.engine.open(), [0, *cuts, len(subject.ids)]
        parts = [read(sequence, subject.ids[a:b]) for a, b in pairwise(bounds)]
        assert_close(torch.cat(parts), right)
        sequence.close()


def test_any_history_of_reads_and_crops(subject: Subject) -> None:
    dice = random.Random(0)
    for _ in range(3):
        sequence, ids = subject.engine.open(), []
        for _ in range(8):
            if ids and dice.random() < 0.5:
                length = dice.choice([0, len(ids) // 2, max(0, len(ids) - 2), len(ids) - 1, len(ids)])
                sequence.crop(length)
                ids = ids[:length]
            more = dice.choices(subject.ids, k=dice.choice([1, 2, 11]))
            ids = [*ids, *more]
            assert_close(read(sequence, more), subject.truth(ids, None)[-len(more) :])
            assert sequence.ids == ids
        sequence.close()


def test_a_fork_is_independent(subject: Subject) -> None:
    one, two, three = subject.ids[:15], subject.ids[15:20], subject.ids[20:30]
    sequence = subject.engine.open()
    read(sequence, one)
    twin = sequence.fork()
    found = subject.engine.read([Read(twin, two, "all"), Read(sequence, three, "all")])
    assert_close(found[0], subject.truth([*one, *two], None)[15:])
    assert_close(found[1], subject.truth([*one, *three], None)[15:])
    sequence.crop(10)
    third = twin.fork()
    third.crop(12)
    assert_close(read(third, three), subject.truth([*one[:12], *three], None)[12:])
    assert_close(read(sequence, two), subject.truth([*one[:10], *two], None)[10:])
    sequence.close()
    assert_close(read(twin, three), subject.truth([*one, *two, *three], None)[20:])
    assert twin.ids == [*one, *two, *three]


def test_company_changes_nothing(subject: Subject) -> None:
    """Of other lengths, adapters and wants, some of which have read before."""
    reads, right = [], []
    for at, (adapter, length) in enumerate((a, n) for a in subject.adapters for n in (1, 7, 30, 18)):
        before, ids = subject.ids[at : at + 5 * (at % 2)], subject.ids[-length:]
        sequence = subject.engine.open(adapter)
        if before:
            read(sequence, before, "none")
        reads.append(Read(sequence, ids, "last" if at % 3 else "all"))
        right.append(subject.truth([*before, *ids], adapter)[-1 if at % 3 else len(before) :])
    for found, expected in zip(subject.engine.read(reads), right, strict=True):
        assert_close(found, expected)


def test_several_reads_of_one_sequence(subject: Subject) -> None:
    ids = subject.ids
    other, sequence = subject.engine.open(), subject.engine.open()
    wants = [Read(sequence, ids[:9], "all"), Read(other, ids[5:8], "all"), Read(sequence, ids[9:10], "last")]
    found = subject.engine.read([*wants, Read(sequence, ids[10:12], [ids[11], ids[12]])])
    right = subject.truth(ids[:12], None)
    assert_close(found[0], right[:9])
    assert_close(found[1], subject.truth(ids[5:8], None))
    assert_close(found[2], right[9:10])
    assert torch.allclose(found[3], right[[10, 11], ids[11:13]].double(), atol=LOGS_APART)


def test_threads(subject: Subject) -> None:
    """Requests of many threads, which break off or fork on the way."""
    rows = [subject.ids[at : at + 8 + 3 * at] for at in range(6)]
    right = {at: subject.truth(row, subject.adapters[at % len(subject.adapters)]) for at, row in enumerate(rows)}
    wrong: list[object] = []

    def caller(at: int) -> None:
        try:
            dice = random.Random(at)
            for _ in range(3):
                sequence, done = subject.engine.open(subject.adapters[at % len(subject.adapters)]), 0
                while done < len(rows[at]):
                    part = rows[at][done : done + dice.choice([1, 4, 9])]
                    if dice.random() < 0.2:
                        old, sequence = sequence, sequence.fork()
                        old.close()
                    assert_close(read(sequence, part), right[at][done : done + len(part)])
                    done += len(part)
                sequence.close()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=caller, args=(at,)) for at in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_a_closed_sequence_is_freed(subject: Subject) -> None:
    gc.collect()
    start = subject.held()
    sequence = subject.engine.open()
    read(sequence, subject.ids)
    twin = sequence.fork()
    read(twin, subject.ids[:3])
    gc.collect()
    assert subject.held() > start
    sequence.close()
    sequence.close()
    twin.close()
    gc.collect()
    assert subject.held() == start
    (answer,) = subject.engine.read([Read(sequence, [subject.ids[0]])])
    assert isinstance(answer, Exception)
    assert "closed" in str(answer)
    left = weakref.ref(twin)
    del twin
    gc.collect()
    assert left() is None


def test_a_read_that_fails_leaves_the_others_right(subject: Subject) -> None:
    bad = subject.ids[0]
    clean = [i for i in subject.ids if i != bad]
    sequences = [subject.engine.open() for _ in range(3)]
    subject.engine.read([Read(sequence, clean[:10], "last") for sequence in sequences])
    blocks = [clean[10:12], [clean[10], bad], clean[10:11]]
    with subject.poisoned(bad):
        found = subject.engine.read([Read(s, ids, "all") for s, ids in zip(sequences, blocks, strict=True)])
    assert isinstance(found[1], Exception)
    assert_close(found[0], subject.truth(clean[:12], None)[10:])
    assert_close(found[2], subject.truth(clean[:11], None)[10:])
    assert sequences[1].ids == clean[:10]
    assert_close(read(sequences[1], blocks[1]), subject.truth([*clean[:10], *blocks[1]], None)[10:])  # and goes on
    assert_close(read(sequences[0], clean[12:14]), subject.truth(clean[:14], None)[12:])


def test_ids_survive_a_lost_cache(subject: Subject) -> None:
    ids = subject.ids
    sequence = subject.engine.open()
    read(sequence, ids[:10])
    read(sequence, ids[10:20])
    subject.lose(sequence)
    assert sequence.ids == ids[:20]
    assert_close(read(sequence, ids[20:30]), subject.truth(ids[:30], None)[20:])
    subject.lose(sequence)
    sequence.crop(15)
    assert_close(read(sequence, ids[15:25]), subject.truth(ids[:25], None)[15:])


@pytest.fixture
def short_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packllm.engines.prefix.MINIMUM", 8)


@pytest.mark.usefixtures("short_prefixes")
def test_prompts_that_begin_alike(subject: Subject) -> None:
    """Reused from the middle, where the engine can go back; by the same adapter only; as it would be read anew."""
    ids, adapter = subject.ids, subject.adapters[-1]
    cache = PrefixCache(2**24)

    def prompt(row: list[int], adapter: int | None, want: base.Want = "last") -> int:
        sequence = subject.engine.open(adapter, cache)
        found, right = read(sequence, row, want), subject.truth(row, adapter)
        if isinstance(want, str):
            assert_close(found, right[-1:])
        else:
            assert torch.allclose(found[:-1], right[range(len(row) - 1), row[1:]].double(), atol=LOGS_APART)
        assert_close(read(sequence, ids[:2]), subject.truth([*row, *ids[:2]], adapter)[-2:])
        assert sequence.ids == [*row, *ids[:2]]
        sequence.close()
        return sequence.cached_tokens

    assert prompt(ids[:30], adapter) == 0
    assert prompt([*ids[:30], *ids[:5]], adapter) == 30
    middle = [*ids[:20], *reversed(ids[:10])]
    assert prompt(middle, adapter, [*middle[1:], -1]) in ((0, 20) if subject.engine.rewinds else (0,))
    assert prompt([*ids[:20], *ids[:4]], adapter) == (20 if subject.engine.rewinds else 0)
    for other in subject.adapters[:-1]:
        assert prompt(ids[:30], other) == 0
    assert cache.stats.entries > 0
    cache.close()
