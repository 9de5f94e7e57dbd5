"""What the engine cores run at the moment of a scrape, under vLLM's names.

vLLM's own gauges are wrong where several processes drive one core (`engine/stats.py`), so each
core is asked. One that does not answer has no series on that page.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Protocol

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from engine.errors import ShardUnavailable
from engine.generation import Load

SCRAPE_TIMEOUT_S = 2.0
"""How long a page waits for the cores. A step of an engine takes less."""
_LABELS = ["model_name", "engine", "shard"]


class CoreShard(Protocol):
    """A shard whose core can be asked."""

    @property
    def name(self) -> str:
        """Stable name."""

    async def core_load(self) -> Load:
        """What the core has to do now. Raises ShardUnavailable."""


class ShardGauges(Collector):
    """Asks on the host's event loop, for pages that are made in other threads."""

    def __init__(self, model_name: str, shard: CoreShard) -> None:
        """To be made on that loop."""
        self._model_name = model_name
        self._shard = shard
        self._loop = asyncio.get_running_loop()

    def collect(self) -> Iterator[Metric]:
        running = _gauge("num_requests_running", "Requests in the engine's batch.")
        waiting = _gauge("num_requests_waiting", "Requests that wait for the engine.")
        by_reason = _gauge(
            "num_requests_waiting_by_reason",
            "Requests that wait: for capacity, or deferred because of the batch's adapters.",
            "reason",
        )
        usage = _gauge("kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.")
        if (load := self._ask()) is not None:
            labels = [self._model_name, "0", self._shard.name]
            running.add_metric(labels, load.running)
            waiting.add_metric(labels, load.waiting)
            by_reason.add_metric([*labels, "capacity"], load.waiting - load.deferred)
            by_reason.add_metric([*labels, "deferred"], load.deferred)
            usage.add_metric(labels, load.kv_cache_usage)
        yield from (running, waiting, by_reason, usage)

    def _ask(self) -> Load | None:
        asked = asyncio.run_coroutine_threadsafe(self._shard.core_load(), self._loop)
        try:
            return asked.result(SCRAPE_TIMEOUT_S)
        except (TimeoutError, CancelledError, ShardUnavailable):
            asked.cancel()
            return None


def _gauge(name: str, documentation: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"vllm:{name}", documentation, labels=[*_LABELS, *labels])
