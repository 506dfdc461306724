"""One pack under many callers: 8 threads and 32 asyncio tasks ask, stream and break off at once. Answers are those of
one caller alone, nobody waits for ever, and nothing of a request stays behind."""

from __future__ import annotations

import asyncio
import copy
import faulthandler
import gc
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conftest import TextPack as Pack
from faces import FACES, Face
from transformers import DynamicCache

from packllm import Member
from packllm.engines.base import Read, Sequence, read_together

PROMPTS = (
    "the patient has a fever and",
    "once upon a time",
    "the court shall order",
    "a query planner chooses an index scan or a sequential scan from statistics",
)
TOKENS = 10
LIMIT = 180.0  # seconds until a test that hangs is given up; a run takes a few, more on a busy machine
ROUNDS = 4  # of each thread and task
KINDS = 8  # of options


@pytest.fixture(autouse=True, scope="module")
def _count_only_what_is_new() -> Iterator[None]:
    gc.collect()
    gc.freeze()  # the million objects of imported modules: leave them out of every count
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _stacks_of_a_deadlock() -> Iterator[None]:
    faulthandler.dump_traceback_later(LIMIT, exit=False)
    yield
    faulthandler.cancel_dump_traceback_later()


@dataclass
class Alive:
    """What requests hold: sequences, caches, bytes of tensors."""

    sequences: int = 0
    caches: int = 0
    bytes: int = 0

    @classmethod
    def now(cls, pack: Pack) -> Alive:
        """Beside what the pack keeps on purpose for the next prompts, which it lets go of."""
        pack.prefixes.clear()
        gc.collect()
        alive = cls()
        storages = {}
        for thing in gc.get_objects():
            kind = type(thing)
            if issubclass(kind, Sequence):
                alive.sequences += 1
            elif issubclass(kind, DynamicCache):
                alive.caches += 1
            elif issubclass(kind, torch.Tensor):
                storages[thing.data_ptr()] = thing.nbytes
        alive.bytes = sum(storages.values())
        return alive


def settled(start: Alive, pack: Pack) -> Alive:
    """What is alive once threads that were told to stop have stopped (their last step may still run)."""
    until = time.monotonic() + 10
    while (now := Alive.now(pack)) != start and time.monotonic() < until:
        time.sleep(0.05)
    return now


@dataclass
class Crowd:
    """What the callers did and found wrong."""

    wrong: list[Any] = field(default_factory=list)
    done: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self, way: str, got: str, expected: str, whole: bool = True) -> None:
        with self.lock:
            self.done[way] = self.done.get(way, 0) + 1
            if got != expected if whole else not expected.startswith(got):
                self.wrong.append((way, got, expected))


