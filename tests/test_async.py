"""Answers for asyncio: the loop stays free, tasks share passes, a cancelled task stops the work."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing

import pytest
from conftest import TextPack as Pack

from packllm import OptionError

PROMPTS = [f"The court shall order relief {at}" for at in range(12)]


async def test_tasks_give_what_calls_give(members):
    pack = Pack(members, max_tokens=10, prefix_cache_mb=0)
    expected = [pack.generate(prompt).text for prompt in PROMPTS]
    alone = sum(member.engine.forwards for member in members)
    answers = await asyncio.gather(*(pack.agenerate(prompt) for prompt in PROMPTS))
    assert [answer.text for answer in answers] == expected
    assert sum(member.engine.forwards for member in members) - alone < alone / 2  # they shared passes


async def test_a_stream_gives_the_same_chunks_and_leaves_the_loop_free(members):
    pack = Pack(members, max_tokens=12)
    expected = [chunk.text for chunk in pack.stream(PROMPTS[0])]
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    chunks = [chunk async for chunk in pack.astream(PROMPTS[0])]
    ticking.cancel()
    assert "".join(chunk.text for chunk in chunks) == "".join(expected)
    assert chunks[-1].finish_reason is not None
    assert ticks > len(chunks)


async def test_a_task_that_is_cancelled_stops_before_the_next_pass(members):
    pack = Pack(members, max_tokens=200, draft_tokens=1)
    async with aclosing(pack.astream(PROMPTS[0])) as chunks:
        async for _ in chunks:
            break
    await asyncio.sleep(0.2)
    spent = [member.engine.forwards for member in members]
    await asyncio.sleep(0.2)
    assert [member.engine.forwards for member in members] == spent
    assert max(spent) < 100


async def test_errors_reach_the_task(members):
    with pytest.raises(OptionError, match="top_p"):
        await Pack(members).agenerate("a", top_p=7)


async def test_a_decision_leaves_the_loop_free_and_ends_with_its_task(members):
    pack = Pack(members, prefix_cache_mb=0)
    found = await pack.adecide(PROMPTS[0], ["unless", "under"])
    assert found.probabilities == pack.decide(PROMPTS[0], ["unless", "under"]).probabilities
    reading, go = threading.Event(), threading.Event()
    hook = members[0].model.base_model.register_forward_pre_hook(lambda *args: reading.set() or (go.wait(30) and None))
    cancel = threading.Event()
    try:
        task = asyncio.create_task(pack.adecide(PROMPTS[1], ["unless", "under"], cancel=cancel))
        while not reading.is_set():
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert cancel.is_set()
    finally:
        go.set()
        hook.remove()
