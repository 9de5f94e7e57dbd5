"""All shards start, the first alone if they compile; who is up gets what they are asked for."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from engine.errors import CoreFailed, SlotsUsedUp
from gateway import supervisor as module
from gateway.keeper_state import KeeperState
from gateway.supervisor import Supervisor

CONFIG: Any = object()


class FakeKeeper:
    """A shard that starts when it may, or fails."""

    def __init__(self, name: str, log: list[str], fails: str = "") -> None:
        self.name = name
        self.state = KeeperState.STARTING
        self.shard: Any = None
        self.settled = False
        self.config: Any = None
        self.may_start = asyncio.Event()
        self.died = asyncio.Event()
        self._log = log
        self._fails = fails

        self.slots_left = 2

    async def start(self, config: Any = None) -> None:
        self.config = config
        self._log.append(f"{self.name} starts")
        try:
            await self.may_start.wait()
        except asyncio.CancelledError:
            self._log.append(f"{self.name} is given up")
            raise
        if self._fails:
            raise CoreFailed(self._fails)
        self.state = KeeperState.UP
        self.shard = SimpleNamespace(name=self.name, info="model")

    async def keep(self, followers: Any) -> None:
        await self.died.wait()
        raise CoreFailed(f"{self.name} ended")

    def take_slot(self) -> Any:
        self.slots_left -= 1
        return f"slot of {self.name}"

    async def abort_client(self, slot: Any) -> int:
        return len(slot.shard)

    async def stop(self) -> None:
        self._log.append(f"{self.name} stops")


def keepers(log: list[str], count: int, **fails: str) -> list[Any]:
    names = [f"shard_{number}" for number in range(count)]
    return [FakeKeeper(name, log, fails.get(name, "")) for name in names]


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_the_first_starts_alone_and_the_others_beside_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "STARTS_AT_ONCE", 2)
    log: list[str] = []
    first, *others = all_of_them = keepers(log, 4)
    supervisor = Supervisor(all_of_them, compiles=True)
    starting = asyncio.create_task(supervisor.start(CONFIG))
    await settled()
    assert log == ["shard_0 starts"] and first.config is CONFIG
    first.may_start.set()
    await settled()
    assert log[1:] == ["shard_1 starts", "shard_2 starts"]
    assert others[0].config is None, "it has devices of its own"
    for keeper in others:
        keeper.may_start.set()
    await starting
    assert supervisor.model == "model"  # type: ignore[comparison-overlap]
    assert [shard.name for shard in supervisor.shards] == [keeper.name for keeper in all_of_them]
    assert len(supervisor.take_slots()) == 4
    others[1].state, others[1].shard = KeeperState.WARMING, None
    assert [*map(str, supervisor.take_slots())] == [
        "slot of shard_0",
        "slot of shard_1",
        "slot of shard_3",
    ]
    assert len(supervisor.shards) == 3
    first.slots_left = 1
    assert [*map(str, supervisor.take_slots())] == ["slot of shard_0"], (
        "the others offer themselves renewed"
    )
    with pytest.raises(SlotsUsedUp):
        supervisor.take_slots()
    for keeper in all_of_them:
        keeper.state = KeeperState.DEAD
    assert not supervisor.take_slots(), "each offers itself when it is up"
    supervisor.settle()
    assert all(keeper.settled for keeper in all_of_them)


async def test_all_start_beside_each_other_where_nothing_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "STARTS_AT_ONCE", 2)
    log: list[str] = []
    first, second, third = all_of_them = keepers(log, 3)
    supervisor = Supervisor(all_of_them, compiles=False)
    starting = asyncio.create_task(supervisor.start(CONFIG))
    await settled()
    assert log == ["shard_0 starts", "shard_1 starts"]
    assert (first.config, second.config) == (CONFIG, None)
    second.may_start.set()
    await settled()
    assert log[2:] == ["shard_2 starts"]
    first.may_start.set()
    third.may_start.set()
    await starting
    assert [shard.name for shard in supervisor.shards] == ["shard_0", "shard_1", "shard_2"]


@pytest.mark.parametrize("compiles", [True, False])
async def test_one_that_cannot_start_ends_the_start_with_its_line(compiles: bool) -> None:
    log: list[str] = []
    first, second, third = keepers(log, 3, shard_1="shard_1 did not start")
    supervisor = Supervisor([first, second, third], compiles=compiles)
    first.may_start.set()
    second.may_start.set()
    with pytest.raises(CoreFailed, match="shard_1 did not start"):
        await supervisor.start(CONFIG)
    assert log[-1] == "shard_2 is given up"
    await supervisor.stop()
    assert log[-3:] == ["shard_0 stops", "shard_1 stops", "shard_2 stops"]


async def test_what_a_keeper_cannot_mend_comes_through() -> None:
    first, second = keepers([], 2)
    keeping = asyncio.create_task(Supervisor([first, second], compiles=True).keep(CONFIG))
    await settled()
    second.died.set()
    with pytest.raises(CoreFailed, match="shard_1 ended"):
        await keeping
