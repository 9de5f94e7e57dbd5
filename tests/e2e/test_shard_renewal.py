"""A core with few client slots left is replaced while two shards serve, and nobody notices."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from tests.e2e import soon_renewed
from tests.e2e.gateway_process import gateway_process
from tests.e2e.shard_calls import NAMES, Stream, ask_often, core_of, homes, is_gone
from tests.e2e.test_shard_admin import Callers

BACK_S = 400.0
"""Two loads of the model on a busy machine."""

# A gateway of its own, and two more loads of the model.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


async def test_cores_with_few_slots_are_renewed_one_after_the_other(
    adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    with gateway_process(
        tmp_path,
        workers=2,
        adapters=adapters,
        extra=["--shards", "2"],
        program=[soon_renewed.__file__],
    ) as gateway:
        cores = [core_of(gateway, name) for name in NAMES]
        assert sum(gateway.metrics("gateway_client_slots_left")) == 2 * 61
        os.kill(gateway.serving_workers()[0], signal.SIGKILL)
        await asyncio.to_thread(gateway.wait_log, r"worker \d+ is serving", BACK_S, count=3)
        # From here on nothing may fail.
        streams = [Stream(gateway.address, name) for name in [*adapters, ""] for _ in range(3)]
        callers = Callers(gateway.address, [*adapters, ""], count=2)
        for name in NAMES:
            await asyncio.to_thread(gateway.wait_log, rf"{name} was renewed in", BACK_S)
        await asyncio.to_thread(
            gateway.wait_log, r"shard-\d takes requests again", BACK_S, count=len(NAMES)
        )
        await asyncio.gather(*(stream.done for stream in streams))
        await callers.stop()
        assert [stream.error for stream in streams if not stream.finished] == []
        assert {shard for _, shard in callers.answers} == {*NAMES}
        assert all(map(is_gone, cores))
        assert all(psutil.pid_exists(core_of(gateway, name).pid) for name in NAMES)
        renewals = [
            *gateway.metrics("gateway_shard_restarts_total", cause="renewed"),
            *gateway.metrics("gateway_client_slots_left"),
            *gateway.metrics("gateway_shard_drained"),
        ]
        assert renewals == [1.0, 1.0, 61.0, 61.0, 0.0, 0.0]
        assert not sum(gateway.metrics("gateway_shard_restarts_total", cause="died"))
        for adapter, home in homes(adapters).items():
            assert {
                told.served_by.shard for told in await ask_often(gateway.address, adapter, 4)
            } == {home}
        print(f"{len(callers.answers)} calls and {len(streams)} streams, none of which failed")
        assert "Traceback" not in gateway.log
