"""What Prometheus may read at `/metrics`.

Labels hold names of models that are served, of endpoints, and of states; never what a client writes. Requests are
counted as they end; what `Status` tells is read when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from edgert.service.contract import Status, Usage

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
MODES = ("saver", "balanced", "performance")
_LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_SHORT = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """One service's numbers, in a registry of their own."""

    def __init__(self, status: Callable[[], Status]) -> None:
        self._registry = registry = CollectorRegistry(auto_describe=False)

        def counter(name: str, help_: str, *labels: str) -> Counter:
            return Counter(f"edgert_{name}", help_, labels, registry=registry)

        def histogram(name: str, help_: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"edgert_{name}", help_, ("model",), buckets=buckets, registry=registry)

        self._requests = counter(
            "requests", "Requests answered, by status of HTTP; 499: the client left", "endpoint", "code"
        )
        self._tokens = counter(
            "tokens", "Tokens: prompt, cached (of the prompt), completion, reasoning", "model", "kind"
        )
        self._joules = counter("joules", "Energy of the machine, shared among requests", "model", "provenance")
        self._first = histogram("ttft_seconds", "From the request to its first text", _LONG)
        self._next = histogram("tpot_seconds", "Time per token after the first", _SHORT)
        self._queue = histogram("queue_seconds", "Waiting for a place, and for the model to load", _LONG)
        registry.register(_StatusCollector(status))

    def request(self, endpoint: str, code: int) -> None:
        self._requests.labels(endpoint, str(code)).inc()

    def generation(self, model: str, usage: Usage, first_s: float | None, next_s: float | None) -> None:
        """A generation, an embedding too, has ended; `first_s` and `next_s` in seconds, None where there was none."""
        kinds = {
            "prompt": usage.prompt_tokens, "cached": usage.cached_tokens, "completion": usage.completion_tokens,
            "reasoning": usage.reasoning_tokens,
        }  # fmt: skip
        for kind, count in kinds.items():
            self._tokens.labels(model, kind).inc(count)
        if usage.joules is not None:
            self._joules.labels(model, usage.joules_provenance).inc(usage.joules)
        if first_s is not None:
            self._first.labels(model).observe(first_s)
            self._queue.labels(model).observe(usage.queue_us / 1e6)
        if next_s is not None:
            self._next.labels(model).observe(next_s)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)


class _StatusCollector:
    """`Status` at the moment of asking."""

    def __init__(self, status: Callable[[], Status]) -> None:
        self._status = status

    def collect(self) -> Iterator[Any]:
        status = self._status()
        by_model = ("model",)
        running = GaugeMetricFamily("edgert_running", "Requests that run", labels=by_model)
        waiting = GaugeMetricFamily("edgert_waiting", "Requests that wait", labels=by_model)
        memory = GaugeMetricFamily("edgert_worker_memory_bytes", "Resident memory of a model's worker", labels=by_model)
        caches = GaugeMetricFamily("edgert_kv_bytes", "KV caches, idle ones too", labels=by_model)
        restarts = CounterMetricFamily("edgert_worker_restarts", "Workers that had to be replaced", labels=by_model)
        plan = InfoMetricFamily("edgert_plan", "The plan in use", labels=by_model)
        for model in status.models:
            name = [model.name]
            running.add_metric(name, model.running)
            waiting.add_metric(name, model.waiting)
            restarts.add_metric(name, model.restarts)
            if model.memory_bytes is not None:
                memory.add_metric(name, model.memory_bytes)
            if model.kv_bytes is not None:
                caches.add_metric(name, model.kv_bytes)
            if model.plan is not None:
                plan.add_metric(name, {"plan": model.plan, "state": model.state})
        yield from (running, waiting, memory, caches, restarts, plan)
        yield CounterMetricFamily("edgert_rejected", "Requests turned away: a queue was full", value=status.rejected)
        quarantined = GaugeMetricFamily("edgert_quarantined_units", "Hardware that failed and is left alone")
        quarantined.add_metric((), len(status.quarantined))
        yield quarantined
        mode = GaugeMetricFamily("edgert_power_mode", "1 for the power mode in use", labels=("mode",))
        for name_ in MODES:
            mode.add_metric([name_], float(status.power.mode == name_))
        yield mode
