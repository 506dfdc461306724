"""Which floating-point type is the fastest on this CPU: measured once, then remembered."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch

from packllm.cache import cache_folder

CHOICES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PASSES = {1: 64, 64: 16}
"""Passes of so many rows that a request is taken to make: 64 tokens written one by one, 1,024 read in blocks."""
SIZE = 1536
REPEATS = 7


def fastest() -> torch.dtype:
    """float32 or bfloat16, in which this CPU does the matrix products of a typical request (PASSES) in less time.

    With AVX512-BF16 or AMX, blocks of rows are several times faster in bfloat16; single rows need not be.
    Measured at the first call, in about a second; the result stays in the cache folder, one for each processor,
    PyTorch and number of threads.
    """
    file = cache_folder() / "precision" / f"{_key()}.json"
    with suppress(OSError, ValueError):
        seconds = json.loads(file.read_text())
        if isinstance(seconds, dict) and all(len(seconds.get(name, ())) == len(PASSES) for name in CHOICES):
            return _chosen(seconds)
    seconds = {name: [_seconds(dtype, rows) for rows in PASSES] for name, dtype in CHOICES.items()}
    with suppress(OSError):  # a cache that cannot be written costs a second at each start
        _write(file, json.dumps(seconds))
    return _chosen(seconds)


def _chosen(seconds: dict[str, list[float]]) -> torch.dtype:
    total = {name: sum(n * spent for n, spent in zip(PASSES.values(), seconds[name], strict=True)) for name in CHOICES}
    return CHOICES[min(total, key=total.__getitem__)]


def _seconds(dtype: torch.dtype, rows: int) -> float:
    """The least time that a product with fresh matrices takes: a busy machine only ever slows one down."""
    matrices = [torch.ones(SIZE, SIZE, dtype=dtype) for _ in range(4)]  # more than stays in the nearest caches
    inputs = torch.ones(rows, SIZE, dtype=dtype)
    spent = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        for matrix in matrices:
            torch.nn.functional.linear(inputs, matrix)
        spent.append(time.perf_counter() - started)
    return min(spent)


def _key() -> str:
    """Names the processor, PyTorch and number of threads."""
    told = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told += "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    described = f"{told} {torch.__version__} {torch.get_num_threads()}"
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _write(file: Path, text: str) -> None:
    """All of the file at once: another process sees the whole or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=file.parent, prefix=".draft-")
    with os.fdopen(handle, "w") as opened:
        opened.write(text)
    os.replace(draft, file)
