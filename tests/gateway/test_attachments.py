"""What a worker does with a core that it cannot hear."""

from __future__ import annotations

import asyncio
import contextlib
import os
from types import SimpleNamespace
from typing import Any

import pytest

from engine.pool import ServedView, ShardPool
from engine.screening import Screening
from engine.shard import VllmShard
from gateway import attachments as module
from gateway.attachments import Attachments

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
        pool, Screening(), lambda shard, key: None, lambda shard: None, STALL_TIMEOUT_S
    )
    slot: Any = SimpleNamespace(shard="shard-0")
    assert attached.attach(slot, ()) is None
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
