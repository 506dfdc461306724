"""Members in other processes: the contract without a cluster, and workers of a local Ray cluster, killed at will."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import TextPack
from engines.bytes import ByteEncoder, ByteEngine
from engines.contract import *  # noqa: F403
from engines.contract import Subject, read
from test_engines import byte_subject, torch_subject

from packllm import LoadError, Member, Pack
from packllm.engines import ray as workers
from packllm.engines.base import Read
from packllm.engines.remote import RemoteEngine, RemoteSequence, Worker

PROMPTS = ("The court shall order relief", "Once upon a time there was", "def add(a, b):")


class Direct:
    """A wire to a worker of this process, which may be killed."""

    def __init__(self, load: Callable[[], Member]) -> None:
        self.load, self.worker = load, Worker(load)
        self.calls: list[list[Any]] = []
        self.kill_at: int | None = None

    def call(self, gate, stop, name: str, *args: Any) -> Any:
        gate()
        self.calls.append(list(args[1:]))
        if len(self.calls) == self.kill_at:
            self.worker = Worker(self.load)
        return getattr(self.worker, name)(*args)

    def tell(self, name: str, *args: Any) -> None:
        getattr(self.worker, name)(*args)


def remote(member: Member) -> tuple[Member, Direct]:
    wire = Direct(lambda: member)
    engine = RemoteEngine(wire, wire.worker.describe(), "elsewhere")
    return Member(None, member.tokenizer, member.name, member.encoder, engine=engine), wire


class Byte(Member):
    def __init__(self, engine: ByteEngine) -> None:
        super().__init__(None, None, "bytes", ByteEncoder(), engine=engine)


@pytest.fixture(params=["llama", "gpt2", "qwen", "bytes"])
def subject(request, make_member) -> Subject:
    local = byte_subject() if request.param == "bytes" else torch_subject([make_member(request.param)])
    member = Byte(local.engine) if request.param == "bytes" else make_member(request.param)
    twin, wire = remote(member)

    def lose(sequence: RemoteSequence) -> None:
        wire.worker = Worker(wire.load)

    return Subject(twin.engine, local.truth, local.ids, local.poisoned, lose, local.held, (None,), 4e-4, 1e-2)
