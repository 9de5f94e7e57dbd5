"""Devices go to the oldest job that waits, and are never lost."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

import pytest

from trainer.device_queue import DeviceQueue
from trainer.devices import Device

GPU = Device("0")


async def test_the_oldest_is_next_whenever_it_came() -> None:
    queue = DeviceQueue([GPU])
    first = await queue.take("first", 5)
    order: list[str] = []

    async def train(uid: str, since_ns: int) -> None:
        device = await queue.take(uid, since_ns)
        order.append(uid)
        queue.give_back(device, uid)

    tasks = [asyncio.create_task(train(uid, at)) for uid, at in [("c", 9), ("a", 1), ("b", 7)]]
    await asyncio.sleep(0)
    assert [queue.position(uid) for uid in ("a", "b", "c", "first")] == [1, 2, 3, 0]
    queue.give_back(first, "first")
    await asyncio.gather(*tasks)
    assert order == ["a", "b", "c"]


async def test_who_leaves_gives_up_its_place_and_what_it_was_just_given() -> None:
    queue = DeviceQueue([GPU])
    device = await queue.take("a", 1)
    leaving, waiting = [
        asyncio.create_task(queue.take(uid, at)) for uid, at in [("b", 2), ("c", 3)]
    ]
    await asyncio.sleep(0)
    queue.give_back(device, "a")  # b has it, and does not know yet
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert await asyncio.wait_for(waiting, 1) == GPU


async def test_a_device_is_held_for_a_run_that_went_on() -> None:
    queue = DeviceQueue([GPU])
    held = queue.hold("0", "before")
    waiting = asyncio.create_task(queue.take("a", 1))
    await asyncio.sleep(0)
    assert not waiting.done()
    queue.give_back(held, "before")
    assert await waiting == GPU


async def test_a_device_is_free_when_none_holds_it_any_more() -> None:
    queue = DeviceQueue([GPU])
    device = await queue.take("one", 1)
    assert queue.hold("0", "two") == queue.hold("0", "two") == device
    waiting = asyncio.create_task(queue.take("three", 2))
    for uid in ("one", "one", "stranger"):
        queue.give_back(device, uid)
        await asyncio.sleep(0)
    assert not waiting.done(), "two holds it"
    queue.give_back(device, "two")
    assert await waiting == GPU


async def test_a_device_that_is_not_ours_any_more_is_given_to_nobody() -> None:
    queue = DeviceQueue([GPU])
    queue.give_back(queue.hold("7", "before"), "before")
    assert await queue.take("a", 1) == GPU
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(queue.take("b", 2), 0.01)


@pytest.mark.parametrize("seed", range(20))
async def test_no_device_is_lost_or_given_twice(seed: int) -> None:
    chance = random.Random(seed)
    devices = [Device(str(number)) for number in range(3)]
    queue = DeviceQueue(devices)
    held: set[Device] = set()

    async def train(number: int) -> None:
        device = await queue.take(str(number), number)
        try:
            assert device not in held
            held.add(device)
            for _ in range(chance.randrange(3)):
                await asyncio.sleep(0)
        finally:
            held.discard(device)
            queue.give_back(device, str(number))

    tasks = [asyncio.create_task(train(number)) for number in range(40)]
    for _ in range(60):
        chance.choice(tasks).cancel()
        await asyncio.sleep(0)
    for task in tasks:
        with suppress(asyncio.CancelledError):
            await task
    assert {await queue.take(str(number), 99) for number in range(3)} == set(devices)
