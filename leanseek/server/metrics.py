"""/metrics: the engine's counters and request latencies, under vLLM's names with our prefix."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from leanseek.engine import AsyncEngine, Delta

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)


class Metrics:
    """Uses a registry of its own, so that two servers in one process do not mix."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, engine: AsyncEngine, model_name: str):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine, model_name))

        def histogram(name: str, help_text: str) -> Histogram:
            name, labels = f"leanseek:{name}_seconds", ["model_name"]
            return Histogram(name, help_text, labels, buckets=_SECONDS, registry=self._registry).labels(model_name)

        self._first_token = histogram("time_to_first_token", "From arrival to the first token")
        self._per_token = histogram("time_per_output_token", "Mean time between a choice's tokens")
        self._queue = histogram("request_queue_time", "From arrival to the first step")
        self._latency = histogram("e2e_request_latency", "From arrival to the last token")
        self._responses = Counter("leanseek:http_responses", "HTTP responses", ["status"], registry=self._registry)

    def observe(self, delta: Delta) -> None:
        """Count a finished choice."""
        timing, usage = delta.timing, delta.usage
        if timing is None or usage is None or not timing.first_token:
            return
        self._queue.observe(timing.scheduled - timing.arrived)
        self._first_token.observe(timing.first_token - timing.arrived)
        self._latency.observe(timing.finished - timing.arrived)
        if usage.completion_tokens > 1:
            self._per_token.observe((timing.finished - timing.first_token) / (usage.completion_tokens - 1))

    def responded(self, status: int) -> None:
        self._responses.labels(str(status)).inc()

    def page(self) -> bytes:
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the engine's latest stats whenever the page is requested."""

    def __init__(self, engine: AsyncEngine, model_name: str):
        self._engine = engine
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        gauges = {
            "num_requests_running": ("Requests in the batch", stats.running),
            "num_requests_waiting": ("Requests waiting for room", stats.waiting),
            "kv_cache_usage_perc": ("Share of cache pages held by requests", stats.pages_used / stats.pages_total),
        }
        counters = {
            "prompt_tokens": ("Tokens of prompts", stats.prompt_tokens),
            "generation_tokens": ("Tokens generated", stats.generated_tokens),
            "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache", stats.prompt_tokens),
            "prefix_cache_hits": ("Prompt tokens found in the prefix cache", stats.cached_tokens),
            "num_preemptions": ("Requests preempted for lack of pages", stats.preemptions),
            "spec_decode_num_draft_tokens": ("Tokens drafted by the MTP module", sum(stats.draft_tokens)),
            "spec_decode_num_accepted_tokens": ("Drafts accepted", sum(stats.accepted_tokens)),
            "engine_steps": ("Steps of the engine", stats.steps),
            "engine_step_seconds": ("Time in steps", stats.step_seconds),
            "engine_forward_seconds": ("Time in the model, part of engine_step_seconds", stats.forward_seconds),
        }
        for name, (text, value) in gauges.items():
            yield self._family(GaugeMetricFamily, name, text, None, {"": value})
        for name, (text, value) in counters.items():
            yield self._family(CounterMetricFamily, name, text, None, {"": value})
        yield self._family(
            CounterMetricFamily, "request_success", "Finished choices, by reason", "finished_reason", stats.finished
        )
        accepted = {str(position): count for position, count in enumerate(stats.accepted_tokens)}
        name, text = "spec_decode_num_accepted_tokens_per_pos", "Drafts accepted, by position"
        yield self._family(CounterMetricFamily, name, text, "position", accepted)

    def _family(
        self,
        kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
        name: str,
        text: str,
        label: str | None,
        values: dict[str, int] | dict[str, float],
    ) -> Metric:
        family = kind(f"leanseek:{name}", text, labels=["model_name", *([label] if label else [])])
        for key, value in values.items():
            family.add_metric([self._model_name, *([key] if label else [])], value)
        return family
