"""The cores and memory that this process may use, by CPU affinity and control groups."""

from __future__ import annotations

import logging
import math
import os
import sys
from pathlib import Path

log = logging.getLogger("packllm")

_GROUPS = Path("/sys/fs/cgroup")
_PASSIVE = "OMP_WAIT_POLICY"


def cores(groups: Path = _GROUPS) -> int:
    """Number of cores that this process may use: its CPU affinity, and the quota of its control group (v2 or v1),
    rounded up."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(groups)
    return affinity if quota is None else max(1, min(affinity, math.ceil(quota)))


def _quota(groups: Path) -> float | None:
    """The quota of the control group in cores; None if there is none."""
    try:
        limit, period = (groups / "cpu.max").read_text().split()  # version 2
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:
        limit, period = ((groups / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))  # 1
        return None if int(limit) < 0 else int(limit) / int(period)
    except (OSError, ValueError):
        return None


def free_memory(groups: Path = _GROUPS, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes of memory that this process may still allocate: the machine's available memory, and the rest of the limit
    of its control group (v2 or v1)."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else sys.maxsize
    for folder, limit_file, used_file in (
        (groups, "memory.max", "memory.current"),
        (groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            limit, used_bytes = int((folder / limit_file).read_text()), int((folder / used_file).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # there is no limit
            continue
        cached = int(
            stat.get("total_inactive_file") or stat.get("inactive_file") or 0
        )  # the kernel frees it when needed
        free = min(free, max(0, limit - used_bytes + cached))
    return free


def wait_passively() -> None:
    """Let torch's threads sleep at barriers instead of spinning. Only works before torch is loaded.

    Beside another busy process, two spinning threads decode 5 to 45 times slower than one; sleeping threads do not.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault(_PASSIVE, "PASSIVE")


def settle_threads() -> None:
    """Limit torch's threads to the number of cores, unless OMP_NUM_THREADS is set; log once if the threads spin."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores():
        torch.set_num_threads(cores())
    if torch.get_num_threads() > 1 and os.environ.get(_PASSIVE, "").upper() != "PASSIVE" and not _said:
        _said.append(True)
        log.info(
            "torch was loaded before packllm and its %d threads spin while they wait: beside other busy processes set "
            "OMP_WAIT_POLICY=PASSIVE before the program starts, or import packllm first",
            torch.get_num_threads(),
        )


_said: list[bool] = []
