"""The page tells what the cores run now, and does without one that does not answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from engine.errors import ShardUnavailable
from engine.generation import Load
from gateway import shard_gauges
from gateway.shard_gauges import ShardGauges


class Core:
    """A shard whose core answers as a test says."""

    name = "shard-0"

    def __init__(self, answer: Callable[[], Awaitable[Load]]) -> None:
        self._answer = answer

    async def core_load(self) -> Load:
        return await self._answer()


async def page(answer: Callable[[], Awaitable[Load]]) -> dict[tuple[str, str], float]:
    """Values by name and reason, as a scrape of another thread sees them."""
    registry = CollectorRegistry()
    registry.register(ShardGauges("tiny", lambda: [Core(answer)]))
    text = (await asyncio.to_thread(generate_latest, registry)).decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["shard"] == "shard-0"
            assert (sample.labels["model_name"], sample.labels["engine"]) == ("tiny", "0")
            found[sample.name, sample.labels.get("reason", "")] = sample.value
    return found


async def test_the_page_tells_what_the_core_answers_at_that_moment() -> None:
    loads = iter([Load(3, 5, 2, 0.25), Load(0, 0, 0, 0.0)])

    async def answer() -> Load:
        return next(loads)

    assert await page(answer) == {
        ("vllm:num_requests_running", ""): 3,
        ("vllm:num_requests_waiting", ""): 5,
        ("vllm:num_requests_waiting_by_reason", "capacity"): 3,
        ("vllm:num_requests_waiting_by_reason", "deferred"): 2,
        ("vllm:kv_cache_usage_perc", ""): 0.25,
    }
    assert set((await page(answer)).values()) == {0.0}


async def test_a_core_that_hangs_or_is_dead_has_no_series(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_gauges, "SCRAPE_TIMEOUT_S", 0.05)
    cancelled = asyncio.Event()

    async def hangs() -> Load:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        raise AssertionError

    async def dead() -> Load:
        raise ShardUnavailable("shard-0")

    assert await page(hangs) == {}
    async with asyncio.timeout(5):
        await cancelled.wait()  # nothing is left to wait for it
    assert await page(dead) == {}