@pytest.fixture(scope="module")
def shared_pack(make_member: Callable[..., Member]) -> Iterator[Pack]:
    """Callers reuse each other's prompts, short as these are."""
    members = [make_member("llama", 0), make_member("gpt2", 1), make_member("qwen", 2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("packllm.engines.prefix.MINIMUM", 4)
        yield Pack(members, max_tokens=TOKENS)


def options_of(number: int) -> dict[str, Any]:
    """Options that differ between requests, so that one mixed up with another shows."""
    choices = [{}, {"temperature": 0.9, "seed": number % 3}, {"weighting": "top1"}, {"max_tokens": 4}]
    return choices[number % len(choices)]


@pytest.fixture(scope="module")
def alone(shared_pack: Pack) -> dict[tuple[bool, str, int], str]:
    """Answers of one caller alone: by whether it is a chat, prompt and number of the options."""
    faces = [kind(shared_pack) for kind in {kind.chat: kind for kind in FACES}.values()]
    return {
        (face.chat, text, number): shared_pack.generate(face.prompt(text), **options_of(number)).text
        for face in faces
        for text in PROMPTS
        for number in range(KINDS)
    }


def test_eight_threads(shared_pack: Pack, alone: dict[tuple[bool, str, int], str]) -> None:
    faces = [kind(shared_pack) for kind in FACES]
    start, crowd = Alive.now(shared_pack), Crowd()
    reused = shared_pack.prefixes.stats.hits
    ready = threading.Barrier(8)

    def caller(thread: int) -> None:
        dice = random.Random(thread)
        ready.wait()
        for _ in range(ROUNDS):
            face, text, number = dice.choice(faces), dice.choice(PROMPTS), dice.randrange(KINDS)
            options, right = options_of(number), alone[face.chat, text, number]
            way = dice.choice(("ask", "stream", "break", "batch", "weigh"))
            try:
                if way == "ask":
                    crowd.check(way, face.ask(text, **options), right)
                elif way == "stream":
                    crowd.check(way, "".join(face.stream(text, **options)), right)
                elif way == "break":
                    with closing(face.stream(text, **options)) as pieces:
                        crowd.check(way, next(pieces) + next(pieces, ""), right, whole=False)
                elif way == "batch":  # rows of a batch have random streams of their own: greedy only
                    greedy = [alone[face.chat, one, 0] for one in PROMPTS]
                    for got, right in zip(face.batch(PROMPTS), greedy, strict=True):
                        crowd.check(way, got, right)
                else:
                    weights = shared_pack.weigh(face.prompt(text), **options)
                    crowd.check(way, str(sum(weights.values) > 0.99), "True")
            except Exception as error:
                crowd.wrong.append((way, error))

    threads = [threading.Thread(target=caller, args=(thread,), daemon=True) for thread in range(8)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + LIMIT
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), "deadlock: see the stacks above"
    assert crowd.wrong == []
    assert set(crowd.done) == {"ask", "stream", "break", "batch", "weigh"}
    assert shared_pack.prefixes.stats.hits > reused
    assert settled(start, shared_pack) == start


async def test_thirty_two_tasks(shared_pack: Pack, alone: dict[tuple[bool, str, int], str]) -> None:
    faces = [kind(shared_pack) for kind in FACES]
    await faces[0].aask(PROMPTS[0])  # the loop's own thread pool stays for the next calls
    start, crowd = Alive.now(shared_pack), Crowd()
    reused = shared_pack.prefixes.stats.hits

    async def caller(task: int) -> None:
        dice = random.Random(100 + task)
        for _ in range(ROUNDS // 2):
            face, text, number = dice.choice(faces), dice.choice(PROMPTS), dice.randrange(KINDS)
            options, right = options_of(number), alone[face.chat, text, number]
            way = dice.choice(("ask", "stream", "break", "cancel"))
            if way == "ask":
                crowd.check(way, await face.aask(text, **options), right)
            elif way == "stream":
                crowd.check(way, "".join([piece async for piece in face.astream(text, **options)]), right)
            elif way == "break":
                pieces = face.astream(text, **options)
                crowd.check(way, await anext(pieces), right, whole=False)
                await pieces.aclose()
            else:
                work = asyncio.create_task(face.aask(text, **{**options, "max_tokens": 200}))
                await asyncio.sleep(dice.random() / 10)
                work.cancel()
                await asyncio.wait([work])
                error = None if work.cancelled() else work.exception()  # it may have been finished by then
                crowd.check(way, str(error), "None")

    async with asyncio.timeout(LIMIT):
        await asyncio.gather(*[caller(task) for task in range(32)])
    assert crowd.wrong == []
    assert set(crowd.done) == {"ask", "stream", "break", "cancel"}
    assert shared_pack.prefixes.stats.hits > reused
    assert await asyncio.to_thread(settled, start, shared_pack) == start
    assert faces[0].ask(PROMPTS[0]) == alone[faces[0].chat, PROMPTS[0], 0]


@pytest.mark.parametrize("kind", FACES, ids=lambda kind: kind.name)
def test_the_count_sees_what_a_request_holds(shared_pack: Pack, kind: type[Face]) -> None:
    start = Alive.now(shared_pack)
    pieces = kind(shared_pack).stream(PROMPTS[0])
    next(pieces)
    during = Alive.now(shared_pack)
    assert during.sequences > start.sequences
    assert during.caches > start.caches
    assert during.bytes > start.bytes
    pieces.close()
    del pieces
    assert settled(start, shared_pack) == start


@pytest.mark.parametrize("kind", FACES, ids=lambda kind: kind.name)
def test_a_failed_request_leaves_nothing(make_member: Any, kind: type[Face]) -> None:
    def fail() -> None:
        if next(passes) >= 5:
            raise RuntimeError("out of memory")

    passes, member = itertools.count(), make_member("llama", 0)
    model = copy.deepcopy(member.model)
    model.get_decoder().register_forward_pre_hook(lambda *_: fail())
    pack = Pack([Member(model, member.tokenizer, "failing")], max_tokens=50, prefix_cache_mb=0)
    start = Alive.now(pack)

    def ask() -> None:  # a frame of its own: the error that pytest keeps would hold this one's names
        with pytest.raises(RuntimeError, match="out of memory"):
            kind(pack).ask(PROMPTS[0])

    ask()
    assert settled(start, pack) == start


def test_interrupting_a_thread_of_a_batch(shared_pack: Pack) -> None:
    """Streams of several prompts, closed in another order than they were opened."""
    start = Alive.now(shared_pack)
    streams = [shared_pack.stream(text, max_tokens=50) for text in PROMPTS]
    for stream in streams:
        next(stream)
    for stream in reversed(streams):
        stream.close()
    del stream, streams
    assert settled(start, shared_pack) == start


def test_threads_take_as_few_passes_as_a_batch(make_member: Any) -> None:
    """Three members that draft and check: whoever is out of step meets the others again. Counted, not timed."""
    members = [make_member("llama", k) for k in range(3)]
    passes: list[int] = []
    for member in members:
        member.end_ids, engine, run = frozenset(), member.engine, member.engine.run
        engine.run = lambda parts, run=run: (passes.append(len(parts)), run(parts))[1]
    pack = Pack(members, max_tokens=24, weighting="uniform", pool="linear", batch_size=48, prefix_cache_mb=0)
    prompts = [f"{number} {PROMPTS[number % 4]}" for number in range(48)]
    expected = [answer.text for answer in pack.generate_batch(prompts)]
    together = len(passes)
    passes.clear()
    texts: dict[int, str] = {}

    def ask(number: int) -> None:
        texts[number] = pack.generate(prompts[number]).text

    threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(48)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert [texts[number] for number in range(48)] == expected
    assert len(passes) <= 1.2 * together  # 1.0 in turns; 1.27 when the emptiest engine went first


def test_a_long_read_that_is_cancelled_ends_though_others_run_its_passes(make_member: Any) -> None:
    """Its gate is asked after each of its passes, not only when it runs one itself."""
    member = make_member("llama")
    engine, run = copy.copy(member.engine), member.engine.run
    engine.most = 8  # tokens of a pass
    ids = (member.encoder.encode(PROMPTS[3]).ids * 30)[:400]
    cancelled, ended = threading.Event(), threading.Event()
    long = engine.open()
    passes_after = []

    def counted(parts: Any) -> None:
        if any(part.sequence is long for part in parts):
            if cancelled.is_set():
                passes_after.append(1)
            elif len(long.ids) >= 40:
                cancelled.set()
        run(parts)

    def gate() -> None:
        if cancelled.is_set():
            raise KeyError("cancelled")

    def steps() -> None:
        sequence = engine.open()
        while not ended.is_set():
            read_together([Read(sequence, ids[:1], "last")])
            sequence.crop(0)

    engine.run, long.gate = counted, gate
    others = [threading.Thread(target=steps) for _ in range(3)]
    for thread in others:
        thread.start()
    try:
        (answer,) = read_together([Read(long, ids, "last")])
    finally:
        ended.set()
        for thread in others:
            thread.join()
    assert isinstance(answer, KeyError)
    assert len(passes_after) <= 15  # of 45
