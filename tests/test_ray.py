"""Members in other processes: the contract without a cluster, and workers of a local Ray cluster, killed at will."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import pytest
import pytest_socket
import torch
from conftest import TextPack as Pack
from engines import contract
from engines.bytes import ByteEncoder, ByteEngine
from engines.contract import *  # noqa: F403
from engines.contract import Subject, read
from test_engines import byte_subject, torch_subject

import packllm
from packllm import LoadError, Member, estimate
from packllm.decode import tokens
from packllm.decode.line import Line
from packllm.engines import ray as workers
from packllm.engines.base import Read
from packllm.engines.load import Loader
from packllm.engines.remote import RemoteEngine, Worker
from packllm.errors import CancelledError

PROMPTS = ("The court shall order relief", "Once upon a time there was", "def add(a, b):")


class Direct:
    """A wire to a worker of this process.

    Attributes:
        calls: the tasks of each read.
        bytes: of their answers.
        kill: calls before which the worker is lost, and a new one begins.
    """

    def __init__(self, load: Callable[[], Member]) -> None:
        self._load = load
        self.worker = Worker(load)
        self.calls: list[list[Any]] = []
        self.bytes: list[int] = []
        self.kill: set[int] = set()

    def call(self, gate, stop, name: str, *args: Any) -> Any:
        gate()
        if len(self.calls) in self.kill:
            self.lose()
        self.calls.append(args[1])
        answer = getattr(self.worker, name)(*args)
        self.bytes.append(len(pickle.dumps(answer)))
        return answer

    def tell(self, name: str, *args: Any) -> None:
        getattr(self.worker, name)(*args)

    def lose(self) -> None:
        self.worker = Worker(self._load)


def remote(member: Member) -> tuple[Member, Direct]:
    """A member that stands for another, and the wire between them."""
    wire = Direct(lambda: member)
    engine = RemoteEngine(wire, wire.worker.describe(), member.name)
    return Member(None, member.tokenizer, member.name, member.encoder, engine=engine), wire


@pytest.fixture(params=["llama", "gpt2", "qwen", "bytes", "ray"])
def subject(request, make_member, monkeypatch) -> Subject:
    monkeypatch.setattr(contract, "APART", 4e-4)  # float16
    monkeypatch.setattr(contract, "LOGS_APART", 1e-2)
    if request.param == "ray":
        return ray_subject(*request.getfixturevalue("trio")[0], torch_subject([make_member("llama", 0)]))
    if request.param == "bytes":
        local = byte_subject()
        assert isinstance(local.engine, ByteEngine)
        member = Member(None, None, "bytes", ByteEncoder(), engine=local.engine)
    else:
        member = make_member(request.param)
        local = torch_subject([member])
    twin, wire = remote(member)
    return Subject(twin.engine, local.truth, local.ids, local.poisoned, lambda sequence: wire.lose(), local.held)


def test_what_is_likely_crosses_most_exactly(make_member):
    member = make_member("llama")
    twin, _ = remote(member)
    ids = member.encoder.plain(PROMPTS[0])
    here, there = (read(one.engine.open(), ids) for one in (member, twin))
    assert there.dtype == torch.float32
    assert torch.equal(here.argmax(-1), there.argmax(-1))
    assert torch.equal(here.amax(-1), there.amax(-1))
    assert bool(((here - there).abs() <= (here - here.amax(-1, keepdim=True)).abs() / 2**10 + 1e-6).all())


def test_only_what_is_new_and_wanted_crosses(make_member):
    """A step sends its own id, after a fork or a crop too; a worker that lost the rest is told it once."""
    twin, wire = remote(make_member("llama"))
    ids = make_member("llama").encoder.plain(PROMPTS[0])
    sequence = twin.engine.open()
    read(sequence, ids[:6], "none")
    read(sequence, ids[6:7], "last")
    fork = sequence.fork()
    sequence.crop(5)
    twin.engine.read([Read(sequence, ids[5:7], "all"), Read(fork, ids[7:8], "last")])
    wire.lose()
    read(fork, ids[8:9], "last")
    sent = [[(sum(len(i) for i, _ in task.reads), task.before) for task in call] for call in wire.calls]
    assert sent == [[(6, None)], [(1, None)], [(2, None), (1, None)], [(1, None)], [(1, ids[:8])]]


@pytest.mark.parametrize("options", [{}, {"draft_tokens": 1}, {"temperature": 1.0, "seed": 3}, {"weighting": "exact"}])
def test_a_pack_answers_as_it_does_in_one_process(make_member, options):
    local = [make_member("llama", seed, name=f"m{seed}") for seed in range(3)]
    words: dict[str, Any] = {"max_tokens": 16, **options}
    whole = Pack(local, **words)
    expected = [answer.text for answer in whole.generate_batch(PROMPTS)]
    score = whole.score(PROMPTS[0], [" by law"])
    mixed = [remote(local[0])[0], local[1], remote(local[2])[0]]
    for members in (mixed, [remote(one)[0] for one in local]):
        pack = Pack(members, **words)
        assert [answer.text for answer in pack.generate_batch(PROMPTS)] == expected
        assert pack.score(PROMPTS[0], [" by law"]) == pytest.approx(score, rel=1e-3)


@pytest.mark.parametrize("count", [1, 8, 400])
@pytest.mark.parametrize("options", [{}, {"pool": "log"}, {"pool": "log", "draft_tokens": 4}, {"draft_tokens": 1}])
def test_the_likeliest_tokens_are_enough_for_greedy_answers(make_member, monkeypatch, options, count):
    """However few cross: where they do not prove the choice, whole rows do."""
    asked, whole = [], Line.whole
    monkeypatch.setattr(tokens, "LIKELIEST", count)
    monkeypatch.setattr(Line, "whole", lambda line, back: asked.append(back) or whole(line, back))
    local = [make_member("llama", 0, name="a"), make_member("gpt2", 1, name="b"), make_member("qwen", 2, name="c")]
    options = {"weighting": "uniform", "max_tokens": 16, **options}
    expected = [g.text for g in Pack(local, **options).generate_batch(PROMPTS)]
    assert not asked
    pairs = [remote(one) for one in local]
    for members in ([member for member, _ in pairs], [local[0], *(member for member, _ in pairs[1:])]):
        assert [g.text for g in Pack(members, **options).generate_batch(PROMPTS)] == expected
    assert bool(asked) == (count < 400)


@pytest.mark.parametrize(
    ("options", "spares"),
    [
        ({}, True),
        ({"adapt": False, "pool": "log"}, True),
        ({"temperature": 1.0}, False),
        ({"logprobs": True}, False),
        ({"sleep": 0.1}, False),
        ({"logit_bias": {" the": 1.0}}, False),
    ],
    ids=str,
)
def test_a_step_brings_the_likeliest_tokens_alone(make_member, monkeypatch, options, spares):
    """Not where the answer needs all of them: draws, log-probabilities, members that sleep. Members agree here."""
    monkeypatch.setattr(tokens, "LIKELIEST", 8)
    pairs = [remote(make_member("llama", 0, name=name)) for name in "ab"]
    words = {"max_tokens": 6, "draft_tokens": 1, **options}
    assert Pack([member for member, _ in pairs], **words).generate(PROMPTS[0]).usage.completion_tokens == 6
    row = 2 * pairs[0][0].vocabulary_size
    for _, wire in pairs:
        steps = wire.bytes[1:]
        assert len(steps) == 5
        assert max(steps) < row if spares else min(steps) > row


def test_an_answer_survives_the_loss_of_workers_at_any_call(make_member):
    local = [make_member("llama", 0, name="a"), make_member("llama", 1, name="b")]
    pack = Pack(local, max_tokens=6)
    expected = pack.generate(PROMPTS[0]).text
    pairs = [remote(one) for one in local]
    assert Pack([member for member, _ in pairs], max_tokens=6).generate(PROMPTS[0]).text == expected
    calls = len(pairs[0][1].calls)
    for at in range(calls):
        twins = [remote(one) for one in local]
        for _, wire in twins:
            wire.kill = {at, at + 2}
        assert Pack([member for member, _ in twins], max_tokens=6).generate(PROMPTS[0]).text == expected
        assert len(twins[0][1].calls) > calls or at == 0  # a loss before the first costs nothing


def test_nobody_waits_for_a_read_that_is_stopped(make_member):
    """What a gate raises here ends the passes there, and the error is the gate's own."""
    member = make_member("llama")
    twin, wire = remote(member)
    sequence = twin.engine.open()

    def enough() -> None:
        raise CancelledError("enough")

    def call(gate, stop, name, *args):
        try:
            gate()
        except CancelledError:
            stop()
            with pytest.raises(CancelledError, match="was cancelled"):
                getattr(wire.worker, name)(*args)
            raise

    wire.call = call
    sequence.gate = enough
    passes = member.engine.forwards
    with pytest.raises(CancelledError, match="enough"):
        twin.engine.read([Read(sequence, [1, 2], "last")])
    assert member.engine.forwards == passes
    assert sequence.ids == []


