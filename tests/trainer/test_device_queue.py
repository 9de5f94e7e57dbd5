"""Devices go to the job that is next, and are never lost."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

import pytest

from store.device_use import DeviceUse
from trainer.claim import Claim
from trainer.device_queue import DeviceQueue
from trainer.device_shares import ADVANCE_S
from trainer.devices import Device
from trainer.fair_order import AGEING_S

GPU = Device("0")
SECOND_NS = 10**9


def claim(
    uid: str, at_ns: int, *, tenant: str = "acme", priority: int = 0, queued_ns: int | None = None
) -> Claim:
    """Of a job that was made then, and queued at once."""
    return Claim(uid, tenant, priority, at_ns, at_ns if queued_ns is None else queued_ns)


async def test_the_oldest_is_next_whenever_it_came() -> None:
    queue = DeviceQueue([GPU])
    first = await queue.take(claim("first", 5))
    order: list[str] = []

    async def train(uid: str, since_ns: int) -> None:
        device = await queue.take(claim(uid, since_ns))
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
    device = await queue.take(claim("a", 1))
    leaving, waiting = [
        asyncio.create_task(queue.take(claim(uid, at))) for uid, at in [("b", 2), ("c", 3)]
    ]
    await asyncio.sleep(0)
    queue.give_back(device, "a")  # b has it, and does not know yet
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert await asyncio.wait_for(waiting, 1) == GPU


async def test_a_device_is_held_for_a_run_that_went_on() -> None:
    queue = DeviceQueue([GPU])
    held = queue.hold("0", claim("before", 0))
    waiting = asyncio.create_task(queue.take(claim("a", 1)))
    await asyncio.sleep(0)
    assert not waiting.done()
    queue.give_back(held, "before")
    assert await waiting == GPU


async def test_a_device_is_free_when_none_holds_it_any_more() -> None:
    queue = DeviceQueue([GPU])
    device = await queue.take(claim("one", 1))
    assert queue.hold("0", claim("two", 2)) == queue.hold("0", claim("two", 2)) == device
    waiting = asyncio.create_task(queue.take(claim("three", 2)))
    for uid in ("one", "one", "stranger"):
        queue.give_back(device, uid)
        await asyncio.sleep(0)
    assert not waiting.done(), "two holds it"
    queue.give_back(device, "two")
    assert await waiting == GPU


async def test_a_device_that_is_not_ours_any_more_is_given_to_nobody() -> None:
    queue = DeviceQueue([GPU])
    queue.give_back(queue.hold("7", claim("before", 0)), "before")
    assert await queue.take(claim("a", 1)) == GPU
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(queue.take(claim("b", 2)), 0.01)


@pytest.mark.parametrize("seed", range(20))
async def test_no_device_is_lost_or_given_twice(seed: int) -> None:
    chance = random.Random(seed)
    devices = [Device(str(number)) for number in range(3)]
    queue = DeviceQueue(devices)
    held: set[Device] = set()

    async def train(number: int) -> None:
        device = await queue.take(claim(str(number), number))
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
    assert {await queue.take(claim(str(number), 99)) for number in range(3)} == set(devices)


class Hand:
    """A clock that stands where it is put."""

    def __init__(self) -> None:
        self.now_ns = 100 * SECOND_NS

    def __call__(self) -> int:
        return self.now_ns

    def passes(self, duration_s: int) -> None:
        self.now_ns += duration_s * SECOND_NS


async def granted(queue: DeviceQueue, claims: list[Claim]) -> list[str]:
    """Who is given the one device, one after the other, once it is given back."""
    order: list[str] = []

    async def train(claim: Claim) -> None:
        device = await queue.take(claim)
        order.append(claim.uid)
        queue.give_back(device, claim.uid)

    blocker = await queue.take(claim("blocker", 0, tenant="blocker"))
    tasks = [asyncio.create_task(train(each)) for each in claims]
    await asyncio.sleep(0)
    told = {each.uid: queue.position(each.uid) for each in claims}
    queue.give_back(blocker, "blocker")
    await asyncio.gather(*tasks)
    assert order[0] == min(told, key=lambda uid: told[uid])
    return order


async def test_a_higher_priority_is_next_and_of_equals_the_tenant_that_had_least() -> None:
    clock = Hand()
    queue = DeviceQueue([GPU], clock_ns=clock)
    queue.seed(
        [DeviceUse("acme", 3, 600.0, clock.now_ns), DeviceUse("other", 0, 599.0, clock.now_ns)]
    )
    waiting = [
        claim("low", 1, priority=-1, tenant="new"),
        claim("older", 2),
        claim("younger", 3, tenant="other"),
        claim("high", 4, priority=1),
    ]
    # Of what waited only an instant, nothing has aged.
    waiting = [Claim(c.uid, c.tenant, c.priority, c.create_time_ns, clock.now_ns) for c in waiting]
    assert await granted(queue, waiting) == ["high", "younger", "older", "low"]


async def test_what_a_run_holds_counts_while_it_runs_and_after_it() -> None:
    clock = Hand()
    queue = DeviceQueue([GPU, Device("1")], clock_ns=clock)
    queue.hold("1", claim("found", 0), clock.now_ns - 3600 * SECOND_NS)
    now_ns = clock.now_ns
    order = await granted(queue, [claim("a", 1, queued_ns=now_ns)])
    assert order == ["a"]
    first = await queue.take(claim("b", 2, tenant="blocker", queued_ns=now_ns))
    waiting = [
        asyncio.create_task(queue.take(claim(uid, at_ns, tenant=tenant, queued_ns=now_ns)))
        for uid, at_ns, tenant in [("c", 3, "acme"), ("d", 4, "blocker")]
    ]
    await asyncio.sleep(0)
    assert [queue.position(uid) for uid in "cd"] == [2, 1], "acme has held one for an hour"
    queue.give_back(Device("1"), "found")
    assert await waiting[1] == Device("1")
    queue.give_back(first, "b")
    assert await waiting[0] == GPU


async def test_what_was_given_back_counts_as_long_as_it_was_held() -> None:
    clock = Hand()
    queue = DeviceQueue([GPU], clock_ns=clock)
    for tenant, held_s in (("a", 1), ("b", 5)):
        device = await queue.take(claim(tenant, 1, tenant=tenant))
        clock.passes(held_s)
        queue.give_back(device, tenant)
    waiting = [claim("b1", 1, tenant="b"), claim("a1", 2, tenant="a")]
    assert await granted(queue, waiting) == ["a1", "b1"]


async def test_a_job_that_came_now_is_told_its_place_and_a_free_device_none() -> None:
    clock = Hand()
    queue = DeviceQueue([GPU], clock_ns=clock)
    assert queue.position_of_new("acme", 0) == 0
    await queue.take(claim("running", 1))
    assert queue.position_of_new("acme", 0) == 1
    tasks = [
        asyncio.create_task(
            queue.take(claim(uid, at_ns, priority=priority, queued_ns=clock.now_ns))
        )
        for uid, at_ns, priority in [("high", 2, 5), ("low", 3, -5)]
    ]
    await asyncio.sleep(0)
    assert [queue.position_of_new("acme", priority) for priority in (6, 5, 0, -5)] == [1, 2, 2, 3]
    assert queue.position_of_new("new", -5) == 2, "it had nothing yet"
    assert [queue.position(uid) for uid in ("high", "low")] == [1, 2]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [queue.position(uid) for uid in ("high", "low")] == [0, 0]


async def test_a_place_is_told_again_once_something_changed_and_as_time_passes() -> None:
    clock = Hand()
    queue = DeviceQueue([GPU, Device("1")], clock_ns=clock)
    for uid, tenant in [("one", "acme"), ("two", "other")]:
        await queue.take(claim(uid, 1, tenant=tenant, queued_ns=clock.now_ns))
    queue.give_back(GPU, "one")
    await queue.take(claim("three", 1, tenant="third", queued_ns=clock.now_ns))
    tasks = [
        asyncio.create_task(queue.take(claim(uid, at_ns, tenant=tenant, queued_ns=clock.now_ns)))
        for uid, at_ns, tenant in [("a", 2, "other"), ("b", 3, "third")]
    ]
    await asyncio.sleep(0)
    assert [queue.position(uid) for uid in "ab"] == [1, 2], "both hold what was just given"
    queue.give_back(Device("1"), "two")
    assert await tasks[0] == Device("1"), "other has had no time of it"
    assert [queue.position(uid) for uid in "ab"] == [0, 1]
    higher = claim("c", 1, priority=1, queued_ns=clock.now_ns)
    tasks.append(asyncio.create_task(queue.take(higher)))
    await asyncio.sleep(0)
    assert [queue.position(uid) for uid in "bc"] == [2, 1]
    clock.passes(round(AGEING_S))
    later = claim("d", 9, priority=1, queued_ns=clock.now_ns)
    tasks.append(asyncio.create_task(queue.take(later)))
    tasks[-2].cancel()
    await asyncio.sleep(0)
    assert [queue.position(uid) for uid in "bcd"] == [1, 0, 2], "it has waited half an hour"
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_place_follows_the_time_for_which_devices_are_held() -> None:
    clock = Hand()
    queue = DeviceQueue([GPU, Device("1")], clock_ns=clock)
    queue.seed([DeviceUse("b", 0, ADVANCE_S, clock.now_ns)])
    for tenant in ("a", "c"):
        await queue.take(claim(tenant, 1, tenant=tenant, queued_ns=clock.now_ns))
    tasks = [
        asyncio.create_task(queue.take(claim(f"{tenant}1", at_ns, tenant=tenant)))
        for at_ns, tenant in [(1, "a"), (2, "b")]
    ]
    await asyncio.sleep(0)
    assert [queue.position(uid) for uid in ("a1", "b1")] == [1, 2]
    clock.passes(1)
    assert [queue.position(uid) for uid in ("a1", "b1")] == [2, 1], "some of b's is forgotten"
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_it_is_told_how_long_a_job_was_queued() -> None:
    clock, heard = Hand(), list[tuple[int, float]]()
    queue = DeviceQueue([GPU], clock_ns=clock, observe_wait=lambda *told: heard.append(told))
    await queue.take(claim("a", 1, queued_ns=clock.now_ns))
    waiting = asyncio.create_task(queue.take(claim("b", 1, priority=2, queued_ns=clock.now_ns)))
    await asyncio.sleep(0)
    clock.passes(90)
    queue.give_back(GPU, "a")
    assert await waiting == GPU
    assert heard == [(0, 0.0), (2, 90.0)]
