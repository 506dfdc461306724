"""What the server counts, as Prometheus reads it."""

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
    """Counts of one server."""

    def __init__(self, places: Places) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "packllm", "registry": self.registry}
        self._requests = Counter("requests", "Requests by path and status", ["path", "status"], **own)
        self._prompt = Counter("prompt_tokens", "Tokens of prompts", **own)
        self._cached = Counter("cached_prompt_tokens", "Tokens of prompts that were read before", **own)
        self._written = Counter("completion_tokens", "Tokens of answers", **own)
        self._first = Histogram("time_to_first_token_seconds", "Until an answer began", buckets=_SECONDS, **own)
        self._rate = Histogram("answer_tokens_per_second", "Of each answer, once it began", buckets=_RATES, **own)
        self._weight = Summary("member_weight", "Weight of each member in answers; sum/count: mean", ["member"], **own)
        Gauge("requests_running", "Requests that run", **own).set_function(lambda: places.running)
        Gauge("requests_waiting", "Requests that wait for a place", **own).set_function(lambda: places.waiting)

    def watch(self, pack: Pack) -> None:
        """Tell of a pack too, which is loaded now."""
        self.registry.register(_PackCollector(pack))

    def request(self, path: str, status: int) -> None:
        self._requests.labels(path, str(status)).inc()

    @staticmethod
    def now() -> float:
        return time.perf_counter()

    def first(self, started: float) -> float:
        """An answer begins; when."""
        now = self.now()
        self._first.observe(now - started)
        return now

    def answered(self, last: Chunk, first: float) -> None:
        """An answer is whole, whose first chunk came then."""
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
    """What is asked of a pack when somebody looks."""

    def __init__(self, pack: Pack) -> None:
        self._pack = pack

    def collect(self) -> Iterator[Metric]:
        stats = self._pack.prefixes.stats
        for name, value, what in (
            ("hits", stats.hits, "Prompts, one a member, that began as an earlier one"),
            ("misses", stats.misses, "Prompts, one a member, that did not"),
            ("tokens", stats.tokens, "Tokens that the hits did not have to read"),
            ("evicted", stats.evicted, "Prompts let go to make room"),
        ):
            yield CounterMetricFamily(f"packllm_prefix_cache_{name}", what, value=value)
        yield GaugeMetricFamily("packllm_prefix_cache_bytes", "Memory of prompts that are kept", value=stats.bytes)
        batch = GaugeMetricFamily("packllm_batch_size", "Requests that shared a member's last pass", labels=["member"])
        for member in (one for one in self._pack.members if isinstance(one, Member)):
            batch.add_metric([member.name], member.engine.requests)
        yield batch
