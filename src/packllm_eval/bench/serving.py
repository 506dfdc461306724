"""Figures of `packllm serve`: against a batch in this process, and against llama-cpp-python's server."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from statistics import median, quantiles

import torch

from packllm import starter
from packllm.engines.load import Loader
from packllm.errors import LoadError
from packllm.pack import Pack
from packllm_eval.bench.measure import bar, ratio, timed
from packllm_eval.bench.report import Report
from packllm_eval.bench.subjects import prose

CLIENTS = 8
SECONDS = 120
"""Seconds within which a server must load, or send the next part of an answer."""

CHARACTERS = 4
"""Characters of a token, approximately."""
OURS = "from packllm.cli import app; app()"
COMPLETIONS = "/v1/completions"


@dataclass(frozen=True)
class Answered:
    """An answer that one client received: seconds until its first text, and its number of tokens."""

    first: float
    tokens: int


def serving(report: Report, prompt: int, tokens: int, repeat: int, skip: bool) -> None:
    """Compare the throughput of `packllm serve`, with one client and with eight, to that of one batch of the same
    prompts and to that of llama-cpp-python's server. All run the starter's base as a .gguf file. Also measure the time
    to the first token.

    Args:
        prompt: approximate number of tokens of each prompt.
        tokens: maximum number of tokens of each answer.
    """
    file = starter.base_file()
    missing = [name for name in ("uvicorn", "fastapi", "llama_cpp") if importlib.util.find_spec(name) is None]
    if skip or file is None or missing:
        report.notes.append("serve: not measured" + (f"; not installed: {', '.join(missing)}" if not skip else ""))
        return
    pack = Pack(
        Loader(engine="llama.cpp").members([str(file)]), chat_template=False, max_tokens=tokens, batch_size=CLIENTS
    )
    threads, times = torch.get_num_threads(), dict[str, list[float]]()
    firsts: list[float] = []
    with _listening(_ours(str(file)), threads) as ours, _listening(_theirs(str(file), threads), threads) as theirs:
        assert ours is not None
        if theirs is None:
            report.notes.append("serve: llama-cpp-python's server, or what it needs, is not installed")
        texts = _prompts(prompt)
        for port in (ours, theirs):
            if port is not None:
                _ask(port, next(texts), tokens)
        for _ in bar(range(repeat), "Serve"):
            # Each run has new prompts, so that cached ones do not count.
            for clients in (1, CLIENTS):
                asked = [next(texts) for _ in range(clients)]
                times.setdefault(f"served_{clients}", []).append(_token(ours, asked, tokens, firsts))
                if theirs is not None:
                    times.setdefault(f"llama_cpp_{clients}", []).append(_token(theirs, asked, tokens))
            answers = timed(times, "batch", pack.generate_batch, asked)
            times["batch"][-1] /= sum(one.usage.completion_tokens for one in answers)
    report.figures["serve.batch"] = ratio(times["batch"], times[f"served_{CLIENTS}"])
    for clients in (1, CLIENTS):
        report.figures[f"serve.llama_cpp_{clients}"] = ratio(
            times.get(f"llama_cpp_{clients}"), times[f"served_{clients}"]
        )
    cuts = quantiles(firsts, n=20, method="inclusive")
    report.figures |= {"serve.first_p50": cuts[9], "serve.first_p95": cuts[18]}
    report.seconds |= {f"token_{name}": median(values) for name, values in times.items()}


def _prompts(tokens: int) -> Iterator[str]:
    """Prompts that differ from the first word."""
    text, length = prose(), CHARACTERS * tokens
    return (text[at : at + length] for at in range(0, len(text) - length, length))


def _ours(file: str) -> list[str]:
    return [sys.executable, "-c", OURS, "serve", "-m", file, "--port"]


def _theirs(file: str, threads: int) -> list[str] | None:
    if any(importlib.util.find_spec(name) is None for name in ("llama_cpp", "starlette_context", "sse_starlette")):
        return None
    counts = ["--n_threads", str(threads), "--n_threads_batch", str(threads)]
    quiet = ["--interrupt_requests", "false", "--verbose", "false"]
    return [sys.executable, "-m", "llama_cpp.server", "--model", file, *counts, *quiet, "--port"]


@contextmanager
def _listening(command: list[str] | None, threads: int) -> Iterator[int | None]:
    """Start a server with a command, and give its port; None without a command."""
    if command is None:
        yield None
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    with subprocess.Popen([*command, str(port)], **quiet) as server:  # type: ignore[call-overload]
        try:
            end = time.monotonic() + SECONDS
            while not _ready(port):
                if server.poll() is not None or time.monotonic() > end:
                    raise LoadError(f"the server did not start: {' '.join(command)}")
                time.sleep(0.1)
            yield port
        finally:
            server.terminate()


def _ready(port: int) -> bool:
    with suppress(OSError):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/v1/models")
        return connection.getresponse().status == 200
    return False


def _token(port: int, prompts: Sequence[str], tokens: int, firsts: list[float] | None = None) -> float:
    """Send all prompts at once, each by its own client. Returns the seconds per token."""
    with ThreadPoolExecutor(len(prompts)) as clients:
        started = time.perf_counter()
        answers = list(clients.map(lambda prompt: _ask(port, prompt, tokens), prompts))
        seconds = time.perf_counter() - started
    if firsts is not None and len(prompts) > 1:
        firsts.extend(one.first for one in answers)
    return seconds / sum(one.tokens for one in answers)


def _ask(port: int, prompt: str, tokens: int) -> Answered:
    """Ask for one streamed answer."""
    body = {"model": "pack", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    started, first, pieces, usage = time.perf_counter(), 0.0, 0, None
    connection.request(
        "POST",
        COMPLETIONS,
        json.dumps({**body, "stream_options": {"include_usage": True}}),
        {"Content-Type": "application/json"},
    )
    answer = connection.getresponse()
    for line in answer:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if event["choices"] and event["choices"][0]["text"]:
            first = first or time.perf_counter() - started
            pieces += 1
        usage = event.get("usage") or usage
    connection.close()
    # llama-cpp-python's server sends no usage in streams, but one piece per token.
    return Answered(first, usage["completion_tokens"] if usage else pieces)
