"""Benchmarks of concurrent requests, of growth with context and members, and of threads beside a busy core."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from statistics import median
from typing import Any
from unittest.mock import patch

from packllm import machine
from packllm.engines.member import Member
from packllm.pack import Pack
from packllm_eval.bench.measure import bar, ratio, timed
from packllm_eval.bench.report import Report
from packllm_eval.bench.subjects import noisy_copy, random_member, text_of

THREADS, TASKS, CROWD = 8, 32, 64
GROWN = (1024, 4096, 8000)
MOST = 16
QUESTION = "What is said here?"

IMPORTS = {
    "packllm": "import packllm",
    "pack": "from packllm import Pack",  # torch, and the parts of transformers that a pack needs
    "theirs": "import transformers, torch",
}

DECODE = """
import torch, time
from packllm import Pack
torch.set_num_threads({threads})
from packllm_eval.bench.subjects import random_member
member = random_member(quick=False)
member.end_ids = frozenset()
pack = Pack([member], chat_template=False, max_tokens={tokens})
pack.generate("the")
started = time.perf_counter()
pack.generate("the")
print(time.perf_counter() - started)
"""


def company(report: Report, members: Sequence[Member], text: str, tokens: int, repeat: int) -> None:
    """Requests from threads and tasks: their time over that of the same requests as one batch."""
    pack = Pack(members, chat_template=False, max_tokens=tokens, batch_size=TASKS, prefix_cache_mb=0)
    prompts = _different(text, TASKS)
    times: dict[str, list[float]] = {}
    pack.generate_batch(prompts[:2])
    for _ in bar(range(repeat), "Company"):
        timed(times, "threads", _in_threads, pack, prompts[:THREADS])
        timed(times, "batch_of_8", pack.generate_batch, prompts[:THREADS])
        timed(times, "tasks", _in_tasks, pack, prompts)
        timed(times, "batch_of_32", pack.generate_batch, prompts)
    report.figures["company.threads"] = ratio(times["threads"], times["batch_of_8"])
    report.figures["company.tasks"] = ratio(times["tasks"], times["batch_of_32"])
    report.seconds |= {name: median(values) for name, values in times.items()}


def beside(report: Report, members: Sequence[Member], long: str, tokens: int, repeat: int) -> None:
    """A short question while a long prompt is read: its time over that of the question alone."""
    pack = Pack(members, chat_template=False, max_tokens=tokens, prefix_cache_mb=0)
    times: dict[str, list[float]] = {}
    pack.generate(QUESTION)
    for _ in bar(range(repeat), "Beside"):
        timed(times, "question_alone", pack.generate, QUESTION)
        started, engine = threading.Event(), members[0].engine

        def watched(parts: Any, run: Any = engine.run, started: threading.Event = started) -> None:  # type: ignore[attr-defined]
            started.set()
            run(parts)

        with patch.object(engine, "run", watched):
            reading = threading.Thread(target=pack.generate, args=(long,), kwargs={"max_tokens": 1})
            reading.start()
            started.wait()
            timed(times, "question_beside", pack.generate, QUESTION)
        reading.join()
    report.figures["company.beside"] = ratio(times["question_beside"], times["question_alone"])
    report.seconds |= {name: median(values) for name, values in times.items()}


def passes(report: Report, tokens: int) -> None:
    """Passes over the weights for many concurrent requests, over those for one batch of them; three tiny models."""
    first = random_member(quick=True)
    trio = [first, noisy_copy(first, 1), noisy_copy(first, 2)]
    for member in trio:
        member.end_ids = frozenset()
    pack = Pack(trio, chat_template=False, max_tokens=tokens, batch_size=CROWD, prefix_cache_mb=0, min_weight=0.0)
    text = text_of(trio, 60)
    prompts = _different(text, CROWD)
    counts = [_counted(trio, _in_threads, pack, prompts), _counted(trio, pack.generate_batch, prompts)]
    report.figures["company.passes"] = counts[0] / counts[1]


def _different(text: str, count: int) -> list[str]:
    """Prompts without a common prefix."""
    return [f"{at} {text}" for at in range(count)]


def _counted(members: Sequence[Member], function: Callable[..., Any], *arguments: Any) -> int:
    """Passes that the members' engines run during a call of the function."""
    runs: list[int] = []
    with ExitStack() as stack:
        for engine in {id(member.engine): member.engine for member in members}.values():
            run = engine.run  # type: ignore[attr-defined]
            stack.enter_context(
                patch.object(engine, "run", lambda parts, run=run: runs.append(1) or run(parts))  # type: ignore
            )
        function(*arguments)
    return len(runs)


