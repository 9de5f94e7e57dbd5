"""What a worker does with a core that it cannot hear, and what it tells of one that it can."""

from __future__ import annotations

import asyncio
import contextlib
import os
from types import SimpleNamespace
from typing import Any

import pytest

from engine.fake import FakeShard
from engine.generation import ServedVersion, VersionKey
from engine.pool import ServedView, ShardPool
from engine.screening import Screening
from engine.shard import VllmShard
from gateway import attachments as module
from gateway.attachments import Attachments
from gateway.messages import WaitsForSlot, Want, WentIdle

STALL_TIMEOUT_S = 1.0
TIMEOUT_S = 30.0


class Ended(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def attachments(monkeypatch: pytest.MonkeyPatch) -> Attachments:
    """Of a worker whose only core does not greet it, with its process's end as an exception."""

    def attach(slot: object, screening: Screening) -> None:
        raise TimeoutError

    def end(code: int) -> None:
        raise Ended

    monkeypatch.setattr(VllmShard, "attach", attach)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(module, "UNHEARD_S", 1.0)
    pool = ShardPool((), {}, ServedView(), ["shard-0"])
    attached = Attachments(
        pool, Screening(), lambda message: None, lambda shard: None, STALL_TIMEOUT_S
    )
    slot: Any = SimpleNamespace(shard="shard-0")
    assert attached.attach(slot, (), ()) is None
    return attached


async def test_a_worker_that_alone_cannot_hear_a_core_ends_after_the_host_would_have_said_so(
    attachments: Attachments,
) -> None:
    began_s = asyncio.get_running_loop().time()
    with pytest.raises(Ended):
        await asyncio.wait_for(attachments.watch(), TIMEOUT_S)
    assert asyncio.get_running_loop().time() - began_s > STALL_TIMEOUT_S + 1.0


async def test_a_worker_lives_on_when_the_host_has_said_that_the_core_is_dead(
    attachments: Attachments,
) -> None:
    attachments.lose("shard-0", crashed=False)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(attachments.watch(), STALL_TIMEOUT_S + 2.5)


class AttachableShard(FakeShard):
    """A shard whose core has forgotten everything."""

    async def requests_of(self, lora_int_id: int) -> int:
        return 0


async def test_the_host_is_told_what_waits_and_what_is_idle_and_by_whom(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(VllmShard, "attach", lambda slot, screening: AttachableShard("shard-0"))
    with_slot = ServedVersion("acme", "sql", 1, 7, "/sql", "digest")
    without = ServedVersion("acme", "other", 1, 8, "/other", "digest")
    absent = VersionKey("acme", "absent", 1)
    told: list[object] = []
    pool = ShardPool((), {}, ServedView(), ["shard-0"])
    attached = Attachments(pool, Screening(), told.append, lambda shard: None, STALL_TIMEOUT_S)
    slot: Any = SimpleNamespace(shard="shard-0")
    shard = attached.attach(slot, [with_slot, without], [with_slot.key])
    assert shard is not None and attached.join(shard)

    async with pool.route_to(with_slot.key).lease():
        assert told == [], "it is loaded, and has its slot"
        residents = attached.residents("shard-0")
        assert residents is not None
        residents.uses()
    assert told == [WentIdle("shard-0")]
    keys = without.key, absent
    waiting = [asyncio.create_task(pool.route_to(key).lease().__aenter__()) for key in keys]
    await asyncio.sleep(0)
    here = "shard-0", without.key, os.getpid()
    assert told[1:] == [WaitsForSlot(*here, True), Want("shard-0", absent)]
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert told[3:] == [WaitsForSlot(*here, False)]
    await attached.close()
