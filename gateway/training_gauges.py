"""Jobs by state, and how their processes do, at the moment of a scrape."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import CancelledError

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from trainer.pulse import Pulse

logger = logging.getLogger(__name__)

SCRAPE_TIMEOUT_S = 2.0
"""How long a page waits for the job store."""


class TrainingGauges(Collector):
    """Asks on the host's event loop, for pages that are made in other threads. A job store that
    does not answer in time has no series on that page."""

    def __init__(self, take: Callable[[], Awaitable[Pulse]]) -> None:
        """To be made on that loop. `take` tells the pulse."""
        self._take = take
        self._loop = asyncio.get_running_loop()

    def collect(self) -> Iterator[Metric]:
        pulse = self._ask()
        if pulse is None:
            return
        jobs = GaugeMetricFamily("training_jobs", "Jobs by state.", labels=["state"])
        for state, count in pulse.jobs.items():
            jobs.add_metric([state.value], count)
        yield jobs
        yield GaugeMetricFamily(
            "training_heartbeat_age_seconds",
            "Since a training process last showed that it lives, of the one for which that is "
            "longest; 0 where none runs.",
            value=pulse.silent_s,
        )

    def _ask(self) -> Pulse | None:
        asked = asyncio.run_coroutine_threadsafe(self._take_in_time(), self._loop)
        try:
            return asked.result(2 * SCRAPE_TIMEOUT_S)
        except (TimeoutError, CancelledError):  # the host is busy, or ends
            asked.cancel()
        except Exception:  # a store that fails is no reason to show nothing of the engines
            logger.exception("jobs cannot be counted")
        return None

    async def _take_in_time(self) -> Pulse:
        async with asyncio.timeout(SCRAPE_TIMEOUT_S):
            return await self._take()