def _in_threads(pack: Pack, prompts: Sequence[str]) -> None:
    threads = [threading.Thread(target=pack.generate, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _in_tasks(pack: Pack, prompts: Sequence[str]) -> None:
    async def all_of_them() -> None:
        await asyncio.gather(*(pack.agenerate(prompt) for prompt in prompts))

    asyncio.run(all_of_them())


def growth(report: Report, members: Sequence[Member], room: int, tokens: int, repeat: int) -> None:
    """The time of one step of all members: eight rows over one; long contexts over a short one; K small models over K
    steps of one."""
    even = {member.name: 1 / len(members) for member in members}
    pack = Pack(members, chat_template=False, max_tokens=tokens, weighting=even, draft_tokens=1)
    short = text_of(members, min(128, room))
    times: dict[str, list[float]] = {}
    contexts = {length: text_of(members, length) for length in GROWN if length <= room - tokens}
    for _ in bar(range(repeat), "Growth"):
        times.setdefault("step_at_128", []).append(_step(pack, [short]))
        times.setdefault("step_of_8_rows", []).append(_step(pack, _different(short, 8)))
        for length, text in contexts.items():
            times.setdefault(f"step_at_{length}", []).append(_step(pack, [text]))
    report.figures["growth.rows"] = ratio(times["step_of_8_rows"], times["step_at_128"])
    for length in contexts:
        report.figures[f"growth.{length}"] = ratio(times[f"step_at_{length}"], times["step_at_128"])
    first = random_member(quick=room < 200)
    crowd = [first, *(noisy_copy(first, seed) for seed in range(1, MOST))]
    for member in crowd:
        member.end_ids = frozenset()
    text = text_of(crowd[:1], 64)
    for _ in bar(range(repeat), "Members"):
        for count in (1, MOST):
            even_weights = {member.name: 1 / count for member in crowd[:count]}
            several = Pack(
                crowd[:count], chat_template=False, max_tokens=tokens, weighting=even_weights, draft_tokens=1
            )
            times.setdefault(f"step_of_{count}_members", []).append(_step(several, [text]))
    report.figures["growth.members"] = ratio(
        times[f"step_of_{MOST}_members"], [MOST * seconds for seconds in times["step_of_1_members"]]
    )
    report.seconds |= {name: median(values) for name, values in times.items()}


def _step(pack: Pack, prompts: Sequence[str]) -> float:
    """Seconds per token after the prefill."""
    generation = pack.generate_batch(prompts)[-1]
    timings = generation.timings
    return (timings["total"] - timings["first_token"]) / (generation.usage.completion_tokens - 1)


def threads(report: Report, tokens: int, repeat: int, skip: bool) -> None:
    """Decoding with two threads over one, in seconds, while a loop keeps one core busy and while none does. The threads
    wait passively, or spin, as torch's do by default."""
    if skip or machine.cores() < 2:
        report.notes.append("threads: not measured" + ("" if skip else ", this process has one core"))
        return
    times: dict[str, list[float]] = {}
    for _ in bar(range(repeat), "Threads"):
        for state, beside in (("busy", _Busy), ("idle", nullcontext)):
            with beside():
                for name, count, policy in (("one", 1, "PASSIVE"), ("passive", 2, "PASSIVE"), ("active", 2, "ACTIVE")):
                    program = DECODE.format(threads=count, tokens=tokens)
                    output = _python(program, OMP_NUM_THREADS=str(count), OMP_WAIT_POLICY=policy)
                    times.setdefault(f"{state}_{name}", []).append(float(output))
    for state in ("busy", "idle"):
        report.figures[f"threads.{state}"] = ratio(times[f"{state}_passive"], times[f"{state}_one"])
        report.figures[f"threads.{state}_spinning"] = ratio(times[f"{state}_active"], times[f"{state}_one"])
    report.seconds |= {name: median(values) for name, values in times.items()}


class _Busy:
    """A process that keeps one core busy."""

    def __enter__(self) -> None:
        self._loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])

    def __exit__(self, *exc: object) -> None:
        self._loop.kill()
        self._loop.wait()


def imports(report: Report, repeat: int) -> None:
    """Processes that import packllm, or its Pack, over one that imports transformers and torch, in seconds."""
    times: dict[str, list[float]] = {}
    for _ in bar(range(repeat), "Imports"):
        for name, program in IMPORTS.items():
            timed(times, f"import_{name}", _python, program)
    report.figures["start.import"] = ratio(times["import_packllm"], times["import_theirs"])
    report.figures["start.import_pack"] = ratio(times["import_pack"], times["import_theirs"])
    report.seconds |= {name: median(values) for name, values in times.items()}


def _python(program: str, **environment: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, env={**os.environ, **environment}
    )
    return process.stdout
