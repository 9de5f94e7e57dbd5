"""What the engine cores run at the moment of a scrape, under vLLM's names.

vLLM's own gauges are wrong where several processes drive one core (`engine/stats.py`), so each
core is asked. One that does not answer has no series on that page.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
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

    def __init__(self, model_name: str, shards: Callable[[], Sequence[CoreShard]]) -> None:
        """To be made on that loop. `shards` tells those that are up now."""
        self._model_name = model_name
        self._shards = shards
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
        for shard, load in self._ask().items():
            labels = [self._model_name, "0", shard]
            running.add_metric(labels, load.running)
            waiting.add_metric(labels, load.waiting)
            by_reason.add_metric([*labels, "capacity"], load.waiting - load.deferred)
            by_reason.add_metric([*labels, "deferred"], load.deferred)
            usage.add_metric(labels, load.kv_cache_usage)
        yield from (running, waiting, by_reason, usage)

    def _ask(self) -> dict[str, Load]:
        """What those answer that do in time."""
        asked = asyncio.run_coroutine_threadsafe(self._ask_all(), self._loop)
        try:
            return asked.result(2 * SCRAPE_TIMEOUT_S)
        except (TimeoutError, CancelledError):  # the host is busy, or ends
            asked.cancel()
            return {}

    async def _ask_all(self) -> dict[str, Load]:
        shards = self._shards()
        answers = await asyncio.gather(*map(load_of, shards))
        return {
            shard.name: load
            for shard, load in zip(shards, answers, strict=True)
            if load is not None
        }


async def load_of(shard: CoreShard, timeout_s: float | None = None) -> Load | None:
    """What a core has to do; None if it does not tell in time (None: SCRAPE_TIMEOUT_S)."""
    try:
        async with asyncio.timeout(SCRAPE_TIMEOUT_S if timeout_s is None else timeout_s):
            return await shard.core_load()
    except (TimeoutError, ShardUnavailable):
        return None


def _gauge(name: str, documentation: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"vllm:{name}", documentation, labels=[*_LABELS, *labels])
