"""A worker for which no core has a client slot waits for one, and the gateway goes on."""

from __future__ import annotations

import asyncio

import pytest

from engine.core import ClientSlot
from engine.errors import SlotsUsedUp
from gateway.messages import Orders
from gateway.processes import Processes
from tests.gateway.scripted_worker import ScriptedWorker, orders, serving_fleet

TIMEOUT_S = 5.0


async def test_without_a_slot_for_any_worker_the_fleet_waits_until_a_core_is_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_slot() -> Orders:
        raise SlotsUsedUp("all client slots of all shards are used up")

    async with serving_fleet(monkeypatch, 1, lambda worker, question: None) as (fleet, workers):
        monkeypatch.setattr(fleet, "_make_orders", no_slot)
        workers[0].kill()
        async with asyncio.timeout(TIMEOUT_S):
            while "waits until a core is renewed" not in caplog.text:
                await asyncio.sleep(0.01)
        assert not serving(workers), "and the fleet has not failed"
        monkeypatch.setattr(fleet, "_make_orders", orders)
        await Processes(fleet).admit("shard-0", [], [], no_slot_needed)
        async with asyncio.timeout(TIMEOUT_S):
            await fleet.wait_serving()


def serving(workers: list[ScriptedWorker]) -> list[ScriptedWorker]:
    return [worker for worker in workers if worker.at_work]


def no_slot_needed() -> ClientSlot:
    raise AssertionError("nobody is at work")
