"""Time, ratios and memory."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from packllm.engines.member import Member


def bar(items: Iterable[Any], title: str) -> Iterable[Any]:
    """The items, with a progress bar where stderr is a terminal."""
    return tqdm(items, desc=title, leave=False, disable=None)


def timed(times: dict[str, list[float]], name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function; append its duration in seconds to times[name]."""
    synchronize()
    started = time.perf_counter()
    result = function(*arguments)
    synchronize()
    times.setdefault(name, []).append(time.perf_counter() - started)
    return result


def synchronize() -> None:
    """Wait until a GPU has finished its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def ratio(ours: Sequence[float] | None, theirs: Sequence[float] | None) -> float | None:
    """Median of the repeats' ratios; each compares two measurements that are close in time."""
    if not ours or not theirs:
        return None
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def peak_mib(members: Sequence[Member], function: Callable[..., None], *arguments: Any) -> float | None:
    """Peak memory in MiB while the function runs: of the GPU if members are on one, else of the process. None if the
    system cannot tell.
    """
    gc.collect()
    if any(member.model.device.type == "cuda" for member in members):
        torch.cuda.reset_peak_memory_stats()
        function(*arguments)
        return torch.cuda.max_memory_allocated() / 2**20
    with suppress(OSError, AttributeError):  # glibc only: return freed memory to the system
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the current size
    except OSError:
        return None
    function(*arguments)
    match = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(match[1]) / 1024 if match else None
