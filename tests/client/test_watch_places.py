"""A watch where the gateway has no place for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from lora_gateway import GatewayClient, Overloaded
from tests.client.fake_adapters import OVERLOADED, UNAVAILABLE
from tests.client.fake_training import FakeTraining, served, states
from tests.client.test_job_watch import STEPS, following, ran, whole


@pytest.fixture
def training() -> FakeTraining:
    return FakeTraining()


@pytest.fixture
async def client(training: FakeTraining) -> AsyncIterator[GatewayClient]:
    async with served(training) as target, GatewayClient(target) as client:
        yield client


async def test_a_watch_that_has_begun_waits_as_long_as_it_is_told_where_all_places_are_taken(
    client: GatewayClient, training: FakeTraining
) -> None:
    await training.add_job("run")
    training.watch_cuts.append((1, UNAVAILABLE))
    async with client.training.watch_job("run") as watch:
        await following(watch, 1)
        training.failures.append(OVERLOADED)
        await training.tell("run", *STEPS, *states("SUCCEEDED"))
        clock = asyncio.get_running_loop().time
        begun_s = clock()
        assert await whole(watch) == [2, 3, 4, 5, 6, 7]
        assert clock() - begun_s > 1.0, "the delay of its RetryInfo"


async def test_a_watch_that_has_not_begun_is_told_that_all_places_are_taken(
    client: GatewayClient, training: FakeTraining
) -> None:
    await ran(training)
    training.failures.append(OVERLOADED)
    with pytest.raises(Overloaded) as caught:
        await whole(client.training.watch_job("run"))
    assert caught.value.retry_delay_s == 1.0
