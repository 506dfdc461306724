"""Requests that start, are cancelled, interrupted and fail at random, over threads: who survives gives the answer of a
request alone, and nothing of the others stays."""

from __future__ import annotations

import copy
import gc
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from typing import Any

import pytest
from conftest import TextPack as Pack
from engines.bytes import ByteEncoder, ByteEngine
from test_any_engine import COURT, STORY

from packllm import CancelledError, Member, MemberError
from packllm.engines import base
from packllm.engines.prefix import PrefixCache

POISON = "\x07"
PROMPTS = ["the court shall order relief", "once upon a time", "a dog. ", "the court shall order the"]
WAYS: list[dict[str, Any]] = [
    {},
    {"draft_tokens": 3},
    {"temperature": 0.8, "seed": 4},
    {"decoding": "lazy", "temperature": 1.0, "seed": 2},
    {"decoding": "cool"},
    {"weighting": "top1"},
]
STEPS, CALLERS = 10, 4


@pytest.fixture(autouse=True, scope="module")
def _count_only_what_is_new() -> Iterator[None]:
    gc.collect()
    gc.freeze()  # the million objects of imported modules
    yield
    gc.unfreeze()


def with_own_model(member: Member, name: str) -> Member:
    return Member(copy.deepcopy(member.model), member.tokenizer, name)


def of_torch(make_member: Any) -> list[Member]:
    members = [with_own_model(make_member("llama", 0), "a"), with_own_model(make_member("gpt2", 1), "b")]
    poison = members[0].encoder.plain(POISON)[-1]

    def fail(_: Any, arguments: Any) -> None:
        if (arguments[0] == poison).any():
            raise RuntimeError("out of memory")

    members[1].model.get_input_embeddings().register_forward_pre_hook(fail)
    return members


def of_bytes(make_member: Any) -> list[Member]:
    members = [Member(name=n, encoder=ByteEncoder(), engine=ByteEngine(t)) for n, t in (("a", STORY), ("b", COURT))]
    members[1].engine.poison = ord(POISON)  # type: ignore[attr-defined]
    return members


def open_sequences(members: Sequence[Member]) -> int:
    """Sequences of these members that nobody has closed."""
    gc.collect()
    engines = {id(member.engine) for member in members}
    return sum(
        isinstance(thing, base.Sequence) and id(thing.engine) in engines and not thing.closed  # type: ignore[attr-defined]
        for thing in gc.get_objects()
    )


def nothing_is_left(pack: Pack) -> None:
    assert open_sequences(pack.members) == pack.prefixes.stats.entries
    pack.prefixes.clear()
    assert open_sequences(pack.members) == 0
    assert pack.prefixes.stats.bytes == 0
    admission = pack._admission
    assert (admission._used, admission._inside, len(admission.waiting)) == (0, 0, 0)
    for meeting in {id(m.engine.meeting): m.engine.meeting for m in pack.members if m.engine.meeting}.values():
        assert (meeting._waiting, meeting._running, meeting._busy) == ([], [], False)  # type: ignore[union-attr]


