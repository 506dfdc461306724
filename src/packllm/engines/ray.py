"""Members in workers of a Ray cluster: one master and K workers (Cool-Fusion, Figure 2), on one or several machines.

"ray:SPEC" starts an actor, in the running cluster or in a new local one, and the actor loads SPEC.
"ray[GPU=1,CPU=2]:SPEC" also states the resources it needs. Members in different workers run at the same time. Ray
restarts a worker that dies, and the worker reads its ids again.
"""

from __future__ import annotations

import logging
import os
import time
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
"""The oldest supported version of Ray."""

AT_ONCE = 64
"""Requests that one worker serves at a time; it batches their reads."""

TRIES = 3
"""How often a call is repeated if its worker dies."""

PLACING = 30.0
"""Seconds to wait for resources that other workers hold."""

PATIENCE = 0.05
"""Seconds between checks whether a read is still wanted."""

LOCAL = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_max_direct_call_object_size": str(4 * 2**20),
    "RAY_task_rpc_inlined_bytes_limit": str(64 * 2**20),
}
"""The environment of a local cluster. By default, rows of more than 100 kB would go through Ray's object store, which
doubles the time."""


class ActorWire:
    """A worker in a Ray actor (see remote.Wire).

    Args:
        load: makes the member in the worker.
        resources: what the worker's machine needs: CPU, GPU, memory (bytes), and names that the cluster defines.
        worker: the class of the worker.

    Raises:
        LoadError: Ray cannot be started, or no machine has these resources.
    """

    def __init__(
        self, load: Callable[[], Member], resources: Mapping[str, float] | None = None, worker: type[Worker] = Worker
    ) -> None:
        _join()
        needed = dict(resources or {})
        _check_placeable(needed)
        arguments: dict[str, Any] = {"max_restarts": -1, "max_task_retries": TRIES, "max_concurrency": AT_ONCE}
        standard = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
        arguments |= {argument: needed.pop(name) for name, argument in standard.items() if name in needed}
        try:
            self.actor = ray.remote(worker).options(**arguments, resources=needed).remote(load)
        except ValueError as error:  # a negative amount, one and a half GPUs
            raise LoadError(f"no worker can be placed: resources={dict(resources or {})}: {error}") from error

    def call(self, gate: Callable[[], object], stop: Callable[[], object], name: str, *args: Any) -> Any:
        gate()
        answer = getattr(self.actor, name).remote(*args)
        try:
            while not ray.wait([answer], timeout=PATIENCE)[0]:
                gate()
        except BaseException:
            stop()
            ray.wait([answer], timeout=60)  # it stops before its next pass
            raise
        try:
            return ray.get(answer)
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError as error:
            raise RuntimeError(f"its worker died {TRIES + 1} times, or cannot be started again: {error}") from error

    def tell(self, name: str, *args: Any) -> None:
        if ray.is_initialized():  # a call would start Ray again
            with suppress(Exception):  # a dead worker needs no message
                getattr(self.actor, name).remote(*args)


def member(
    load: Callable[[], Member], spec: str, name: str | None = None, resources: Mapping[str, float] | None = None
) -> Member:
    """A member that runs in a worker.

    Args:
        load: makes the member in the worker.
        spec: its name in error messages.
        name: its name in weights and tables; None: the worker's name of it.
        resources: see ActorWire.

    Raises:
        LoadError: Ray is not installed, too old or does not start, no worker can be placed, or the member cannot be
            loaded there.
    """
    wire = ActorWire(load, resources)
    try:
        description = wire.call(lambda: None, lambda: None, "describe")
    except PackError as error:
        raise LoadError(f"worker of {spec!r}: {error}") from error
    except Exception as error:
        raise LoadError(f"worker of {spec!r} cannot be started: {type(error).__name__}: {error}") from error
    engine = RemoteEngine(wire, description, f"ray {wire.actor._actor_id.hex()}")
    return Member(
        None, description["tokenizer"], name or description["name"], Encoder(description["tokenizer"]), engine=engine
    )


def resources(text: str) -> dict[str, float]:
    """Parse "GPU=1,CPU=2". Raise LoadError if it is anything else."""
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    try:
        return {name.strip(): float(amount) for name, _, amount in pairs}
    except ValueError:
        raise LoadError(f"ray[{text}]: write resources as GPU=1,CPU=2") from None


def _check_placeable(needed: Mapping[str, float]) -> None:
    """Raise LoadError if no machine has these resources, or others hold them: Ray would wait for ever."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(machine.get(name, 0) >= amount for name, amount in needed.items()) for machine in machines):
        have = [_named(machine) for machine in machines]
        raise LoadError(f"no worker can be placed: resources={needed}, and the machines have {have}; ask for less")
    start = {"CPU": 1.0, **needed}  # Ray places an actor where a CPU is free, also if it asks for none
    until = time.monotonic() + PLACING
    while any(free.get(name, 0) < amount for free in [ray.available_resources()] for name, amount in start.items()):
        if time.monotonic() > until:
            raise LoadError(
                f"no worker can be placed: resources={start}, and only {_named(ray.available_resources())} are free; "
                "close packs whose workers hold the others, or ask for less"
            )
        time.sleep(PATIENCE)


def _named(machine: Mapping[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in machine.items() if ":" not in name}


def _join() -> None:
    """Connect to the running cluster, or start a local one."""
    version = None if ray is None else tuple(int(part) for part in ray.__version__.split(".")[:2])
    if version is None or version < OLDEST:
        suffix = "" if version is None else f", not {ray.__version__}"
        raise LoadError(f"a member in a worker needs ray>={OLDEST[0]}.{OLDEST[1]}{suffix}; install packllm[ray]")
    if ray.is_initialized():
        return
    for name, value in LOCAL.items():
        os.environ.setdefault(name, value)
    arguments: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    try:
        try:
            ray.init(address="auto", **arguments)
        except ConnectionError:
            log.info("no Ray cluster runs here: a local one is started")
            ray.init(address="local", include_dashboard=False, **arguments)
    except Exception as error:
        raise LoadError(f"Ray does not start: {type(error).__name__}: {error}") from error
