"""A member that fails, at whatever pass, is named or done without; a request that is cancelled runs no further pass."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import threading
from collections.abc import Callable

import pytest
import torch
from conftest import TextPack as Pack
from transformers import DynamicCache

from packllm import CancelledError, Member, MemberError

PROMPT = "Diabetes is a disease in which the court shall order relief"
TEXTS = [" The capital of France", " a sequential scan", " Paris is blue"]
FIXED = {"a": 0.5, "b": 0.3, "c": 0.2}
LOST = {"a": (0.0, 0.6, 0.4), "b": (5 / 7, 0.0, 2 / 7), "c": (0.625, 0.375, 0.0)}
LENGTH = 7


class Fault:
    """Fails a member's model at its n-th call of one part, and at every later one.

    Args:
        part: of the model: the body (a pass), or the head.
        act: what happens instead: raises, or makes something else of the output.
    """

    def __init__(self, member: Member, part: str, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.left, self.hits, self._act = math.inf, 0, act
        module = member.model.get_decoder() if part == "body" else member.model.get_output_embeddings()
        module.register_forward_hook(self._call)

    def _call(self, module, args, output):
        self.left -= 1
        if self.left >= 0:
            return None
        self.hits += 1
        if isinstance(output, torch.Tensor):
            return self._act(output)
        output.last_hidden_state = self._act(output.last_hidden_state)
        return output


def out_of_memory(output):
    raise torch.OutOfMemoryError("CUDA out of memory")


def to_nan(output):
    return torch.full_like(output, torch.nan)


def lost_device(output):
    raise ValueError("device lost")


def member_of(make_member, architecture: str, seed: int, tokenizer: str, name: str) -> Member:
    """With a model of its own, which may be spoilt."""
    member = make_member(architecture, seed, tokenizer)
    return Member(copy.deepcopy(member.model), member.tokenizer, name)


ALIKE = [("llama", 0, "bytes", "a"), ("qwen", 2, "bytes", "b"), ("gpt2", 1, "bytes", "c")]
UNLIKE = [("llama", 0, "bytes", "a"), ("llama", 1, "words", "b"), ("gpt2", 1, "bytes", "c")]


def generated(**options) -> Callable:
    """The values of the answer's weights; the answer must be whole."""

    def ask(pack: Pack, **more) -> tuple[float, ...]:
        answer = pack.generate(PROMPT, max_tokens=LENGTH, **options, **more)
        assert answer.finish_reason == "stop" or answer.usage.completion_tokens == LENGTH
        return answer.weights.values

    return ask


def structured(**options) -> Callable:
    def ask(pack: Pack, **more) -> tuple[float, ...]:
        answer = pack.generate(PROMPT, max_tokens=LENGTH, json_schema={"type": "boolean"}, **options, **more)
        assert answer.text in ("true", "false")
        return answer.weights.values

    return ask


def batched(pack: Pack, **more) -> tuple[float, ...]:
    answers = pack.generate_batch([PROMPT, "The capital of France is"], max_tokens=LENGTH, draft_tokens=1, **more)
    assert len({answer.weights.values for answer in answers}) == 1
    return answers[0].weights.values


def scored(pack: Pack) -> list[float]:
    return pack.score(PROMPT, TEXTS)


def reranked(pack: Pack) -> list[tuple[str, float]]:
    return pack.rerank(PROMPT, TEXTS)


DRAWN = {"temperature": 1.0, "seed": 1}
WAYS = {
    "tokens": (ALIKE, generated(draft_tokens=1)),
    "drafts": (ALIKE, generated(draft_tokens=4)),
    "batch": (ALIKE, batched),
    "lazy": (ALIKE, generated(decoding="lazy", **DRAWN)),
    "weigh": (ALIKE, lambda pack: pack.weigh(PROMPT).values),
    "score": (ALIKE, scored),
    "rerank": (ALIKE, reranked),
    "cool": (UNLIKE, generated()),
    "cool of one vocabulary": (ALIKE, generated(decoding="cool")),
    "cool+rerank": (UNLIKE, generated(decoding="cool+rerank")),
    "mined": (UNLIKE, generated(decoding="mined")),
    "schema": (ALIKE, structured()),
    "mined schema": (UNLIKE, structured(decoding="mined")),
    "score across": (UNLIKE, scored),
    "score mined": (UNLIKE, lambda pack: pack.score(PROMPT, TEXTS, decoding="mined")),
}


