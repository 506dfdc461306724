"""Passes over few tokens run with the number of threads that was quicker."""

import threading
from collections.abc import Iterator

import pytest
import torch

from packllm.engines.transformers.threads import FEW, TRIALS, Threads


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Clock:
    """A clock on which passes take what `cost` says of tokens and threads."""

    def __init__(self, cost) -> None:
        self.cost, self.now = cost, 0.0

    def __call__(self) -> float:
        return self.now

    def run(self, threads: Threads, tokens: int) -> int:
        """The number of threads that a pass had."""
        with threads.of_pass(tokens):
            count = torch.get_num_threads()
            self.now += self.cost(tokens, count)
        assert torch.get_num_threads() == 2
        return count


def test_one_thread_where_waking_costs_more_and_all_where_it_pays():
    clock = Clock(lambda tokens, count: count if tokens < 8 else tokens / count)
    threads = Threads(clock)
    for tokens, best in ((4, 1), (16, 2)):
        tried = [clock.run(threads, tokens) for _ in range(2 * TRIALS)]
        assert sorted(tried) == [1] * TRIALS + [2] * TRIALS
        assert [clock.run(threads, tokens) for _ in range(5)] == [best] * 5


def test_a_slow_moment_does_not_decide():
    costs = iter([9.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0])
    clock = Clock(lambda tokens, count: next(costs, 0.0))
    threads = Threads(clock)
    order = [clock.run(threads, 1) for _ in range(2 * TRIALS)]
    assert order[0] == order[2] == 2
    assert clock.run(threads, 1) == 2


def test_prompts_run_with_all_threads():
    clock = Clock(lambda tokens, count: count)
    threads = Threads(clock)
    assert {clock.run(threads, tokens) for tokens in (FEW + 1, 256) for _ in range(3 * TRIALS)} == {2}


def test_a_pass_that_fails_gives_the_threads_back_and_is_no_trial():
    clock = Clock(lambda tokens, count: count)
    threads = Threads(clock)
    clock.run(threads, 4)
    for _ in range(3 * TRIALS):
        with pytest.raises(RuntimeError, match="broken"), threads.of_pass(4):
            raise RuntimeError("broken")
        assert torch.get_num_threads() == 2
    assert sorted(clock.run(threads, 4) for _ in range(2 * TRIALS - 1)) == [1] * TRIALS + [2] * (TRIALS - 1)


def test_what_the_user_sets_later_holds():
    threads = Threads(Clock(lambda tokens, count: 1 / count))
    torch.set_num_threads(1)
    with threads.of_pass(4):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)


def test_a_thread_that_began_during_a_pass_of_one_gets_all():
    threads, seen = Threads(Clock(lambda tokens, count: 1 / count)), []

    def read() -> None:
        torch.set_num_threads(1)  # as a thread has it that first used torch while a pass ran with one
        with threads.of_pass(FEW + 1):
            seen.append(torch.get_num_threads())
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    assert seen == [2, 2]
