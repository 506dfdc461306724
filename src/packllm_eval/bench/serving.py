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
"""That a server may take to load."""

CHARACTERS = 4  # a token, about
OURS = "from packllm.cli import app; app()"
COMPLETIONS = "/v1/completions"


@dataclass(frozen=True)
class Answered:
    """What one client saw of an answer: seconds to its first text, and tokens."""

    first: float
    tokens: int


def serving(report: Report, prompt: int, tokens: int, repeat: int, skip: bool) -> None:
    """Tokens a second of a server of the starter's base as a .gguf file, at one client and at eight, over those of the
    same prompts in a batch, and over those of llama-cpp-python's server with the same file; seconds to a first token.

    Args:
        prompt: tokens of each prompt, about.
        tokens: of each answer, at most.
    """
    file = starter.base_file()
    lacking = [name for name in ("uvicorn", "fastapi", "llama_cpp") if importlib.util.find_spec(name) is None]
    if skip or file is None or lacking:
        report.notes.append("serve: not measured" + (f"; not installed: {', '.join(lacking)}" if not skip else ""))
        return
    pack = Pack(
        Loader(engine="llama.cpp").members([str(file)]), chat_template=False, max_tokens=tokens, batch_size=CLIENTS
    )
    threads, spent = torch.get_num_threads(), dict[str, list[float]]()
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
            # Every run has prompts of its own: what a server keeps of earlier ones is not measured here.
            for clients in (1, CLIENTS):
                given = [next(texts) for _ in range(clients)]
                spent.setdefault(f"served_{clients}", []).append(_token(ours, given, tokens, firsts))
                if theirs is not None:
                    spent.setdefault(f"llama_cpp_{clients}", []).append(_token(theirs, given, tokens))
            found = timed(spent, "batch", pack.generate_batch, given)
            spent["batch"][-1] /= sum(one.usage.completion_tokens for one in found)
    report.figures["serve.batch"] = ratio(spent["batch"], spent[f"served_{CLIENTS}"])
    for clients in (1, CLIENTS):
        report.figures[f"serve.llama_cpp_{clients}"] = ratio(
            spent.get(f"llama_cpp_{clients}"), spent[f"served_{clients}"]
        )
    cuts = quantiles(firsts, n=20, method="inclusive")
    report.figures |= {"serve.first_p50": cuts[9], "serve.first_p95": cuts[18]}
    report.seconds |= {f"token_{name}": median(values) for name, values in spent.items()}


def _prompts(tokens: int) -> Iterator[str]:
    """Prose that differs from the first word on."""
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
    """The port of a server that a command starts; None without a command."""
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
    """Seconds a token of prompts that are asked at once, each by a client of its own."""
    with ThreadPoolExecutor(len(prompts)) as clients:
        started = time.perf_counter()
        found = list(clients.map(lambda prompt: _ask(port, prompt, tokens), prompts))
        seconds = time.perf_counter() - started
    if firsts is not None and len(prompts) > 1:
        firsts.extend(one.first for one in found)
    return seconds / sum(one.tokens for one in found)


def _ask(port: int, prompt: str, tokens: int) -> Answered:
    """One streamed answer."""
    body = {"model": "pack", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    started, first, pieces, told = time.perf_counter(), 0.0, 0, None
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
        told = event.get("usage") or told
    connection.close()
    # llama-cpp-python's server tells no usage of streams, and sends a piece for each token.
    return Answered(first, told["completion_tokens"] if told else pieces)
