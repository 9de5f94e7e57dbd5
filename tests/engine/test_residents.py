"""A version is held from before its request until after it, and leaves when nothing runs on it."""

from __future__ import annotations

import asyncio

import pytest

from engine.errors import AdapterLoadFailed, ShardUnavailable
from engine.generation import ServedVersion, VersionKey
from engine.residents import Residents
from engine.slot_holds import SlotHolds
from tests.engine.open_slots import open_slots

KEY = VersionKey("acme", "sql", 1)
LOADED = ServedVersion("acme", "sql", 1, 7, "/sql", "digest")


class Process:
    """One process's residents, and what the host and the core would see of it."""

    def __init__(self) -> None:
        self.asked: list[VersionKey] = []
        self.in_core = 0
        self.core_asked = asyncio.Event()
        self.left: list[str] = []
        self.residents = Residents(self.asked.append, self._requests, open_slots())

    async def _requests(self, lora_int_id: int) -> int:
        assert lora_int_id == LOADED.lora_int_id
        self.core_asked.set()
        if self.in_core < 0:
            raise ShardUnavailable("shard-0")
        return self.in_core

    def leave(self) -> None:
        self.residents.leave(KEY, lambda: self.left.append("left"))


async def settled() -> None:
    """Let all that can run, run."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_what_is_loaded_is_held_at_once() -> None:
    process = Process()
    process.residents.all_loaded([LOADED])
    resident = await process.residents.hold(KEY)
    assert resident.version == LOADED
    assert process.asked == []
    use = process.residents.uses()[KEY]
    assert use.holds == 1 and use.last_use_s > 0
    process.residents.release(resident)
    assert process.residents.uses()[KEY].holds == 0


async def test_many_that_wait_ask_the_host_once_and_all_hold() -> None:
    process = Process()
    waiting = [asyncio.create_task(process.residents.hold(KEY)) for _ in range(3)]
    await settled()
    assert process.asked == [KEY]
    process.residents.loaded(LOADED)
    assert process.residents.uses()[KEY].holds == 3, "held before they run again"
    assert len({id(await task) for task in waiting}) == 1


async def test_a_failed_load_tells_all_that_wait_and_the_next_asks_again() -> None:
    process = Process()
    waiting = [asyncio.create_task(process.residents.hold(KEY)) for _ in range(2)]
    await settled()
    process.residents.failed(KEY, "its files are gone")
    for task in waiting:
        with pytest.raises(AdapterLoadFailed, match="its files are gone"):
            await task
    again = asyncio.create_task(process.residents.hold(KEY))
    await settled()
    assert process.asked == [KEY, KEY]
    process.residents.loaded(LOADED)
    assert (await again).version == LOADED


async def test_who_gives_up_waiting_holds_nothing() -> None:
    process = Process()
    early, late = (asyncio.create_task(process.residents.hold(KEY)) for _ in range(2))
    await settled()
    early.cancel()
    await settled()
    process.residents.loaded(LOADED)
    late.cancel()  # it holds already, but has not run since
    await asyncio.gather(early, late, return_exceptions=True)
    assert early.cancelled() and late.cancelled()
    assert process.residents.uses()[KEY].holds == 0


async def test_what_leaves_is_handed_out_no_more_and_waits_for_its_holders() -> None:
    process = Process()
    process.residents.loaded(LOADED)
    resident = await process.residents.hold(KEY)
    process.leave()
    waiting = asyncio.create_task(process.residents.hold(KEY))
    await settled()
    assert process.asked == [KEY], "the next request waits for it to be loaded again"
    assert process.left == []
    process.residents.release(resident)
    await settled()
    assert process.left == ["left"]
    assert KEY not in process.residents.uses()
    process.residents.loaded(LOADED)
    assert (await waiting).version == LOADED


async def test_what_leaves_waits_until_the_core_has_forgotten_its_requests() -> None:
    process = Process()
    process.residents.loaded(LOADED)
    process.in_core = 2
    process.leave()
    await process.core_asked.wait()
    await settled()
    assert process.left == []
    process.in_core = 0
    while not process.left:
        await asyncio.sleep(0.001)


async def test_a_core_that_does_not_answer_keeps_nothing_from_leaving() -> None:
    process = Process()
    process.residents.loaded(LOADED)
    process.in_core = -1
    process.leave()
    await settled()
    assert process.left == ["left"]


async def test_what_is_not_there_has_left() -> None:
    process = Process()
    process.leave()
    assert process.left == ["left"]


async def test_closing_ends_what_still_leaves() -> None:
    process = Process()
    process.residents.loaded(LOADED)
    process.in_core = 1
    process.leave()
    await process.core_asked.wait()
    await process.residents.close()
    assert process.left == []


async def test_when_the_shard_is_gone_who_waits_is_told_and_holds_can_be_given_back() -> None:
    process = Process()
    process.residents.loaded(LOADED)
    held = await process.residents.hold(KEY)
    waiting = [
        asyncio.create_task(process.residents.hold(KEY._replace(version=2))) for _ in range(2)
    ]
    await settled()
    process.residents.lose("shard-0")
    for failed in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(failed, ShardUnavailable) and failed.shard == "shard-0"
    process.residents.release(held)
    assert process.residents.uses() == {}


async def test_the_host_is_told_once_of_what_became_idle_since_it_asked() -> None:
    told: list[str] = []
    residents = Residents(lambda key: None, no_requests, open_slots(), lambda: told.append("idle"))
    residents.loaded(LOADED)

    async def use() -> None:
        first, second = await residents.hold(KEY), await residents.hold(KEY)
        residents.release(first)
        assert len(told) == before, "another request runs"
        residents.release(second)

    before = 0
    await use()
    assert not told, "it has not asked"
    residents.uses()
    await use()
    before = 1
    assert told == ["idle"]
    await use()
    assert told == ["idle"], "it has to ask again"


async def no_requests(lora_int_id: int) -> int:
    return 0


async def test_slots_are_lost_and_closed_with_the_rest() -> None:
    asked = asyncio.Event()

    async def never(lora_int_id: int) -> int:
        asked.set()
        await asyncio.Event().wait()
        return 0

    slots = SlotHolds(lambda key, waits: None, never)
    residents = Residents(lambda key: None, never, slots)
    residents.loaded(LOADED)
    slots.granted(KEY)
    slot = slots.enter(KEY, LOADED.lora_int_id)
    assert slot is not None
    slots.leave(slot)
    returned: list[str] = []
    slots.recall(KEY, lambda: returned.append("returned"))
    waiting = asyncio.create_task(slots.wait(KEY, LOADED.lora_int_id))
    await asked.wait()
    residents.lose("shard-0")
    with pytest.raises(ShardUnavailable, match="shard-0"):
        await waiting
    (asking,) = (slot.asking for slot in slots._recalled.values())
    assert asking is not None
    await residents.close()
    assert asking.cancelled() and not returned
