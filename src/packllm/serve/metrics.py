"""The server's metrics, in Prometheus' format."""

from __future__ import annotations

import time
from collections.abc import Iterator
from threading import Event
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from packllm.engines.member import Member
from packllm.pack import Pack
from packllm.results import Chunk
from packllm.serve.admission import Places
from packllm.weights import Weights

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Metrics:
    """The metrics of one server."""

    def __init__(self, places: Places) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "packllm", "registry": self.registry}
        self._requests = Counter(
            "requests",
            "Requests by path and status; 499: the client left before the end; of a stream that failed: its error's",
            ["path", "status"],
            **own,
        )
        self.prompt = Counter("prompt_tokens", "Tokens of prompts", **own)
        self.cached = Counter("cached_prompt_tokens", "Tokens of prompts that came from the prefix cache", **own)
        self.written = Counter("completion_tokens", "Tokens of answers", **own)
        self.first = Histogram(
            "time_to_first_token_seconds",
            "From a request to the first chunk of its answer",
            buckets=_SECONDS,
            **own,
        )
        self.rate = Histogram(
            "answer_tokens_per_second", "Tokens per second of each answer after its first chunk", buckets=_RATES, **own
        )
        self.weight = Summary("member_weight", "Weight of each member in answers; sum/count: mean", ["member"], **own)
        Gauge("requests_running", "Requests that run", **own).set_function(lambda: places.running)
        Gauge("requests_waiting", "Requests that wait for a slot", **own).set_function(lambda: places.waiting)

    def watch(self, pack: Pack) -> None:
        """Add the metrics of a loaded pack."""
        self.registry.register(_PackCollector(pack))

    def request(self, path: str, status: int) -> None:
        self._requests.labels(path, str(status)).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Call:
    """One request while it is answered. Its time counts from here: the wait for a slot is a part of it.

    Attributes:
        cancel: set once nobody waits for the answer any more.
    """

    def __init__(self, metrics: Metrics, cancel: Event, arrived: float) -> None:
        self.cancel = cancel
        self._metrics, self._arrived = metrics, arrived

    def first(self) -> float:
        """Count the start of an answer; returns its time."""
        now = time.perf_counter()
        self._metrics.first.observe(now - self._arrived)
        return now

    def read(self, tokens: int, weights: Weights | None = None) -> None:
        """Count a prompt."""
        self._metrics.prompt.inc(tokens)
        for name, value in zip(weights.names, weights.values, strict=True) if weights else ():
            self._metrics.weight.labels(name).observe(value)

    def answered(self, last: Chunk, first: float, new_prompt: bool) -> None:
        """Count a complete answer.

        Args:
            last: its last chunk.
            first: the time of its first.
            new_prompt: whether it is the first answer to its prompt.
        """
        assert last.usage is not None
        self.read(last.usage.prompt_tokens if new_prompt else 0, last.weights)
        self._metrics.cached.inc(last.usage.cached_tokens if new_prompt else 0)
        self._metrics.written.inc(last.usage.completion_tokens)
        if (seconds := time.perf_counter() - first) > 0 and last.usage.completion_tokens > 1:
            self._metrics.rate.observe((last.usage.completion_tokens - 1) / seconds)


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
