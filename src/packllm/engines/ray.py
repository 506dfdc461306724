"""Members in workers of a Ray cluster: one master and K workers (Cool-Fusion, Figure 2), on several machines or one.

"ray:SPEC" starts an actor in the running cluster, or in a local one that is started for it, which loads SPEC there;
"ray[GPU=1,CPU=2]:SPEC" says what its machine has to have. Members of different workers run at the same time. A worker
that dies is started again by Ray, and reads its ids anew.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from packllm.chat.prompt import Encoder
from packllm.engines.member import Member
from packllm.engines.remote import RemoteEngine, Worker
from packllm.errors import LoadError, PackError

try:
    import ray
    from ray.exceptions import RayActorError, RayTaskError
except ImportError:
    ray = None

log = logging.getLogger("packllm")

OLDEST = (2, 60)
"""The version of Ray that this was made with; older ones were not tried."""

AT_ONCE = 64
"""Requests that one worker serves at a time; their reads meet there."""

TRIES = 3
"""Times that a call is made again whose worker has died."""

PATIENCE = 0.05
"""Seconds between looks at whether anybody still waits for a read."""

LOCAL = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_max_direct_call_object_size": str(4 * 2**20),
    "RAY_task_rpc_inlined_bytes_limit": str(64 * 2**20),
}
"""The environment of a local cluster. Rows of more than 100 kB would go through Ray's object store, which takes as long
again."""


class ActorWire:
    """A worker in a Ray actor (remote.Wire).

    Args:
        load: makes the member there.
        resources: what its machine has to have: CPU, GPU, memory (bytes), and a cluster's own words.
        worker: what runs there.

    Raises:
        LoadError: Ray cannot be started, or no machine has such resources.
    """

    def __init__(
        self, load: Callable[[], Member], resources: Mapping[str, float] | None = None, worker: type[Worker] = Worker
    ) -> None:
        _join()
        rest = dict(resources or {})
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(there.get(name, 0) >= wanted for name, wanted in rest.items()) for there in machines):
            have = [{name: amount for name, amount in there.items() if ":" not in name} for there in machines]
            raise LoadError(f"no worker can be placed: resources={rest}, and the machines have {have}; ask for less")
        words: dict[str, Any] = {"max_restarts": -1, "max_task_retries": TRIES, "max_concurrency": AT_ONCE}
        own = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
        words |= {word: rest.pop(name) for name, word in own.items() if name in rest}
        self.actor = ray.remote(worker).options(**words, resources=rest).remote(load)

    def call(self, gate: Callable[[], object], stop: Callable[[], object], name: str, *args: Any) -> Any:
        gate()
        answer = getattr(self.actor, name).remote(*args)
        try:
            while not ray.wait([answer], timeout=PATIENCE)[0]:
                gate()
        except BaseException:
            stop()
            ray.wait([answer], timeout=60)  # it ends before its next pass
            raise
        try:
            return ray.get(answer)
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError as error:
            raise RuntimeError(f"its worker died {TRIES + 1} times, or cannot be started again: {error}") from error

    def tell(self, name: str, *args: Any) -> None:
        if ray.is_initialized():  # a call would start it again
            with suppress(Exception):  # who is gone holds nothing
                getattr(self.actor, name).remote(*args)


def member(
    load: Callable[[], Member], spec: str, name: str | None = None, resources: Mapping[str, float] | None = None
) -> Member:
    """A member that runs in a worker.

    Args:
        load: makes it there.
        spec: what errors call it.
        name: what weights and tables call it; None: as the worker does.
        resources: see ActorWire.

    Raises:
        LoadError: Ray is absent, too old or does not start, no worker can be placed, or it cannot be loaded there.
    """
    wire = ActorWire(load, resources)
    try:
        told = wire.call(lambda: None, lambda: None, "describe")
    except PackError as error:
        raise LoadError(f"worker of {spec!r}: {error}") from error
    except Exception as error:
        raise LoadError(f"worker of {spec!r} cannot be started: {type(error).__name__}: {error}") from error
    engine = RemoteEngine(wire, told, f"ray {wire.actor._actor_id.hex()}")
    return Member(None, told["tokenizer"], name or told["name"], Encoder(told["tokenizer"]), engine=engine)


def resources(text: str) -> dict[str, float]:
    """Of "GPU=1,CPU=2"; LoadError where that is something else."""
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    try:
        return {name.strip(): float(amount) for name, _, amount in pairs}
    except ValueError:
        raise LoadError(f"ray[{text}]: resources are written as GPU=1,CPU=2") from None


def _join() -> None:
    """Be part of the running cluster, or start a local one."""
    version = None if ray is None else tuple(int(part) for part in ray.__version__.split(".")[:2])
    if version is None or version < OLDEST:
        there = "" if version is None else f", not {ray.__version__}"
        raise LoadError(f"a member in a worker needs ray>={OLDEST[0]}.{OLDEST[1]}{there}; install packllm[ray]")
    if ray.is_initialized():
        return
    for name, value in LOCAL.items():
        os.environ.setdefault(name, value)
    words: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    try:
        try:
            ray.init(address="auto", **words)
        except ConnectionError:
            log.info("no Ray cluster runs here: a local one is started")
            ray.init(address="local", include_dashboard=False, **words)
    except Exception as error:
        raise LoadError(f"Ray does not start: {type(error).__name__}: {error}") from error
