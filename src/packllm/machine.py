"""What this process may use of the machine: cores and memory, as affinity and control groups allow."""

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
    """Cores that this process may keep busy: its affinity, and the quota of its control group (v2 or v1), rounded
    up."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(groups)
    return affinity if quota is None else max(1, min(affinity, math.ceil(quota)))


def _quota(groups: Path) -> float | None:
    """Cores of the control group's quota; None if there is none."""
    try:
        most, period = (groups / "cpu.max").read_text().split()  # version 2
        return None if most == "max" else int(most) / int(period)
    except (OSError, ValueError):
        pass
    try:
        most, period = ((groups / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))  # 1
        return None if int(most) < 0 else int(most) / int(period)
    except (OSError, ValueError):
        return None


def wait_passively() -> None:
    """Let torch's threads sleep at a barrier instead of spinning, if torch is not loaded yet.

    Two spinning threads beside another busy process decode 5 to 45 times slower than one; sleeping ones do not.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault(_PASSIVE, "PASSIVE")


def settle_threads() -> None:
    """Give torch as many threads as there are cores, unless somebody chose; say so once where they spin."""
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
