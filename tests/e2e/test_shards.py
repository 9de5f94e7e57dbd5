"""Two real engines behind one gateway: who answers what, and who goes on when one dies."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import grpc
import psutil
import pytest

from tests.details import error_info
from tests.e2e.gateway_process import GatewayProcess
from tests.e2e.shard_calls import (
    NAMES,
    SPREAD,
    STALL_TIMEOUT_S,
    Stream,
    ask,
    ask_often,
    core_of,
    homes,
    is_gone,
    loop_lags,
    own_shards,
    restarts,
    until_up,
)

BACK_S = 240.0
"""A load of the model on a busy machine."""
CALL_S = 400.0
"""For an answer of 1,500 tokens, begun anew on the other shard, on a busy machine."""

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]


async def test_adapters_are_spread_over_the_shards_as_the_ring_says(two: GatewayProcess) -> None:
    homes_of = homes(SPREAD)
    assert set(homes_of.values()) == set(NAMES)
    for adapter, home in homes_of.items():
        answers = await ask_often(two.address, adapter, 4)  # over both workers
        assert {answer.served_by.shard for answer in answers} == {home}


async def test_the_base_model_is_on_both_shards_and_answers_alike(two: GatewayProcess) -> None:
    answers = await ask_often(two.address, "", 16)
    assert {answer.served_by.shard for answer in answers} == set(NAMES)
    assert len({answer.completions[0].text for answer in answers}) == 1


async def test_two_shards_answer_as_one_does(
    two: GatewayProcess, gateway: GatewayProcess, adapters: Mapping[str, Path]
) -> None:
    for adapter in ("", *adapters):
        one, other = [
            (await ask(address, adapter)).completions[0].text
            for address in (two.address, gateway.address)
        ]
        assert one == other, adapter or "the base model"


async def test_metrics_tell_the_shards_apart(
    two: GatewayProcess, adapters: Mapping[str, Path]
) -> None:
    homes_of = homes([*SPREAD, *adapters])
    for shard in NAMES:
        living = [adapter for adapter, home in homes_of.items() if home == shard]
        assert two.metrics("adapters_resident", shard=shard) == [len(living)]
        for name in ("vllm:num_requests_running", "vllm:kv_cache_usage_perc"):
            assert len(two.metrics(name, shard=shard)) == 1, "one series for each shard"
        before = sum(two.metrics("vllm:generation_tokens_total", shard=shard))
        planned = sum(two.metrics("gateway_placements_total", shard=shard, reason="planned"))
        for adapter in living:
            await ask(two.address, adapter, max_tokens=5)
        after = sum(two.metrics("vllm:generation_tokens_total", shard=shard))
        assert after - before == 5 * len(living)
        assert sum(
            two.metrics("gateway_placements_total", shard=shard, reason="planned")
        ) == planned + len(living)
        assert two.metrics("gateway_client_slots_left", shard=shard)


async def test_supervisor_replaces_a_core_that_is_killed_under_load(two: GatewayProcess) -> None:
    """The other shard's streams notice nothing, those of the dead one end at once, and who had no
    token yet is answered elsewhere."""
    victim, other = "shard-1", "shard-0"
    homes_of = homes(SPREAD)
    # First of all, so that each is at home, and long: a unary call has no token before its end.
    waiting = [
        asyncio.create_task(ask(two.address, adapter, max_tokens=1500, timeout_s=CALL_S))
        for adapter, home in homes_of.items()
        if home == victim
    ]
    async with asyncio.timeout(120):
        while two.metrics("vllm:num_requests_running", shard=victim) != [len(waiting)]:
            await asyncio.sleep(0.05)
    streams = [
        Stream(two.address, adapter) for adapter in (*SPREAD, *SPREAD, *SPREAD) for _ in (1, 2)
    ]
    streams += [Stream(two.address, "") for _ in range(4)]
    assert len(streams) == 40
    for stream in streams:
        await stream.has_token.wait()
    assert not any(call.done() for call in waiting)
    before, died = restarts(two, victim), restarts_counted(two, victim, "died")
    retried = sum(two.metrics("gateway_retries_total"))
    core = core_of(two, victim)
    tree = [core, *core.children(recursive=True)]
    back = asyncio.Event()
    watching = asyncio.create_task(loop_lags(two, back))
    core.send_signal(signal.SIGKILL)
    killed_s = time.monotonic()
    answers = await asyncio.gather(*waiting)
    assert {answer.served_by.shard for answer in answers} == {other}
    await asyncio.gather(*(stream.done for stream in streams))
    hit = [stream for stream in streams if stream.shard == victim]
    assert hit and len(hit) < len(streams)
    for stream in streams:
        if stream.shard == other:
            assert stream.finished, "the other shard's streams go on"
            continue
        assert stream.error is not None and stream.ended_s - killed_s < 1.0
        assert stream.error.code() is grpc.StatusCode.UNAVAILABLE
        info = error_info(stream.error)
        assert (info.reason, info.metadata["shard"]) == ("SHARD_UNAVAILABLE", victim)
        assert int(info.metadata["tokens_emitted"]) >= stream.tokens > 0
    _, alive = await asyncio.to_thread(psutil.wait_procs, tree, 30)
    assert not alive, "nothing is left of it"
    took_s = await until_up(two, victim, before + 1, BACK_S)
    await asyncio.sleep(1.5)  # the workers attach within the last second
    back.set()
    lags = sorted(await watching)
    last_s = max(stream.ended_s for stream in hit) - killed_s
    print(f"{len(hit)} streams of {victim} ended within {last_s * 1000:.0f} ms")
    print(f"{len(answers)} calls were answered elsewhere; it was back after {took_s:.1f} s")
    print(f"event loops were late by {lags[len(lags) // 2] * 1000:.0f} ms in the median")
    print(f"and by {lags[-1] * 1000:.0f} ms at worst")
    seen = set()
    for adapter, home in homes_of.items():
        # One that was hot in the last minutes has a copy on the other shard.
        own = await own_shards(two.address, adapter)
        shards = {answer.served_by.shard for answer in await ask_often(two.address, adapter, 4)}
        assert home in own and shards <= own, "over both workers"
        seen |= shards
    assert victim in seen
    assert two.metrics("gateway_shard_up", shard=victim) == [1.0]
    assert restarts_counted(two, victim, "died") == died + 1
    assert sum(two.metrics("gateway_retries_total")) == retried + len(answers)


async def test_supervisor_kills_a_core_that_stalls_and_replaces_it(two: GatewayProcess) -> None:
    victim, other = "shard-0", "shard-1"
    adapter = next(name for name, home in homes(SPREAD).items() if home == victim)
    before = restarts(two, victim)
    stalled = restarts_counted(two, victim, "stalled")
    core = core_of(two, victim)
    tree = [core, *core.children(recursive=True)]
    stopped_s = time.monotonic()
    core.send_signal(signal.SIGSTOP)
    waiting = asyncio.create_task(ask(two.address, adapter, timeout_s=CALL_S))
    async with asyncio.timeout(STALL_TIMEOUT_S + 10):
        while not all(map(is_gone, tree)):
            await asyncio.sleep(0.02)
    took_s = time.monotonic() - stopped_s
    assert STALL_TIMEOUT_S <= took_s < STALL_TIMEOUT_S + 2
    print(f"{victim} was killed {took_s - STALL_TIMEOUT_S:.1f} s after its limit")
    assert (await waiting).served_by.shard == other
    await until_up(two, victim, before + 1, BACK_S)
    assert (await ask(two.address, adapter)).served_by.shard == victim
    assert restarts_counted(two, victim, "stalled") == stalled + 1
    assert "Traceback" not in two.log


def restarts_counted(gateway: GatewayProcess, shard: str, cause: str) -> float:
    """Restarts by that cause, as the metric counts them."""
    return sum(gateway.metrics("gateway_shard_restarts_total", shard=shard, cause=cause))