def test_workers_run_at_the_same_time(make_member, monkeypatch):
    """Each call waits until all three are under way."""
    monkeypatch.setattr(tokens, "LIKELIEST", 400)  # all of them: nobody is asked alone
    twins = [remote(make_member("llama", seed, name=f"m{seed}")) for seed in range(3)]
    barrier = threading.Barrier(3)
    for _, wire in twins:
        wire.call = lambda *args, call=wire.call: (barrier.wait(60), call(*args))[1]
    found = Pack([member for member, _ in twins], max_tokens=4, draft_tokens=1).generate(PROMPTS[0])
    assert found.text == Pack([make_member("llama", seed) for seed in range(3)], max_tokens=4).generate(PROMPTS[0]).text
    assert [len(wire.calls) for _, wire in twins] == [len(twins[0][1].calls)] * 3


# What is said without a cluster


def test_without_ray_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr(workers, "ray", None)
    with pytest.raises(LoadError, match=r"needs ray>=2\.60; install packllm\[ray\]"):
        Pack.load(["a=ray:./model"])


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_an_old_ray_is_refused(monkeypatch):
    monkeypatch.setattr(workers.ray, "__version__", "2.9.3")
    with pytest.raises(LoadError, match=r"needs ray>=2\.60, not 2\.9\.3"):
        Pack.load(["ray:./model"])


