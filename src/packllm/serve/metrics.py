"""The server's metrics, in Prometheus' format."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from packllm.engines.member import Member
from packllm.pack import Pack
from packllm.results import Chunk
from packllm.serve.admission import Places

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Metrics:
    """The metrics of one server."""

    def __init__(self, places: Places) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "packllm", "registry": self.registry}
        self._requests = Counter("requests", "Requests by path and status", ["path", "status"], **own)
        self._prompt = Counter("prompt_tokens", "Tokens of prompts", **own)
        self._cached = Counter("cached_prompt_tokens", "Tokens of prompts that came from the prefix cache", **own)
        self._written = Counter("completion_tokens", "Tokens of answers", **own)
        self._first = Histogram(
            "time_to_first_token_seconds", "Time until the first chunk of an answer", buckets=_SECONDS, **own
        )
        self._rate = Histogram(
            "answer_tokens_per_second", "Tokens per second of each answer after its first chunk", buckets=_RATES, **own
        )
        self._weight = Summary("member_weight", "Weight of each member in answers; sum/count: mean", ["member"], **own)
        Gauge("requests_running", "Requests that run", **own).set_function(lambda: places.running)
        Gauge("requests_waiting", "Requests that wait for a slot", **own).set_function(lambda: places.waiting)

    def watch(self, pack: Pack) -> None:
        """Add the metrics of a loaded pack."""
        self.registry.register(_PackCollector(pack))

    def request(self, path: str, status: int) -> None:
        self._requests.labels(path, str(status)).inc()

    @staticmethod
    def now() -> float:
        return time.perf_counter()

    def first(self, started: float) -> float:
        """Count the start of an answer; returns its time."""
        now = self.now()
        self._first.observe(now - started)
        return now

    def answered(self, last: Chunk, first: float) -> None:
        """Count a complete answer, given its last chunk and the time of its first."""
        assert last.usage is not None
        self._prompt.inc(last.usage.prompt_tokens)
        self._cached.inc(last.usage.cached_tokens)
        self._written.inc(last.usage.completion_tokens)
        if (seconds := self.now() - first) > 0 and last.usage.completion_tokens > 1:
            self._rate.observe((last.usage.completion_tokens - 1) / seconds)
        for name, value in zip(last.weights.names, last.weights.values, strict=True):
            self._weight.labels(name).observe(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _PackCollector:
    """Metrics that are read from the pack when Prometheus collects them."""

    def __init__(self, pack: Pack) -> None:
        self._pack = pack

    def collect(self) -> Iterator[Metric]:
        stats = self._pack.prefixes.stats
        for name, value, what in (
            ("hits", stats.hits, "Prompts, per member, with a cached prefix"),
            ("misses", stats.misses, "Prompts, per member, without a cached prefix"),
            ("tokens", stats.tokens, "Prompt tokens that were reused from the cache"),
            ("evicted", stats.evicted, "Prompts removed to make room"),
        ):
            yield CounterMetricFamily(f"packllm_prefix_cache_{name}", what, value=value)
        yield GaugeMetricFamily("packllm_prefix_cache_bytes", "Memory of the cached prompts", value=stats.bytes)
        batch = GaugeMetricFamily("packllm_batch_size", "Requests that shared a member's last pass", labels=["member"])
        for member in (one for one in self._pack.members if isinstance(one, Member)):
            batch.add_metric([member.name], member.engine.requests)
        yield batch
