"""When a core with few client slots is replaced: at a quiet moment, or at the last."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio

from gateway import renewal as module
from gateway.keeper_state import KeeperState
from gateway.messages import Placed
from gateway.renewal import LAST_SLOTS, LOW_SLOTS, Renewal
from tests.gateway.control_plane import KILLED, TIMEOUT_S, Plane, control_plane
from tests.gateway.three_shards import drain, key_of, living_on, order, shards


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks for itself, and waits are short."""

    async def never(renewal: Renewal) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Renewal, "run", never)
    monkeypatch.setattr(module, "LOOK_INTERVAL_S", 0.01)
    monkeypatch.setattr("gateway.drains.QUIET_POLL_S", 0.01)


@pytest_asyncio.fixture
async def plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Plane]:
    async with control_plane(tmp_path, monkeypatch, shards=3) as plane:
        yield plane


@pytest_asyncio.fixture
async def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Plane]:
    async with control_plane(tmp_path, monkeypatch) as plane:
        yield plane


def renewal_of(plane: Plane) -> Renewal:
    assert plane.control._renewal is not None
    return plane.control._renewal


def renewed(plane: Plane) -> dict[str, int]:
    return {name: keeper.renewed for name, keeper in plane.keepers.items() if keeper.renewed}


async def begun(plane: Plane, shard: str) -> Any:
    """A request of the host's own that runs there until it is left."""
    assert plane.control._shards is not None
    pool = plane.control._shards.pool
    while (route := pool.route_to(None)).shard.name != shard:
        pool._in_flight[route.shard.name] += 1
    pool._in_flight.update(dict.fromkeys(pool.ring.shards, 0))
    lease = route.lease()
    await lease.__aenter__()
    return lease


async def ended(lease: Any) -> None:
    await lease.__aexit__(None, None, None)


async def test_cores_with_slots_enough_are_left_alone(plane: Plane) -> None:
    for keeper in plane.keepers.values():
        keeper.slots_left = LOW_SLOTS + 1
    await renewal_of(plane).look()
    assert not renewed(plane)


async def test_the_core_with_fewest_slots_is_drained_renewed_and_resumed(plane: Plane) -> None:
    (adapter,) = living_on("shard-1")
    await plane.ready(adapter)
    plane.keepers["shard-0"].slots_left = LOW_SLOTS
    plane.keepers["shard-1"].slots_left = LOW_SLOTS - 1
    lease = await begun(plane, "shard-1")
    looking = asyncio.create_task(renewal_of(plane).look())
    async with asyncio.timeout(TIMEOUT_S):
        while plane.control.drained != {"shard-1"}:
            await asyncio.sleep(0.01)
    told = (await shards(plane))["shard-1"]
    assert told.drain.by_renewal and told.in_flight == 1
    assert key_of(adapter) in plane.shards[order(adapter)[1]].loaded, "warm elsewhere first"
    assert not renewed(plane), "it waits for what runs there"
    await ended(lease)
    await looking
    assert renewed(plane) == {"shard-1": 1} and not plane.control.drained
    await renewal_of(plane).look()
    assert renewed(plane) == {"shard-1": 1, "shard-0": 1}, "one after the other"


async def test_the_last_slots_are_not_waited_for(plane: Plane) -> None:
    plane.keepers["shard-1"].slots_left = LOW_SLOTS
    lease = await begun(plane, "shard-1")
    looking = asyncio.create_task(renewal_of(plane).look())
    async with asyncio.timeout(TIMEOUT_S):
        while plane.control.drained != {"shard-1"}:
            await asyncio.sleep(0.01)
    plane.keepers["shard-1"].slots_left = LAST_SLOTS
    await looking
    assert renewed(plane) == {"shard-1": 1}
    await ended(lease)


async def test_a_core_that_dies_meanwhile_needs_no_renewal(plane: Plane) -> None:
    plane.keepers["shard-1"].slots_left = LOW_SLOTS
    lease = await begun(plane, "shard-1")
    looking = asyncio.create_task(renewal_of(plane).look())
    async with asyncio.timeout(TIMEOUT_S):
        while plane.control.drained != {"shard-1"}:
            await asyncio.sleep(0.01)
    plane.keepers["shard-1"].state = KeeperState.DEAD
    plane.control.lose("shard-1", KILLED)
    await looking
    assert not renewed(plane) and not plane.control.drained
    await renewal_of(plane).look()
    assert not renewed(plane), "it is not up"
    await ended(lease)


async def test_what_an_operator_has_drained_is_renewed_and_stays_drained(plane: Plane) -> None:
    await drain(plane, "shard-1")
    plane.keepers["shard-1"].slots_left = LOW_SLOTS
    await renewal_of(plane).look()
    assert renewed(plane) == {"shard-1": 1} and plane.control.drained == {"shard-1"}


async def test_a_renewal_that_fails_leaves_no_shard_drained(
    plane: Plane, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fails() -> None:
        raise RuntimeError("bug")

    keeper = plane.keepers["shard-1"]
    keeper.slots_left = LOW_SLOTS
    monkeypatch.setattr(keeper, "renew", fails)
    await renewal_of(plane).look()
    assert not plane.control.drained
    assert "could not be renewed" in caplog.text


# --- the only shard that answers -------------------------------------------------


async def test_the_only_shard_is_renewed_after_a_while_without_requests(
    alone: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = time.monotonic()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now_s))
    alone.keepers["shard-0"].slots_left = LOW_SLOTS
    renewal = renewal_of(alone)
    await renewal.look()
    now_s += module.IDLE_S - 1
    await renewal.look()
    assert not renewed(alone)
    lease = await begun(alone, "shard-0")
    now_s += 2
    await renewal.look()
    assert not renewed(alone), "one runs"
    await ended(lease)
    now_s += module.IDLE_S - 1
    await renewal.look()
    assert not renewed(alone)
    now_s += 1
    await renewal.look()
    assert renewed(alone) == {"shard-0": 1} and not alone.control.drained


async def test_a_request_between_two_looks_counts(
    alone: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s, ever = time.monotonic(), 5
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now_s))

    async def placed() -> list[Placed]:
        return [Placed({"shard-0": 0}, ever)]

    renewal = renewal_of(alone)
    monkeypatch.setattr(renewal._processes, "placed", placed)
    alone.keepers["shard-0"].slots_left = LOW_SLOTS
    await renewal.look()
    now_s += module.IDLE_S
    ever += 1
    await renewal.look()
    assert not renewed(alone)
    now_s += module.IDLE_S
    await renewal.look()
    assert renewed(alone)


async def test_with_its_last_slots_it_is_renewed_whatever_runs(
    alone: Plane, caplog: pytest.LogCaptureFixture
) -> None:
    lease = await begun(alone, "shard-0")
    alone.keepers["shard-0"].slots_left = LAST_SLOTS
    await renewal_of(alone).look()
    assert renewed(alone) == {"shard-0": 1}
    assert "calls are refused until it is up" in caplog.text
    await ended(lease)


async def test_a_failure_ends_neither_the_looking_nor_the_gateway(
    plane: Plane, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.undo()  # the real `run`
    monkeypatch.setattr(module, "LOOK_INTERVAL_S", 0.01)
    looked = asyncio.Event()
    failures = [RuntimeError("bug")]

    async def look() -> None:
        if failures:
            raise failures.pop()
        looked.set()

    renewal = renewal_of(plane)
    monkeypatch.setattr(renewal, "look", look)
    running = asyncio.create_task(renewal.run())
    await asyncio.wait_for(looked.wait(), TIMEOUT_S)
    running.cancel()
    assert "a core could not be renewed" in caplog.text
