"""How evenly requests are spread over the shards, at the moment of a scrape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from statistics import fmean

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector


class Imbalance(Collector):
    """All that another collector shows, and `gateway_hash_imbalance_ratio` of it."""

    def __init__(self, page: Collector) -> None:
        self._page = page

    def collect(self) -> Iterator[Metric]:
        values: dict[str, dict[str, float]] = {"gateway_inflight": {}, "gateway_shard_up": {}}
        for family in self._page.collect():
            if family.name in values:
                by_shard = {sample.labels["shard"]: sample.value for sample in family.samples}
                values[family.name] = by_shard
            yield family
        yield GaugeMetricFamily(
            "gateway_hash_imbalance_ratio",
            "Requests in flight on the fullest shard, over the mean of those that take requests; "
            "1 where nothing runs.",
            value=_ratio(
                values["gateway_inflight"].get(shard, 0.0)
                for shard, is_up in values["gateway_shard_up"].items()
                if is_up
            ),
        )


def _ratio(in_flight: Iterable[float]) -> float:
    counts = [*in_flight]
    mean = fmean(counts) if counts else 0.0
    return max(counts) / mean if mean > 0 else 1.0