def test_a_worker_takes_no_memory_here():
    """Ray is not asked for that."""
    found = estimate(["law=ray[GPU=1]:./law-7b", "ray:./medicine"])
    assert list(found) == [("law", 0, None), ("medicine", 0, None)]
    assert "runs in a worker" in str(found)


def test_loaded_workers_take_no_memory_here_either(make_member):
    pack = Pack([remote(make_member("llama"))[0]])
    assert [held for _, held, _ in pack.memory()] == [0]


def test_resources_are_numbers():
    assert workers.resources("GPU=1,fast disk=0.5") == {"GPU": 1, "fast disk": 0.5}
    with pytest.raises(LoadError, match="write resources as GPU=1"):
        Pack.load(["ray[GPU]:./model"])


# A local cluster of three worker processes


class Slow(Worker):
    """A worker that tests may ask more of."""

    __test__ = False

    def __init__(self, load: Callable[[], Member]) -> None:
        from packllm.engines import prefix

        super().__init__(load)
        torch.set_num_threads(1)
        prefix.MINIMUM = 8  # as the fixture short_prefixes sets it here
        self._passes, self._poison, self._hook = 0, None, None

    def process(self) -> int:
        return os.getpid()

    def watch(self, poison: int | None = None, passes: int = 0) -> None:
        """Fail where a pass reads some id; kill -9 itself in the middle of that pass from now."""
        self._poison, self._passes = poison, passes
        if self._hook is None:
            self._hook = self.member.model.get_input_embeddings().register_forward_pre_hook(self._check)

    def _check(self, module: Any, args: Any) -> None:
        if self._poison in args[0].flatten().tolist():
            raise RuntimeError("out of memory")
        self._passes -= 1
        if not self._passes:
            os.kill(os.getpid(), signal.SIGKILL)

    def lose(self) -> None:
        for sequence in self.held.values():
            sequence.lose()

    def caches(self) -> int:
        return sum(sequence.cache is not None for sequence in self.held.values())


