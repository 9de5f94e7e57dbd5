"""Admin over two real engines: drained under load, dead meanwhile, resumed; routes explained."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest

from lora_gateway import GatewayClient
from lora_gateway.v1 import admin_pb2 as pb
from lora_gateway.v1.admin_pb2_grpc import AdminStub
from tests.e2e.gateway_process import GatewayProcess
from tests.e2e.shard_calls import (
    NAMES,
    SPREAD,
    Stream,
    ask,
    ask_often,
    core_of,
    homes,
    restarts,
    until_up,
)

VICTIM, OTHER = "shard-1", "shard-0"
BACK_S = 240.0
"""A load of the model on a busy machine."""
ADMIN_S = 60.0
"""For loads of adapters, between the steps of many streams."""
EXPLAINED = 50
"""Adapters of which routes are explained and then taken."""
BUF = Path(sys.executable).with_name("buf")

# The first one starts two engines, and one of them starts another.
pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]


@contextlib.asynccontextmanager
async def admin(gateway: GatewayProcess) -> AsyncIterator[Any]:
    """The service Admin."""
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        yield AdminStub(channel)


async def shard(gateway: GatewayProcess, name: str) -> pb.Shard:
    async with admin(gateway) as stub:
        answer: pb.ListShardsResponse
        answer = await stub.ListShards(pb.ListShardsRequest(), timeout=ADMIN_S)
    return next(shard for shard in answer.shards if shard.shard == name)


async def drain(gateway: GatewayProcess, **fields: Any) -> pb.DrainShardResponse:
    async with admin(gateway) as stub:
        request = pb.DrainShardRequest(shard=VICTIM, **fields)
        answer: pb.DrainShardResponse = await stub.DrainShard(request, timeout=ADMIN_S * 4)
        return answer


async def resume(gateway: GatewayProcess) -> pb.Shard:
    async with admin(gateway) as stub:
        request = pb.ResumeShardRequest(shard=VICTIM)
        answer = await stub.ResumeShard(request, timeout=ADMIN_S)
        told: pb.Shard = answer.shard
        return told


async def loads(gateway: GatewayProcess) -> float:
    """Loads of adapters into any engine so far."""
    counts = await asyncio.to_thread(gateway.metrics, "adapter_load_seconds_count", phase="all")
    return sum(counts)


class Callers:
    """Callers who go on calling, each on a new connection for each call, until they are told to
    stop. One call that fails fails the test."""

    def __init__(self, address: str, adapters: list[str], count: int = 3) -> None:
        self.answers: list[tuple[float, str]] = []
        """When each call began, on the monotonic clock, and who answered it."""
        self._stop = asyncio.Event()
        self._tasks = [
            asyncio.create_task(self._call(address, adapters[number:] + adapters[:number]))
            for number in range(count)
        ]

    async def _call(self, address: str, adapters: list[str]) -> None:
        while not self._stop.is_set():
            for adapter in adapters:
                began_s = time.monotonic()
                answer = await ask(address, adapter, max_tokens=4)
                self.answers.append((began_s, answer.served_by.shard))

    async def stop(self) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)

    def since(self, since_s: float) -> set[str]:
        """Who answered calls that began then or later."""
        return {shard for began_s, shard in self.answers if began_s >= since_s}


async def at_home(gateway: GatewayProcess, adapters: list[str]) -> None:
    """Have each adapter loaded where it lives and nowhere else, as other tests expect it."""
    async with GatewayClient(gateway.address) as client:
        for adapter in adapters:
            await client.adapters.unload(adapter, 1)
            await client.adapters.load(adapter, 1)


async def test_a_shard_is_drained_under_load_dies_unnoticed_and_is_resumed(
    two: GatewayProcess, adapters: Mapping[str, Path]
) -> None:
    every = [*SPREAD, *adapters]
    mine = [name for name, home in homes(every).items() if home == VICTIM]
    assert mine
    streams = [Stream(two.address, name) for name in [*SPREAD, ""] for _ in range(5)]
    assert len(streams) > 30
    for stream in streams:
        await stream.has_token.wait()
    running = [stream for stream in streams if stream.shard == VICTIM]
    assert running
    callers = Callers(two.address, [*every, ""])

    answer = await drain(two)
    moved_s = time.monotonic()
    assert answer.shard.drain.phase == pb.DRAIN_PHASE_DRAINED
    assert {moved.adapter for moved in answer.moved} <= {*mine}
    assert {(moved.shard, moved.error) for moved in answer.moved} <= {(OTHER, "")}
    before = await loads(two)
    for adapter in every:
        for told in await ask_often(two.address, adapter, 4):  # over both workers
            assert told.served_by.shard == OTHER
    assert await loads(two) == before, "no call found a load in its way"
    still = sum(not stream.done.done() for stream in running)
    print(f"{len(answer.moved)} loads came first; {still} of {len(running)} streams ran on")
    assert (await drain(two, wait=True)).shard.in_flight == 0
    await asyncio.gather(*(stream.done for stream in streams))
    assert [stream.error for stream in streams if not stream.finished] == []

    often = restarts(two, VICTIM)
    core_of(two, VICTIM).send_signal(signal.SIGKILL)
    await until_up(two, VICTIM, often + 1, BACK_S)
    back = await shard(two, VICTIM)
    assert back.state == pb.SHARD_STATE_UP and back.drain.phase == pb.DRAIN_PHASE_DRAINED
    assert back.last_death.reason == "killed by SIGKILL" and back.restarts >= 1
    assert two.metrics("gateway_shard_drained", shard=VICTIM) == [1.0]
    await ask_often(two.address, mine[0], 4)
    assert callers.since(moved_s) == {OTHER}, "and none of them failed"
    assert not (await shard(two, VICTIM)).residents, "it is cold while it is drained"

    assert not (await resume(two)).HasField("drain")
    await callers.stop()  # with them, some calls would overflow
    before = await loads(two)
    for adapter in mine:
        for told in await ask_often(two.address, adapter, 4):
            assert told.served_by.shard == VICTIM
    assert await loads(two) == before, "all were warm"
    print(f"{len(callers.answers)} calls beside it, none of which failed")
    await at_home(two, every)
    assert "Traceback" not in two.log


async def test_routes_that_are_explained_are_those_that_are_taken(
    two: GatewayProcess, sources: Path
) -> None:
    names = [f"explained-{number}" for number in range(EXPLAINED)]
    folder = sources / "1"
    async with GatewayClient(two.address) as client, admin(two) as stub:
        for name in names:
            await client.adapters.upload(folder, adapter=name, wait=True, no_traffic=True)
        taken: dict[str, int] = dict.fromkeys(NAMES, 0)
        for name in names:
            request = pb.ExplainRouteRequest(adapter=name, version=1)
            told = await stub.ExplainRoute(request, timeout=ADMIN_S)
            assert len(told.workers) == 2 and told.version_reason == pb.VERSION_REASON_ASKED_FOR
            assert {worker.reason for worker in told.workers} == {pb.ROUTE_REASON_PLANNED}
            assert told.shard == told.shards[0].shard == homes([name])[name]
            assert told.shards[0].resident and told.shards[0].slot_free
            answer = await client.generate("Once", adapter=name, version=1, max_tokens=1)
            assert answer.served_by.shard == told.shard
            taken[told.shard] += 1
        assert all(taken.values())
        for name in names:
            await client.adapters.delete(name, 1)


async def test_the_last_open_shard_is_kept(
    two: GatewayProcess, adapters: Mapping[str, Path]
) -> None:
    async with admin(two) as stub:
        await stub.DrainShard(pb.DrainShardRequest(shard=OTHER), timeout=ADMIN_S)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.DrainShard(pb.DrainShardRequest(shard=VICTIM), timeout=ADMIN_S)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert {told.served_by.shard for told in await ask_often(two.address, "", 8)} == {VICTIM}
        await stub.ResumeShard(pb.ResumeShardRequest(shard=OTHER), timeout=ADMIN_S)
    await at_home(two, [*SPREAD, *adapters])


def test_it_is_reached_by_hand(two: GatewayProcess) -> None:
    """With `buf curl`, which learns the types by reflection."""
    curl = subprocess.run(
        [
            *(str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--reflect"),
            *("--data", "{}", f"http://{two.address}/lora_gateway.v1.Admin/ListShards"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert curl.returncode == 0, curl.stderr
    told = json.loads(curl.stdout)["shards"]
    assert [(shard["shard"], shard["state"]) for shard in told] == [
        (name, "SHARD_STATE_UP") for name in NAMES
    ]
    assert all(shard["residents"] for shard in told)