FAULTS = [("body", out_of_memory), ("head", out_of_memory), ("head", to_nan), ("body", to_nan), ("body", lost_device)]


@pytest.mark.parametrize("way", WAYS)
def test_a_member_that_fails_at_any_pass(way, make_member):
    """Each member at every pass in turn, until the work succeeds: the failure names it, or leaves the others."""
    kinds, ask = WAYS[way]
    faults = itertools.cycle(FAULTS)
    for k, _ in zip(range(3), itertools.islice(faults, list(WAYS).index(way) % 5, None), strict=False):
        members = [member_of(make_member, *kind) for kind in kinds]
        name, fault = members[k].name, Fault(members[k], *next(faults))
        pack = Pack(members, weighting=FIXED, prefix_cache_mb=0)
        whole, without = ask(pack), LOST[name]
        if "score" in way or way == "rerank":
            left = [m for m in members if m.name != name]
            total = sum(FIXED[m.name] for m in left)
            without = ask(Pack(left, weighting={m.name: FIXED[m.name] / total for m in left}))
        for n in itertools.count():
            fault.left, fault.hits = n, 0
            found = ask(Pack(members, weighting=FIXED, prefix_cache_mb=0, on_member_error="drop"))
            if not fault.hits:
                assert found == whole
                break
            assert equal(found, without) or (way == "score mined" and found[0] < 0), (name, n)
            if n % 4 == 0:
                fault.left, fault.hits = n, 0
                with pytest.raises(MemberError) as raised:
                    ask(pack)
                assert raised.value.member == name
                tries = (
                    2 if way in ("tokens", "drafts", "lazy", "weigh") else 2 + len(TEXTS)
                )  # rows and scores; each text
                assert 1 <= fault.hits <= tries
        assert n >= {"weigh": 1, "lazy": 1}.get(way, 2)


def test_the_last_member_is_named(make_member):
    members = [member_of(make_member, *kind) for kind in ALIKE[:2]]
    for member in members:
        Fault(member, "head", out_of_memory).left = 3
    pack = Pack(members, weighting={"a": 0.5, "b": 0.5}, max_tokens=LENGTH, on_member_error="drop")
    with pytest.raises(MemberError, match="OutOfMemoryError: CUDA out of memory") as raised:
        pack.generate(PROMPT)
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)


def test_weights_that_the_others_cannot_carry(make_member):
    """Of base + expert - anti-expert nothing is left without the base."""
    members = [member_of(make_member, *kind) for kind in ALIKE]
    Fault(members[0], "body", lost_device).left = 1
    pack = Pack(members, weighting={"a": 1, "b": 1, "c": -1}, pool="log", max_tokens=LENGTH, on_member_error="drop")
    with pytest.raises(MemberError, match="device lost"):
        pack.generate(PROMPT)


@pytest.mark.parametrize("weighting", ["opt", "exact", "map"])
def test_a_head_that_fails_while_the_weighting_reads_it(make_member, weighting):
    members = [member_of(make_member, *kind) for kind in ALIKE]
    fault = Fault(members[1], "head", out_of_memory)
    rest = Pack([members[0], members[2]], weighting=weighting).weigh(PROMPT).values
    for n in itertools.count():
        fault.left, fault.hits = n, 0
        pack = Pack(members, weighting=weighting, prefix_cache_mb=0, on_member_error="drop")
        values = pack.weigh(PROMPT).values
        if not fault.hits:
            break
        assert values == pytest.approx((rest[0], 0, rest[1]), abs=1e-3)
    assert n > 1