class Exact(workers.ActorWire):
    """A wire whose words have arrived when tell() returns."""

    def tell(self, name: str, *args: Any) -> None:
        if workers.ray.is_initialized():
            with suppress(RuntimeError):  # a dead worker needs no message
                self.ask(name, *args)

    def ask(self, name: str, *args: Any) -> Any:
        return self.call(lambda: None, lambda: None, name, *args)


def loaded(folder: str) -> Member:
    return Loader().members([folder])[0]


@pytest.fixture(scope="module")
def trio(make_member, tmp_path_factory) -> Iterator[list[tuple[Member, Exact]]]:
    """Three members of three workers."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it
    folder, found = tmp_path_factory.mktemp("models"), []
    pytest_socket.enable_socket()  # the processes of a cluster talk over loopback
    for seed in range(3):
        local = make_member("llama", seed)
        local.model.save_pretrained(folder / local.name)
        local.tokenizer.save_pretrained(folder / local.name)
        wire = Exact(partial(loaded, str(folder / local.name)), worker=Slow)
        engine = RemoteEngine(wire, wire.ask("describe"), local.name)
        found.append((Member(None, local.tokenizer, local.name, local.encoder, engine=engine), wire))
    pytest_socket.disable_socket(allow_unix_socket=True)
    yield found
    ray.shutdown()


def ray_subject(member: Member, wire: Exact, local: Subject) -> Subject:
    @contextmanager
    def poisoned(token: int) -> Iterator[None]:
        wire.ask("watch", token)
        yield
        wire.ask("watch", None)

    return Subject(
        member.engine, local.truth, local.ids, poisoned, lambda sequence: wire.ask("lose"), lambda: wire.ask("caches")
    )


@pytest.mark.parametrize(("passes", "killed"), [(0, 2), (1, 1), (9, 1)])
def test_an_answer_survives_kill_9(trio, make_member, passes, killed):
    """Between two requests, in the prefill, in the middle of the answer."""
    local = Pack([make_member("llama", seed) for seed in range(3)], max_tokens=16, draft_tokens=1)
    pack = Pack([member for member, _ in trio], max_tokens=16, draft_tokens=1)
    wires = [wire for _, wire in trio][:killed]
    before = [wire.ask("process") for wire in wires]
    for wire, process in zip(wires, before, strict=True):
        if passes:
            wire.ask("watch", None, passes)
        else:
            os.kill(process, signal.SIGKILL)
    prompt = PROMPTS[passes % 3]
    assert pack.generate(prompt).text == local.generate(prompt).text
    assert not {wire.ask("process") for wire in wires} & {*before}


async def test_a_server_answers_through_kill_9(trio, make_member):
    """Whole and streamed, at once; the worker ends in the middle of both."""
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    from served import CHAT, client, events

    from packllm.serve.app import create_app

    local, pack = (
        packllm.Pack(members, max_tokens=16, draft_tokens=1)
        for members in ([make_member("llama", seed) for seed in range(3)], [member for member, _ in trio])
    )
    asked = [{"messages": [{"role": "user", "content": prompt}]} for prompt in PROMPTS[:2]]
    expected = [local.generate(body["messages"]).text for body in asked]
    _, wire = trio[0]
    before = wire.ask("process")
    wire.ask("watch", None, 6)
    async with client(create_app(pack)) as http:
        whole, streamed = await asyncio.gather(
            http.post(CHAT, json=asked[0]), http.post(CHAT, json={**asked[1], "stream": True})
        )
    assert whole.status_code == 200, whole.text
    assert whole.json()["choices"][0]["message"]["content"] == expected[0]
    texts = [one["choices"][0]["delta"].get("content", "") for one in events(streamed.text)]
    assert "".join(texts) == expected[1]
    assert wire.ask("process") != before


def test_ray_specs(trio, tmp_path, make_member, monkeypatch):
    local = make_member("llama", 1)
    local.model.save_pretrained(tmp_path / "m")
    local.tokenizer.save_pretrained(tmp_path / "m")
    (member,) = Loader().members([f"law=ray:{tmp_path / 'm'}"])
    assert member.name == "law"
    expected = Pack([local], max_tokens=8).generate(PROMPTS[0]).text
    assert Pack([member], max_tokens=8).generate(PROMPTS[0]).text == expected
    with pytest.raises(LoadError, match=r"no worker can be placed: resources=\{'GPU': 64.0\}.*ask for less"):
        Loader().members([f"ray[GPU=64]:{tmp_path / 'm'}"])
    for wrong, said in (("-1", "cannot be negative"), ("1.5", "")):
        monkeypatch.setattr(workers, "_check_placeable", lambda needed: None)
        with pytest.raises(LoadError, match=rf"no worker can be placed: resources=\{{'GPU': {wrong}.*{said}"):
            Loader().members([f"ray[GPU={wrong}]:{tmp_path / 'm'}"])
    monkeypatch.undo()
    every = workers.ray.cluster_resources()["CPU"]
    (greedy,) = Loader().members([f"ray[CPU={every:g}]:{tmp_path / 'm'}"])
    monkeypatch.setattr(workers, "PLACING", 0.0)
    for words in ("", "[CPU=1]"):
        with pytest.raises(LoadError, match=r"no worker can be placed: resources=\{'CPU': 1.0\}, and only .* are free"):
            Loader().members([f"ray{words}:{tmp_path / 'm'}"])
    monkeypatch.undo()
    del greedy
    gc.collect()
    with pytest.raises(LoadError, match=r"worker of '\./nothing': .*does not exist"):
        Loader().members(["ray:./nothing"])


async def test_a_server_goes_on_without_a_worker_that_is_gone_for_good(trio, make_member):
    """Where it may; otherwise requests fail, and members that do not need the worker answer. The last test: it ends a
    worker of the trio."""
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    from served import CHAT, client

    from packllm.serve.app import create_app

    ray = pytest.importorskip("ray")
    pack = packllm.Pack([member for member, _ in trio], max_tokens=16, draft_tokens=1)
    remaining = packllm.Pack([make_member("llama", seed) for seed in range(2)], max_tokens=16, draft_tokens=1)
    messages = [{"role": "user", "content": PROMPTS[0]}]
    ray.kill(trio[2][1].actor, no_restart=True)
    async with client(create_app(pack)) as http:
        for policy, stream in (("raise", False), ("raise", True), ("drop", False)):
            body = {"messages": messages, "stream": stream, "packllm": {"on_member_error": policy}}
            answer = await http.post(CHAT, json=body)
            if policy == "raise":
                assert (answer.status_code, answer.json()["error"]["code"]) == (500, "member_failed")
            else:
                assert answer.json()["choices"][0]["message"]["content"] == remaining.generate(messages).text
        alone = await http.post(CHAT, json={"messages": messages, "model": trio[0][0].name})
        assert alone.status_code == 200
