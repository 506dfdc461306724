"""Members on several devices run at once. CPU members say that they are elsewhere; barriers prove it, no clocks."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import TextPack as Pack

from packllm import Member, MemberError
from packllm.decode.devices import across_devices
from packllm.engines.transformers.engine import Engine

ONE, TWO = torch.device("cpu", 0), torch.device("cpu", 1)  # both are the CPU, and differ
PROMPTS = ["The capital of France is", "def add(a, b):"]
PATIENCE = 30.0  # seconds until a pass that nobody joins gives up


class Elsewhere(Engine):
    """An engine that says where it is."""

    place: torch.device

    @property
    def device(self) -> torch.device:
        return self.place


@pytest.fixture
def apart(make_member):
    """apart(*devices): members on those devices, of their own models."""

    def make(*devices: torch.device) -> list[Member]:
        members = []
        for k, device in enumerate(devices):
            base = make_member(["llama", "gpt2", "llama"][k], k)
            engine = Elsewhere.__new__(Elsewhere)
            engine.__dict__.update(base.engine.__dict__)
            engine.place, engine._lock, engine.forwards = device, threading.Lock(), 0
            members.append(Member(base.model, base.tokenizer, base.name, base.encoder, engine=engine))
        return members

    return make


@pytest.fixture
def hooked():
    """hooked(member, function): the function runs before each of its passes, until the test ends."""
    handles = []

    def hook(member: Member, function) -> None:
        body = member.model.get_decoder()  # the prompt goes through the body alone
        handles.append(body.register_forward_pre_hook(lambda *_: function()))

    yield hook
    for handle in handles:
        handle.remove()


def test_runs_of_one_device_keep_their_order_and_thread():
    seen: list[tuple[int, int]] = []
    runs = [lambda at=at: seen.append((at, threading.get_ident())) for at in range(6)]
    assert across_devices([ONE, TWO, ONE, TWO, TWO, ONE], runs, False) == [None] * 6
    for places in ((0, 2, 5), (1, 3, 4)):
        mine = [(at, thread) for at, thread in seen if at in places]
        assert [at for at, _ in mine] == list(places)
        assert len({thread for _, thread in mine}) == 1


def test_one_device_needs_no_thread():
    threads = []
    across_devices([ONE, ONE], [lambda: threads.append(threading.get_ident())] * 2, False)
    assert set(threads) == {threading.get_ident()}


def test_two_devices_meet():
    barrier = threading.Barrier(2)
    assert across_devices([ONE, TWO], [lambda: barrier.wait(PATIENCE)] * 2, False) == [None, None]


@pytest.mark.parametrize("go_on", [False, True])
def test_errors_come_back_in_place(go_on):
    done = []

    def fail():
        raise ValueError("no")

    runs = [fail, lambda: done.append(1), lambda: done.append(2), fail]
    failures = across_devices([ONE, ONE, TWO, TWO], runs, go_on)
    assert [type(failure) for failure in failures] == [ValueError, type(None), type(None), ValueError]
    assert sorted(done) == ([1, 2] if go_on else [2])


def meeting(members, hooked) -> list[int]:
    """Make each pass of every member wait for one of every other; how many passes each has begun."""
    barrier, begun = threading.Barrier(len(members)), [0] * len(members)

    def pass_of(k: int) -> None:
        begun[k] += 1
        barrier.wait(PATIENCE)

    for k, member in enumerate(members):
        hooked(member, lambda k=k: pass_of(k))
    return begun


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
def test_prefill_and_steps_of_two_devices_run_at_once(apart, make_member, hooked, prompts):
    alone = Pack([make_member("llama", 0), make_member("gpt2", 1)], max_tokens=8, weighting="uniform")
    expected = [g.text for g in alone.generate_batch(prompts)]
    members = apart(ONE, TWO)
    begun = meeting(members, hooked)  # one after the other, the first pass would wait for ever
    pack = Pack(members, max_tokens=8, weighting="uniform")
    assert [g.text for g in pack.generate_batch(prompts)] == expected
    assert begun == [8, 8]  # as both take part in each step, a draft would save nothing


def test_blocks_of_two_devices_run_at_once(apart, make_member, hooked):
    weighting = {"llama-0": 0.8, "gpt2-1": 0.1, "llama-2": 0.1}
    alone = Pack([make_member("llama", 0), make_member("gpt2", 1), make_member("llama", 2)], max_tokens=9)
    expected = alone.generate(PROMPTS[0], weighting=weighting).text
    members = apart(ONE, ONE, TWO)
    pack = Pack(members, max_tokens=9)
    pack.generate(PROMPTS[0], weighting=weighting)
    begun = meeting(members[1:], hooked)  # the drafter runs by itself, the two that judge together
    assert pack.generate(PROMPTS[0], weighting=weighting, draft_tokens=4).text == expected
    assert begun == [3, 3]  # the prompt and two blocks of four


def fail() -> None:
    raise RuntimeError("device lost")


def test_an_error_on_another_device_ends_the_request(apart, hooked):
    members = apart(ONE, TWO)
    pack = Pack(members, max_tokens=8, weighting="uniform")
    stream = pack.stream(PROMPTS[0])
    next(stream)
    hooked(members[1], fail)
    with pytest.raises(MemberError, match=r"gpt2-1.*device lost"):
        list(stream)
    with pytest.raises(MemberError, match=r"gpt2-1.*device lost"):
        pack.generate(PROMPTS[0])


def test_a_lost_device_leaves_the_others(apart, make_member, hooked):
    members = apart(ONE, TWO)
    pack = Pack(members, max_tokens=8, weighting="uniform", on_member_error="drop")
    stream = pack.stream(PROMPTS[0])
    next(stream)
    hooked(members[1], fail)
    assert list(stream)[-1].weights.values == (1.0, 0.0)
    late = pack.generate(PROMPTS[0])
    assert late.weights.values == (1.0, 0.0)
    assert late.text == Pack([make_member("llama", 0)], max_tokens=8).generate(PROMPTS[0]).text
    hooked(members[0], fail)
    with pytest.raises(MemberError, match="device lost"):
        pack.generate(PROMPTS[0])
