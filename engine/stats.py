"""vLLM's own metrics, per shard.

vLLM's Prometheus logger clears every other engine's metrics of the process when it is
built (`unregister_vllm_metrics`, vllm/v1/metrics/loggers.py:490) and labels them all
engine "0". This one keeps them in a registry of ours and adds a `shard` label, so any
number of shards and processes can report side by side.

Left out are the gauges of the scheduler. A core sends them with a step, to one of its clients, so
that which process wrote one last says nothing of which step was the last: a slow worker showed
requests that were long gone, for as long as the engine idled. The host asks the core instead
(`gateway/shard_gauges.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.metrics import MetricWrapperBase
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from engine.batched_histogram import BatchedHistogram

SCHEDULER_GAUGES = frozenset(
    {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:num_requests_waiting_by_reason",
        "vllm:kv_cache_usage_perc",
    }
)
"""Gauges of which there is one for each core, whatever number of processes drive it."""

_REGISTRY = CollectorRegistry()
_METRICS: dict[str, MetricWrapperBase] = {}
"""One metric per name and process; shards are its children."""


class _ShardMetric:
    """Stands where vLLM expects a prometheus_client metric, with `shard` filled in."""

    def __init__(self, metric: MetricWrapperBase, shard: str) -> None:
        self._metric = metric
        self._shard = shard

    def labels(self, *values: object, **named: object) -> MetricWrapperBase:
        if named:
            return self._metric.labels(**named, shard=self._shard)
        return self._metric.labels(*values, self._shard)


class _NotHere:
    """Stands where vLLM expects a gauge that the host reports."""

    def labels(self, *values: object, **named: object) -> _NotHere:
        return self

    def set(self, value: float) -> None:
        pass


def _per_shard(kind: type[MetricWrapperBase], shard: str) -> Any:
    def build(
        name: str, documentation: str, labelnames: Iterable[str] = (), **options: Any
    ) -> _ShardMetric | _NotHere:
        if name in SCHEDULER_GAUGES:
            return _NotHere()
        if name not in _METRICS:
            _METRICS[name] = kind(
                name, documentation, [*labelnames, "shard"], registry=_REGISTRY, **options
            )
        return _ShardMetric(_METRICS[name], shard)

    return staticmethod(build)


def shard_stat_logger(shard: str) -> type[PrometheusStatLogger]:
    """A stat logger class for `AsyncLLM(stat_loggers=[...])` that reports as this shard."""

    class ShardStatLogger(PrometheusStatLogger):
        _gauge_cls = _per_shard(Gauge, shard)
        _counter_cls = _per_shard(Counter, shard)
        _histogram_cls = _per_shard(BatchedHistogram, shard)

        def __init__(
            self, vllm_config: VllmConfig, engine_indexes: list[int] | None = None
        ) -> None:
            super().__init__(vllm_config, engine_indexes)
            # Its labels are lists of adapter names: each new mix of adapters would be a new
            # series that never goes away (loggers.py:1224).
            self.gauge_lora_info = None

        def record(
            self,
            scheduler_stats: SchedulerStats | None,
            iteration_stats: IterationStats | None,
            *arguments: Any,
            **options: Any,
        ) -> None:
            """Runs once a step. What vLLM would observe token by token is observed here."""
            if iteration_stats is not None and iteration_stats.inter_token_latencies_iter:
                itl: Any = self.histogram_inter_token_latency[options.get("engine_idx", 0)]
                itl.observe_all(iteration_stats.inter_token_latencies_iter)
                iteration_stats.inter_token_latencies_iter = []
            super().record(scheduler_stats, iteration_stats, *arguments, **options)

    return ShardStatLogger