class Passes:
    """Counts the passes of some members, and calls `act` in the n-th."""

    def __init__(self, members: list[Member]) -> None:
        self.count, self.at, self.act = 0, math.inf, lambda: None
        for member in members:
            member.model.get_decoder().register_forward_pre_hook(self._call)

    def _call(self, *_) -> None:
        self.count += 1
        if self.count == self.at:
            self.act()


CANCELLED = {
    **{way: WAYS[way] for way in ("tokens", "drafts", "batch", "lazy", "cool", "cool+rerank", "mined")},
    "weigh": (ALIKE, lambda pack, **o: pack.weigh(PROMPT, **o)),
    "exact": (ALIKE, lambda pack, **o: pack.weigh(PROMPT, weighting="exact", **o)),
    "score": (ALIKE, lambda pack, **o: pack.score(PROMPT, TEXTS, **o)),
    "rerank": (UNLIKE, lambda pack, **o: pack.rerank(PROMPT, TEXTS, **o)),
}


@pytest.mark.parametrize("drop", ["raise", "drop"])
@pytest.mark.parametrize("way", CANCELLED)
def test_no_pass_follows_once_the_event_is_set(way, drop, make_member, monkeypatch):
    monkeypatch.setattr("packllm.engines.transformers.engine.PASS_TOKENS", 8)  # a prompt takes several passes
    kinds, ask = CANCELLED[way]
    members = [member_of(make_member, *kind) for kind in kinds]
    passes = Passes(members)
    options = {} if way == "exact" else {"weighting": FIXED}
    pack = Pack(members, prefix_cache_mb=0, on_member_error=drop, **options)
    ask(pack)
    whole, passes.count = passes.count, 0
    assert whole > 5
    for n in sorted({1, 2, 5, whole // 2, whole - 1}):
        cancel = threading.Event()
        passes.count, passes.at, passes.act = 0, n, cancel.set
        with pytest.raises(CancelledError):
            ask(pack, cancel=cancel)
        assert passes.count == n


@pytest.mark.parametrize("decoding", ["auto", "cool", "cool+rerank"])
def test_another_thread_closes_a_stream_within_a_pass(decoding, make_member):
    """Not after the step under way, which may be the whole answer."""
    members = [member_of(make_member, *kind) for kind in ALIKE]
    passes, entered, closed = Passes(members), threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        assert closed.wait(60)

    passes.at, passes.act = 12, wait
    stream = Pack(members, weighting=FIXED).stream(PROMPT, decoding=decoding, max_tokens=40)
    read: list[object] = []
    reader = threading.Thread(target=lambda: read.extend(stream))
    reader.start()
    assert entered.wait(60)
    stream.close()
    closed.set()
    reader.join(60)
    assert not reader.is_alive()
    assert passes.count == 12
    assert all(chunk.finish_reason is None for chunk in read)
    assert list(stream) == []


def test_a_closed_stream_frees_its_caches_in_the_pass(make_member):
    members = [member_of(make_member, *kind) for kind in ALIKE]
    passes, held = Passes(members), []
    stream = Pack(members, weighting=FIXED, prefix_cache_mb=0).stream(PROMPT, decoding="cool+rerank", max_tokens=40)
    passes.at, passes.act = 20, lambda: (held.append(len(caches())), stream.close())
    before = len(caches())
    assert list(stream) == []
    assert held[0] > before
    assert len(caches()) == before


def caches() -> list[DynamicCache]:
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is DynamicCache]


def equal(found, expected) -> bool:
    if isinstance(found[0], tuple):
        return [text for text, _ in found] == [text for text, _ in expected] and equal(
            [score for _, score in found], [score for _, score in expected]
        )
    return list(found) == pytest.approx(list(expected), abs=1e-3)
