"""The number of threads of passes over few tokens on a CPU."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

FEW = 64
"""Passes over at most so many tokens try how many threads are best; larger ones use all threads."""

TRIALS = 4
"""Passes of each size and number of threads that are timed before the faster number is used."""


class Threads:
    """Runs the first passes of each size with all threads and with one thread in turn, and later ones with the faster
    of the two.

    A pass over few tokens has hundreds of small matrix products. Threads that sleep between them must be woken for
    each. With a small model this costs more time than the threads save, with a large one it does not. So it is
    measured. The passes of all models on a CPU run one after the other (see Meeting), so no other pass's threads are
    changed.

    Args:
        clock: a function that returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._all = torch.get_num_threads()
        self._seconds: defaultdict[tuple[int, int], list[float]] = defaultdict(list)  # by tokens and threads

    @contextmanager
    def of_pass(self, tokens: int) -> Iterator[None]:
        """Within this context, this thread computes with the number of threads for a pass over so many tokens."""
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
