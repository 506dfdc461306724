"""Members on several devices run at once. CPU members say that they are elsewhere; barriers prove it, no clocks."""

from __future__ import annotations

import threading

import pytest
from conftest import TextPack as Pack
from elsewhere import pretended
from lines import lines

from packllm import Member, MemberError
from packllm.decode.line import read_lines
from packllm.engines.meeting import Meeting

ONE, TWO = "cpu:0", "cpu:1"  # both are the CPU, and differ
PROMPTS = ["The capital of France is", "def add(a, b):"]
PATIENCE = 30.0  # seconds until a pass that nobody joins gives up


@pytest.fixture
def apart(make_member):
    """apart(*places): members on those devices, with models and engines of their own."""

    def make(*places: str) -> list[Member]:
        members = [make_member(["llama", "gpt2", "llama"][k], k) for k in range(len(places))]
        for member, place in zip(members, places, strict=True):
            member.engine.place, member.engine.meeting = place, Meeting.at(place)
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


def test_one_device_needs_no_thread(apart, hooked):
    members, threads = apart(ONE, ONE), set()
    for member in members:
        hooked(member, lambda: threads.add(threading.get_ident()))
    lines({k: (member, [5, 6]) for k, member in enumerate(members)})
    assert threads == {threading.get_ident()}


def test_an_error_on_one_device_leaves_the_other(apart, hooked):
    members = apart(ONE, TWO, ONE)
    ends = lines({k: (member, [5, 6]) for k, member in enumerate(members)})
    hooked(members[0], fail)
    found = read_lines(ends, {k: [7] for k in ends})
    assert [isinstance(answer, MemberError) for answer in found.values()] == [True, False, False]
    assert found[0].member == "llama-0"


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
    begun = meeting(members, hooked)  # one after the other, the first pass would wait in vain
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


MODES = {
    "em": {},
    "uniform": {"weighting": "uniform"},
    "opt": {"weighting": "opt"},
    "exact": {"weighting": "exact"},
    "sim": {"weighting": "sim"},
    "log pool": {"pool": "log"},
    "log pool, exact": {"pool": "log", "weighting": "exact"},
    "drafts": {"draft_tokens": 4, "weighting": {"llama-0": 0.8, "gpt2-1": 0.2}},
    "sampled": {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 5},
    "penalties": {"presence_penalty": 0.5, "repetition_penalty": 1.2, "logit_bias": {40: 1.0}},
    "log-probabilities": {"logprobs": True, "top_logprobs": 3},
    "adapt": {"adapt": True},
    "cool": {"decoding": "cool"},
    "lazy": {"decoding": "lazy", "temperature": 1.0, "seed": 3},
    "mined": {"decoding": "mined"},
    "race": {"race": 1},
    "schema": {"json_schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},
}


@pytest.mark.parametrize("mode", MODES)
def test_what_is_on_a_gpu_meets_nothing_of_the_cpu(make_member, monkeypatch, mode):
    """The same text as on the CPU, twice: the second time with the prompt in the prefix cache."""
    members = [make_member("llama", 0), make_member("gpt2", 1)]
    prompts = [f"{at}. {prompt} " + "The planner chose an index scan. " * 5 for at, prompt in enumerate(PROMPTS)]
    pack = Pack(members, max_tokens=12, **MODES[mode])
    expected = [[g.text for g in pack.generate_batch(prompts)] for _ in range(2)]
    with pretended(monkeypatch, *(member.engine for member in members)):
        pack = Pack(members, max_tokens=12, **MODES[mode])
        assert [[g.text for g in pack.generate_batch(prompts)] for _ in range(2)] == expected
