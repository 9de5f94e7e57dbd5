"""The page tells how much fuller than the mean the fullest shard is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from gateway.imbalance import Imbalance


class Page(Collector):
    def __init__(self, in_flight: Mapping[str, float], up: Mapping[str, float]) -> None:
        self._values = {"gateway_inflight": in_flight, "gateway_shard_up": up}

    def collect(self) -> Iterator[Metric]:
        for name, values in self._values.items():
            family = GaugeMetricFamily(name, "", labels=["shard"])
            for shard, value in values.items():
                family.add_metric([shard], value)
            yield family


@pytest.mark.parametrize(
    ("in_flight", "up", "ratio"),
    [
        ({"a": 6, "b": 2}, {"a": 1, "b": 1}, 1.5),
        ({"a": 4, "b": 4}, {"a": 1, "b": 1}, 1.0),
        ({"a": 9, "b": 4, "c": 4}, {"a": 0, "b": 1, "c": 1}, 1.0),
        ({"a": 3}, {"a": 1, "b": 1, "c": 1}, 3.0),
        ({"a": 0, "b": 0}, {"a": 1, "b": 1}, 1.0),
        ({"a": 7, "b": 1}, {"a": 0, "b": 0}, 1.0),
        ({}, {}, 1.0),
    ],
    ids=["uneven", "even", "one down", "idle ones count", "nothing runs", "none up", "none yet"],
)
def test_the_ratio_is_of_the_fullest_over_the_mean_of_those_that_are_up(
    in_flight: Mapping[str, float], up: Mapping[str, float], ratio: float
) -> None:
    registry = CollectorRegistry()
    registry.register(Imbalance(Page(in_flight, up)))
    assert registry.get_sample_value("gateway_hash_imbalance_ratio") == pytest.approx(ratio)
    for shard, value in in_flight.items():
        assert registry.get_sample_value("gateway_inflight", {"shard": shard}) == value
