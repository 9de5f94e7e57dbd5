"""Batches in a histogram."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from engine.batched_histogram import BatchedHistogram

BOUNDS = (0.1, 0.5, 1.0)
AMOUNTS = [0.05, 0.1, 0.3, 0.5, 0.7, 1.0, 3.0]
"""Between bounds, on each of them, and above all."""


def _samples(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    return {
        (sample.name, sample.labels.get("le", "")): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if not sample.name.endswith("_created")
    }


@pytest.mark.parametrize("amounts", [AMOUNTS, AMOUNTS[:1], []], ids=["many", "one", "none"])
def test_a_batch_counts_as_its_observations_one_by_one(amounts: list[float]) -> None:
    registries = CollectorRegistry(), CollectorRegistry()
    batched, single = (
        BatchedHistogram("waits", "Waits.", ["kind"], buckets=BOUNDS, registry=registry)
        for registry in registries
    )
    batched.labels("all").observe_all(amounts)
    single.labels("all")
    for amount in amounts:
        single.labels("all").observe(amount)
    seen, expected = _samples(registries[0]), _samples(registries[1])
    assert seen == {key: pytest.approx(value) for key, value in expected.items()}
    assert seen["waits_count", ""] == len(amounts)
