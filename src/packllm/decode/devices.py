"""Members on several devices run at the same time, not one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch


def across_devices(
    devices: Sequence[torch.device], runs: Sequence[Callable[[], object]], go_on: bool
) -> list[Exception | None]:
    """Call every run; those of one device in turn, those of different devices at once, a thread a device.

    Args:
        devices: where each run works.
        runs: what to call; results are ignored.
        go_on: whether a device goes on after one of its runs has failed.

    Returns:
        For each run, in order, the exception that it raised, or None.
    """
    failures: list[Exception | None] = [None] * len(runs)

    def work(device: torch.device) -> None:
        for at, run in enumerate(runs):
            if devices[at] == device:
                try:
                    run()
                except Exception as error:  # the caller decides, once all are done
                    failures[at] = error
                    if not go_on:
                        return

    distinct = list(dict.fromkeys(devices))
    if len(distinct) <= 1:
        for device in distinct:
            work(device)
    else:
        with ThreadPoolExecutor(len(distinct)) as pool:
            list(pool.map(work, distinct))
    return failures
