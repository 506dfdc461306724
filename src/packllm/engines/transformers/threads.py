"""How many threads a pass over few tokens runs with on a CPU."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

FEW = 31
"""Tokens of a pass for which the number of threads is tried; passes over more run with all."""

TRIALS = 4
"""Passes of one size with each number of threads, before the quicker is kept."""


class Threads:
    """Runs the first passes of each size with all threads and with one in turn, and the later ones with what was
    quicker.

    A pass over few tokens is hundreds of small matrix products. Threads that sleep between them have to be woken for
    each. With a small model that costs more time than they save; with a large one it does not. The model, the machine
    and the number of tokens decide, so it is measured. The passes of all models on a CPU run one after the other (see
    Meeting), so nobody else's number of threads is changed.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._all = torch.get_num_threads()
        self._seconds: defaultdict[tuple[int, int], list[float]] = defaultdict(list)  # by tokens and threads

    @contextmanager
    def of_pass(self, tokens: int) -> Iterator[None]:
        """While this is open, this thread computes with the number of threads for a pass over so many tokens."""
        current = torch.get_num_threads()
        if current > 1 or threading.current_thread() is threading.main_thread():
            self._all = current  # a thread that first used torch during a pass of one thread has 1 by accident
        trials = {count: self._seconds[tokens, count] for count in {self._all, 1} if tokens <= FEW}
        count = min(trials, key=lambda count: (len(trials[count]), -count), default=self._all)
        trying = count in trials and len(trials[count]) < TRIALS
        if trials and not trying:
            count = min(trials, key=lambda count: min(trials[count]))
        if count != current:
            torch.set_num_threads(count)
        started = self._clock()
        try:
            yield
            if trying:
                trials[count].append(self._clock() - started)
        finally:
            if torch.get_num_threads() != self._all:
                torch.set_num_threads(self._all)
