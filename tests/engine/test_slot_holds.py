"""A version with a slot is entered at once, others wait for theirs, and a recalled one drains."""

from __future__ import annotations

import asyncio

import pytest

from engine.errors import ShardUnavailable
from engine.generation import ServedVersion, VersionKey
from engine.slot_holds import Slot, SlotHolds

KEY = VersionKey("acme", "sql", 1)
VERSION = ServedVersion("acme", "sql", 1, 7, "/sql", "digest")


class Process:
    """One process's slots, and what the host and the core would see of it."""

    def __init__(self) -> None:
        self.told: list[tuple[VersionKey, bool]] = []
        self.in_core = 0
        self.core_asked = 0
        self.waits_s: list[float] = []
        self.returned: list[str] = []
        self.slots = SlotHolds(
            lambda key, waits: self.told.append((key, waits)), self._requests, self.waits_s.append
        )

    async def _requests(self, lora_int_id: int) -> int:
        assert lora_int_id == VERSION.lora_int_id
        self.core_asked += 1
        await asyncio.sleep(0)
        if self.in_core < 0:
            raise ShardUnavailable("shard-0")
        return self.in_core

    def recall(self, name: str = "returned") -> None:
        self.slots.recall(KEY, lambda: self.returned.append(name))

    async def happens(self, name: str) -> None:
        async with asyncio.timeout(30):
            while name not in self.returned:
                await asyncio.sleep(0.001)


async def enter(slots: SlotHolds, version: ServedVersion = VERSION) -> Slot:
    """As a lease does it."""
    slot = slots.enter(version.key, version.lora_int_id)
    return slot or await slots.wait(version.key, version.lora_int_id)


def waiting(process: Process, count: int) -> list[asyncio.Task[Slot]]:
    return [asyncio.create_task(enter(process.slots)) for _ in range(count)]


async def settled() -> None:
    """Let all that can run, run."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_who_has_a_slot_enters_without_a_word() -> None:
    process = Process()
    process.slots.all_granted([KEY])
    slot = await enter(process.slots)
    assert slot is await enter(process.slots)
    assert slot.running == 2
    process.slots.leave(slot)
    assert slot.running == 1
    assert not process.told and not process.waits_s


async def test_many_that_wait_ask_once_and_enter_in_their_order() -> None:
    process = Process()
    order: list[int] = []

    async def run(number: int) -> None:
        await enter(process.slots)
        order.append(number)

    tasks = [asyncio.create_task(run(number)) for number in range(4)]
    await settled()
    assert process.told == [(KEY, True)]
    process.slots.granted(KEY)
    assert process.slots._slots[KEY].running == 4, "entered before they run again"
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2, 3]
    assert process.told == [(KEY, True)]
    assert len(process.waits_s) == 4


async def test_when_the_last_gives_up_the_host_is_told() -> None:
    process = Process()
    first, second = waiting(process, 2)
    await settled()
    first.cancel()
    await settled()
    assert process.told == [(KEY, True)]
    second.cancel()
    await settled()
    assert process.told == [(KEY, True), (KEY, False)]
    assert len(process.waits_s) == 2
    (third,) = waiting(process, 1)
    await settled()
    assert process.told[2:] == [(KEY, True)]
    process.slots.granted(KEY)
    assert (await third).running == 1


async def test_who_gives_up_as_it_is_granted_runs_nothing() -> None:
    process = Process()
    early, late = waiting(process, 2)
    await settled()
    early.cancel()  # has not run since
    process.slots.granted(KEY)
    late.cancel()  # it has entered already, but has not run since
    await asyncio.gather(early, late, return_exceptions=True)
    assert early.cancelled() and late.cancelled()
    assert process.slots._slots[KEY].running == 0
    assert process.told == [(KEY, True)]


async def test_a_slot_that_nobody_entered_is_given_back_at_once() -> None:
    process = Process()
    process.slots.granted(KEY)
    process.recall()
    assert process.returned == ["returned"]
    assert not process.core_asked
    process.recall("again")
    assert process.returned == ["returned", "again"], "what is not there has been given back"


async def test_a_recalled_slot_is_entered_no_more_and_drains_here_and_in_the_core() -> None:
    process = Process()
    process.slots.granted(KEY)
    slots = [await enter(process.slots) for _ in range(2)]
    process.in_core = 1
    process.recall()
    (later,) = waiting(process, 1)
    process.slots.leave(slots[0])
    await settled()
    assert process.told == [(KEY, True)]
    assert not process.core_asked, "one still runs here"
    process.slots.leave(slots[1])
    await settled()
    assert process.core_asked and not process.returned, "the core has not read the abort"
    process.in_core = 0
    await process.happens("returned")
    assert not later.done()
    process.slots.granted(KEY)
    assert (await later).running == 1


async def test_a_core_that_does_not_answer_keeps_no_slot() -> None:
    process = Process()
    process.slots.granted(KEY)
    slot = await enter(process.slots)
    process.in_core = -1
    process.slots.leave(slot)
    process.recall()
    await process.happens("returned")


async def test_a_slot_that_is_granted_again_while_it_drains_goes_on() -> None:
    process = Process()
    process.slots.granted(KEY)
    old = await enter(process.slots)
    process.recall("first")
    (later,) = waiting(process, 1)
    await settled()
    process.slots.granted(KEY)
    assert process.returned == ["first"], "the host waits for it no more"
    assert await later is old and old.running == 2
    process.recall("second")
    process.slots.leave(old)
    await settled()
    assert process.returned == ["first"]
    process.slots.leave(old)
    await process.happens("second")


async def test_the_core_is_not_asked_about_a_slot_that_goes_on() -> None:
    process = Process()
    process.slots.granted(KEY)
    slot = await enter(process.slots)
    process.in_core = 1
    process.slots.leave(slot)
    process.recall("first")
    await settled()
    assert process.core_asked == 1
    process.slots.granted(KEY)
    assert process.returned == ["first"]
    asked = process.core_asked
    await asyncio.sleep(0.05)
    assert process.core_asked == asked
    process.in_core = 0
    process.recall("second")
    await process.happens("second")


async def test_what_was_withdrawn_is_waited_for() -> None:
    process = Process()
    process.slots.granted(KEY)
    process.slots.withdrawn(KEY)
    (task,) = waiting(process, 1)
    await settled()
    assert process.told == [(KEY, True)]
    process.slots.granted(KEY)
    await task


async def test_when_the_shard_is_gone_who_waits_is_told_and_nobody_enters() -> None:
    process = Process()
    other = ServedVersion("acme", "other", 1, 8, "/other", "digest")
    process.slots.granted(KEY)
    slot = await enter(process.slots)
    waits = asyncio.create_task(enter(process.slots, other))
    await settled()
    process.slots.lose("shard-0")
    with pytest.raises(ShardUnavailable, match="shard-0"):
        await waits
    process.slots.leave(slot)
    assert process.told == [(other.key, True)]
    (task,) = waiting(process, 1)
    await settled()
    assert not task.done()
    task.cancel()


async def test_closing_ends_what_asks_the_core() -> None:
    process = Process()
    process.slots.granted(KEY)
    slot = await enter(process.slots)
    process.in_core = 1
    process.slots.leave(slot)
    process.recall()
    await settled()
    await process.slots.close()
    asked = process.core_asked
    await asyncio.sleep(0.05)
    assert process.core_asked == asked and not process.returned
