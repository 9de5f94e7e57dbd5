"""More adapters than names: who is called gets one, in all workers and their successors."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Iterator

import psutil
import pytest

from gateway.adapter_labels import MAX_NAMED, OTHER_LABEL
from tests.bench.adapters_state import adapter_name, write_states
from tests.e2e.gateway_process import GatewayProcess, gateway_process
from tests.e2e.shard_calls import ask, ask_often

# A minute, most of it for an engine that starts.
pytestmark = [pytest.mark.timeout(500), pytest.mark.slow]

CALLED, RARE = adapter_name(0), adapter_name(1)
NAMED_S = 120.0
CALLS = 16
"""At once, each on a connection of its own: both workers get some."""


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A gateway with two workers and one adapter more than it names."""
    folder = tmp_path_factory.mktemp("crowded")
    states = asyncio.run(write_states(folder, "tiny", MAX_NAMED + 1))
    states.full.rename(folder / "state")
    with gateway_process(folder, workers=2) as process:
        yield process


def counted(gateway: GatewayProcess) -> Counter[str]:
    """Calls that were answered, by what their adapter is called."""
    return Counter(
        {
            name: int(sum(gateway.metrics("llm_adapter_requests_total", adapter=name, code="OK")))
            for name in (CALLED, RARE, OTHER_LABEL)
        }
    )


async def all_are_named(gateway: GatewayProcess) -> None:
    """Call until calls over both workers are counted under the adapter's name."""
    async with asyncio.timeout(NAMED_S):
        while True:
            before = counted(gateway)
            await ask_often(gateway.address, CALLED, CALLS)
            if counted(gateway) == before + Counter({CALLED: CALLS}):
                return


async def test_names_are_given_by_traffic_and_kept_by_workers_that_come_later(
    crowded: GatewayProcess,
) -> None:
    await ask(crowded.address, CALLED)
    assert counted(crowded) == Counter({OTHER_LABEL: 1}), "nobody knew who is called"
    await all_are_named(crowded)
    assert not sum(crowded.metrics("gateway_series_dropped_total")), "there was room"

    first, *others = crowded.serving_workers()
    psutil.Process(first).send_signal(signal.SIGKILL)
    await asyncio.to_thread(
        crowded.wait_log, r"worker \d+ is serving", NAMED_S, count=2 + len(others)
    )
    before = counted(crowded)
    await ask_often(crowded.address, CALLED, CALLS)
    assert counted(crowded) == before + Counter({CALLED: CALLS}), "from its first call on"
    await ask(crowded.address, RARE)
    assert counted(crowded)[OTHER_LABEL] == before[OTHER_LABEL] + 1
