"""The page tells how training does, and does without where that cannot be told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from prometheus_client import CollectorRegistry

from gateway import training_gauges
from gateway.training_gauges import TrainingGauges
from store.job_records import JobState
from trainer.pulse import Pulse


async def page(take: Callable[[], Awaitable[Pulse]]) -> dict[tuple[str, str], float]:
    """Values by name and state, as a scrape of another thread sees them."""
    registry = CollectorRegistry()
    registry.register(TrainingGauges(take))
    families = await asyncio.to_thread(lambda: list(registry.collect()))
    return {
        (sample.name, sample.labels.get("state", "")): sample.value
        for family in families
        for sample in family.samples
    }


async def test_the_page_has_jobs_of_every_state_and_the_longest_silence() -> None:
    async def take() -> Pulse:
        return Pulse({JobState.RUNNING: 2, JobState.FAILED: 0}, 7.5)

    assert await page(take) == {
        ("training_jobs", "running"): 2,
        ("training_jobs", "failed"): 0,
        ("training_heartbeat_age_seconds", ""): 7.5,
    }


async def test_a_store_that_hangs_or_fails_has_no_series(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_gauges, "SCRAPE_TIMEOUT_S", 0.05)

    async def hangs() -> Pulse:
        await asyncio.Event().wait()
        raise AssertionError

    async def fails() -> Pulse:
        raise OSError("the disk is gone")

    assert await page(hangs) == {}
    assert await page(fails) == {}