@pytest.mark.parametrize("made", [of_torch, of_bytes])
def test_random_requests_over_threads(made: Callable, make_member: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packllm.engines.prefix.MINIMUM", 4)
    members = made(make_member)
    pack = Pack(members, max_tokens=8, weighting={"a": 0.6, "b": 0.4}, pool="linear", max_cache_mb=64)
    alone = {
        (text, way): pack.generate(text, prefix_cache_mb=0, **options).text
        for text in PROMPTS
        for way, options in enumerate(WAYS)
    }
    assert len(set(alone.values())) > len(PROMPTS)
    before, done, wrong = threading.active_count(), Counter[str](), []
    lock, ready = threading.Lock(), threading.Barrier(CALLERS)

    def step(dice: random.Random) -> str:
        text, way = dice.choice(PROMPTS), dice.randrange(len(WAYS))
        right, options = alone[text, way], WAYS[way]
        kind = dice.choice(("whole", "whole", "batch", "break", "cancel", "fail"))
        if kind == "whole":
            assert pack.generate(text, **options).text == right
        elif kind == "batch":
            answers = pack.generate_batch(PROMPTS, **options)
            assert [answer.text for answer in answers] == [alone[one, way] for one in PROMPTS]
        elif kind == "break":
            with closing(pack.stream(text, **options)) as pieces:
                got = "".join(chunk.text for _, chunk in zip(range(dice.randint(1, 4)), pieces, strict=False))
            assert right.startswith(got)
        elif kind == "cancel":
            cancel, said = threading.Event(), ""
            with suppress(CancelledError):
                for chunk in pack.stream(text, cancel=cancel, **options):
                    said += chunk.text
                    cancel.set()
            assert right.startswith(said)
        else:
            with pytest.raises(MemberError, match=r"'b'.*out of memory"):
                pack.generate(text + POISON, **options)
        return kind

    def caller(number: int) -> None:
        dice = random.Random(number)
        ready.wait()
        for _ in range(STEPS):
            try:
                kind = step(dice)
            except BaseException as error:
                wrong.append(repr(error))
            else:
                with lock:
                    done[kind] += 1

    threads = [threading.Thread(target=caller, args=(number,), daemon=True) for number in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(180)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert done.total() == STEPS * CALLERS
    assert set(done) == {"whole", "batch", "break", "cancel", "fail"}
    assert threading.active_count() == before
    nothing_is_left(pack)


class Interrupts:
    """Raises KeyboardInterrupt in the n-th pass of some members; `shared` counts the interrupted passes that more
    than one request had reads in."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.at = self.shared = 0
        self.count = 0
        for member in members:
            # After the first layer: its keys and values are there already, those of the second are not.
            member.model.get_decoder().layers[0].register_forward_hook(lambda *_, m=member: self._call(m))

    def _call(self, member: Member) -> None:
        self.count += 1
        if self.count == self.at:
            self.shared += member.engine.requests > 1
            raise KeyboardInterrupt


@pytest.fixture
def interrupted(make_member: Any) -> tuple[Pack, Interrupts]:
    members = [with_own_model(make_member("llama", 0), "a"), with_own_model(make_member("qwen", 2), "b")]
    pack = Pack(members, max_tokens=3, weighting={"a": 0.6, "b": 0.4}, prefix_cache_mb=0)
    return pack, Interrupts(members)


def test_an_interrupt_in_any_pass(interrupted: tuple[Pack, Interrupts]) -> None:
    pack, interrupts = interrupted
    for options in ({"draft_tokens": 1}, {"draft_tokens": 3}, {"decoding": "cool"}):
        expected = pack.generate(PROMPTS[0], **options).text
        interrupts.count = 0
        pack.generate(PROMPTS[0], **options)
        passes = interrupts.count
        assert passes > 3
        for n in range(1, passes + 1):
            interrupts.count, interrupts.at = 0, n
            with pytest.raises(KeyboardInterrupt):
                pack.generate(PROMPTS[0], **options)
            assert interrupts.count == n  # nothing runs for it any more
            interrupts.at = 0
            nothing_is_left(pack)
            assert pack.generate(PROMPTS[0], **options).text == expected


def test_an_interrupt_in_a_pass_of_others(interrupted: tuple[Pack, Interrupts]) -> None:
    """Whoever leads the pass is interrupted; the others' reads of it are read again."""
    pack, interrupts = interrupted
    expected = [pack.generate(prompt).text for prompt in PROMPTS]
    for n in range(1, 11):
        told: dict[int, str | BaseException] = {}
        ready = threading.Barrier(len(PROMPTS))

        def caller(at: int, told: dict = told, ready: threading.Barrier = ready) -> None:
            ready.wait()
            try:
                told[at] = pack.generate(PROMPTS[at]).text
            except BaseException as error:
                told[at] = error

        interrupts.count, interrupts.at = 0, n
        threads = [threading.Thread(target=caller, args=(at,), daemon=True) for at in range(len(PROMPTS))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        interrupts.at = 0
        lost = [at for at, answer in told.items() if isinstance(answer, KeyboardInterrupt)]
        assert len(lost) == 1 or interrupts.count < n
        assert {at: answer for at, answer in told.items() if at not in lost} == {
            at: answer for at, answer in enumerate(expected) if at not in lost
        }
        del told
        nothing_is_left(pack)
    assert interrupts.shared


# What a cache is never shared by


def kept(cache: PrefixCache, engine: ByteEngine, ids: Sequence[int]) -> None:
    sequence = engine.open()
    sequence.ids = list(ids)
    cache.keep(None, sequence, 8 * len(ids))


def test_equal_hashes_are_not_equal_ids() -> None:
    engine, cache, ids = ByteEngine(STORY), PrefixCache(2**20), list(range(1, 101))
    alike = [i + sys.hash_info.modulus for i in ids]
    assert [*map(hash, alike)] == [*map(hash, ids)]
    assert hash(tuple(alike)) == hash(tuple(ids))
    kept(cache, engine, ids)
    assert cache.longest(engine, None, alike) is None
    assert cache.longest(engine, None, [*ids[:80], *alike[80:]])[1] == 80  # type: ignore[index]
    assert cache.longest(ByteEngine(STORY), None, ids) is None  # equal weights, another engine
    assert cache.longest(engine, 0, ids) is None


@pytest.mark.parametrize(
    ("first", "second"), [("house", "houses"), ("hou", "house"), ("the for", "the forest"), ("日", "本")]
)
def test_text_that_begins_alike_shares_only_tokens_that_do(
    make_member: Any, monkeypatch: pytest.MonkeyPatch, first: str, second: str
) -> None:
    """A token may end elsewhere than a text does, and a character's first byte is none of the character."""
    monkeypatch.setattr("packllm.engines.prefix.MINIMUM", 4)
    member, start = make_member("llama", 0), "there was a girl who lived in a small "
    pack = Pack([member], max_tokens=5)
    fresh = pack.generate(start + second, prefix_cache_mb=0)
    pack.generate(start + first)
    again = pack.generate(start + second)
    ours, theirs = pack.tokenize(start + first), pack.tokenize(start + second)
    same = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    assert 4 <= again.usage.cached_tokens <= same
    assert again.text == fresh.text
    assert again.weights.nll == pytest.approx(fresh.weights.nll, abs=1e-5)


def test_marks_spelled_as_text_share_nothing_with_marks(make_member: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packllm.engines.prefix.MINIMUM", 1)
    pack = Pack([make_member("llama", 0)], max_tokens=5)
    spelled = "<|im_start|>user\nwho lived there?<|im_end|>\n<|im_start|>assistant\n"
    fresh = pack.generate(spelled, prefix_cache_mb=0)
    asked = pack.generate([{"role": "user", "content": "who lived there?"}])
    again = pack.generate(spelled)
    assert asked.usage.prompt_tokens < again.usage.prompt_tokens
    assert (again.usage.cached_tokens, again.text) == (0, fresh.text)
