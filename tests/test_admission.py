"""Requests in flight keep to the pack's bound on their caches, and are served in the order in which they came."""

from __future__ import annotations

import threading

import pytest
from conftest import TextPack as Pack

from packllm import CancelledError
from packllm.decode.admission import Admission

PROMPT = "The court shall order relief"


def nothing() -> None:
    pass


def test_first_come_first_served_within_the_bound():
    admission, order = Admission(10), []
    first = admission.admitted(6, nothing)
    first.__enter__()
    entered = [threading.Event() for _ in range(3)]
    leave = threading.Event()

    def ask(at: int, need: int) -> None:
        with admission.admitted(need, nothing):
            order.append(at)
            entered[at].set()
            leave.wait(10)

    threads = []
    for at, need in enumerate((6, 2, 99)):  # the second would fit beside the first, but came after one that does not
        threads.append(threading.Thread(target=ask, args=(at, need)))
        threads[-1].start()
        while len(admission.waiting) < at + 1:
            pass
    assert order == []
    first.__exit__(None, None, None)
    assert entered[0].wait(10)
    assert entered[1].wait(10)
    assert not entered[2].is_set()  # more than the bound: alone
    leave.set()
    assert entered[2].wait(10)
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2]


def test_who_waits_can_leave():
    admission = Admission(1)

    def stop() -> None:
        raise CancelledError("enough")

    with admission.admitted(1, nothing):
        with pytest.raises(CancelledError), admission.admitted(1, stop):
            pass
        assert not admission.waiting
    with admission.admitted(1, nothing):
        pass


def test_a_pack_keeps_to_its_bound(members):
    pack = Pack(members, max_tokens=12, max_cache_mb=1, prefix_cache_mb=0)
    one = pack._request([PROMPT], pack.options).cache_bytes()
    assert one >= sum(2 * 2 * 2 * 8 * 4 * (len(member.encoder.plain(PROMPT)) + 12) for member in members[:1])
    pack._admission.limit = int(2.5 * one)
    inside, most, lock = set(), [], threading.Lock()
    expected = pack.generate(PROMPT).text
    texts = [""] * 6

    def ask(at: int) -> None:
        for chunk in pack.stream(PROMPT, draft_tokens=1):
            with lock:
                inside.add(at)
                most.append(len(inside))
            texts[at] += chunk.text
            if chunk.finish_reason:
                with lock:
                    inside.discard(at)

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [expected] * 6
    assert max(most) <= 2
