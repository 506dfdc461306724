"""The faster floating-point type of this CPU: measured once, then cached."""

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
"""A typical request: passes by number of rows, 64 tokens written one by one and 1,024 read in blocks."""
SIZE = 1536
REPEATS = 7


def fastest() -> torch.dtype:
    """float32 or bfloat16: the type in which this CPU needs less time for the matrix products of a typical request
    (PASSES).

    With AVX512-BF16 or AMX, blocks of rows are several times faster in bfloat16, single rows not always. The first call
    measures this in about a second. The result is stored in the cache folder, by processor, PyTorch version and number
    of threads.
    """
    file = cache_folder() / "precision" / f"{_key()}.json"
    with suppress(OSError, ValueError):
        seconds = json.loads(file.read_text())
        if isinstance(seconds, dict) and all(len(seconds.get(name, ())) == len(PASSES) for name in CHOICES):
            return _chosen(seconds)
    seconds = {name: [_seconds(dtype, rows) for rows in PASSES] for name, dtype in CHOICES.items()}
    with suppress(OSError):  # without a writable cache each start takes a second longer
        _write(file, json.dumps(seconds))
    return _chosen(seconds)


def _chosen(seconds: dict[str, list[float]]) -> torch.dtype:
    total = {name: sum(n * time_ for n, time_ in zip(PASSES.values(), seconds[name], strict=True)) for name in CHOICES}
    return CHOICES[min(total, key=total.__getitem__)]


def _seconds(dtype: torch.dtype, rows: int) -> float:
    """The shortest time of a product with new matrices: other load can only make it longer."""
    matrices = [torch.ones(SIZE, SIZE, dtype=dtype) for _ in range(4)]  # more than fits the processor's caches
    inputs = torch.ones(rows, SIZE, dtype=dtype)
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        for matrix in matrices:
            torch.nn.functional.linear(inputs, matrix)
        times.append(time.perf_counter() - started)
    return min(times)


def _key() -> str:
    """A key made of the processor, PyTorch version and number of threads."""
    processor = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor += "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    content = f"{processor} {torch.__version__} {torch.get_num_threads()}"
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _write(file: Path, text: str) -> None:
    """Write a file atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=file.parent, prefix=".draft-")
    with os.fdopen(handle, "w") as stream:
        stream.write(text)
    os.replace(draft, file)
