"""A seed gives the same text alone and in company: in a batch, beside threads and tasks, whenever they come."""

from __future__ import annotations

import asyncio
import random
import threading
from typing import Any

import pytest
from conftest import TextPack as Pack

from packllm import Generation

PROMPTS = ["the court shall order", "日本", "once upon a time there was a little girl", "a"]
DRAWN: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 11, "max_tokens": 12}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
WAYS: dict[str, dict[str, Any]] = {
    "tokens": {},
    "drafts": {"draft_tokens": 4, "max_tokens": 30},
    "log pool": {"pool": "log"},
    "lazy": {"decoding": "lazy", "temperature": 1.0, "top_p": 1.0},
    "schema": {"json_schema": SCHEMA, "max_tokens": 24},
    "cool": {"decoding": "cool"},
    "cool+rerank": {"decoding": "cool+rerank"},
    "several vocabularies": {},
    "mined": {"decoding": "mined"},
    "mined schema": {"decoding": "mined", "json_schema": SCHEMA, "max_tokens": 24},
}


@pytest.fixture(scope="module")
def packs(make_member: Any) -> dict[bool, Pack]:
    """By whether the members have one vocabulary."""
    llama, gpt2, qwen = make_member("llama", 0), make_member("gpt2", 1), make_member("qwen", 2)
    return {True: Pack([llama, gpt2, qwen]), False: Pack([llama, make_member("llama", 1, "words"), gpt2])}


def asked(packs: dict[bool, Pack], way: str) -> tuple[Pack, dict[str, Any]]:
    if "schema" in way:
        pytest.importorskip("llguidance")
    pack = packs[way not in ("several vocabularies", "mined", "mined schema")]
    fixed = {member.name: weight for member, weight in zip(pack.members, (0.5, 0.3, 0.2), strict=True)}
    return pack, {**DRAWN, "weighting": fixed, **WAYS[way]}


def told(answer: Generation) -> tuple[str, str]:
    return answer.text, answer.finish_reason


@pytest.fixture(scope="module")
def alone(packs: dict[bool, Pack]) -> dict[str, list[tuple[str, str]]]:
    texts: dict[str, list[tuple[str, str]]] = {}
    for way in WAYS:
        pack, options = asked(packs, way)
        texts[way] = [told(pack.generate(prompt, prefix_cache_mb=0, **options)) for prompt in PROMPTS]
        assert len(set(texts[way])) > 1 or "schema" in way
    return texts


@pytest.mark.parametrize("way", WAYS)
def test_in_a_batch(packs: dict[bool, Pack], alone: dict[str, list[tuple[str, str]]], way: str) -> None:
    pack, options = asked(packs, way)
    turned = pack.generate_batch(PROMPTS[::-1], batch_size=3, **options)
    assert [told(answer) for answer in turned] == alone[way][::-1]


def test_beside_threads(packs: dict[bool, Pack], alone: dict[str, list[tuple[str, str]]]) -> None:
    """All ways at once, in an order and with passes between them that differ from thread to thread."""
    wrong: list[Any] = []
    ready = threading.Barrier(6)

    def caller(number: int) -> None:
        dice = random.Random(number)
        ready.wait()
        for way in dice.sample(sorted(WAYS), 5):
            pack, options = asked(packs, way)
            at = dice.randrange(len(PROMPTS))
            for _ in range(dice.randrange(3)):  # come later, by some passes
                pack.weigh(PROMPTS[at])
            try:
                if (answer := told(pack.generate(PROMPTS[at], **options))) != alone[way][at]:
                    wrong.append((way, PROMPTS[at], answer, alone[way][at]))
            except Exception as error:
                wrong.append((way, error))

    threads = [threading.Thread(target=caller, args=(number,), daemon=True) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


async def test_beside_tasks(packs: dict[bool, Pack], alone: dict[str, list[tuple[str, str]]]) -> None:
    async def task(number: int, way: str) -> tuple[str, str]:
        pack, options = asked(packs, way)
        async for _ in pack.astream(PROMPTS[number], max_tokens=1 + number):  # come later, by some passes
            pass
        return told(await pack.agenerate(PROMPTS[number], **options))

    jobs = [(number, way) for number in (0, 3) for way in WAYS]
    answers = await asyncio.gather(*(task(*job) for job in jobs))
    for (number, way), answer in zip(jobs, answers, strict=True):
        assert answer == alone[way][number], way
