"""What dies, and who goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from lora_gateway.v1 import inference_pb2 as pb
from lora_gateway.v1.inference_pb2_grpc import InferenceStub
from tests.details import detail, error_info
from tests.e2e.gateway_process import GatewayProcess, gateway_process
from tests.e2e.shard_calls import core_of, until_up

TAKEOVER_S = 5.0


def long_request(tokens: int = 1500) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        text="A long story",
        adapter="beta",
        sampling=pb.SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=1),
    )


async def follow(gateway: GatewayProcess, seen: asyncio.Event, tokens: int) -> str:
    """One stream on a connection of its own: `finished`, or the code that ended it."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(gateway.address, options=options) as channel:
        kind = ""
        try:
            async for event in InferenceStub(channel).GenerateStream(long_request(tokens)):
                seen.set()
                kind = event.WhichOneof("event") or ""
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return kind


def busy_connections(pid: int) -> int:
    return sum(c.status == psutil.CONN_ESTABLISHED for c in psutil.Process(pid).net_connections())


async def test_worker_dies_and_the_standby_takes_over(gateway: GatewayProcess) -> None:
    """The other worker's streams go on; what the dead one left in the core is aborted."""
    async with asyncio.timeout(120):
        while not sum(gateway.metrics("gateway_workers", state="standby")):
            await asyncio.sleep(0.2)
    before = gateway.serving_workers()
    serving = gateway.log.count("is serving")
    streams = []
    for _ in range(12):  # the kernel spreads connections over the workers by their ports
        seen = asyncio.Event()
        streams.append(asyncio.create_task(follow(gateway, seen, 1500)))
        await seen.wait()
    victim = max(before, key=busy_connections)
    start_s = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    await asyncio.to_thread(
        gateway.wait_log, r"worker \d+ is serving", TAKEOVER_S, count=serving + 1
    )
    took_s = time.monotonic() - start_s
    assert took_s < TAKEOVER_S
    aborted = await asyncio.to_thread(
        gateway.wait_log, rf"aborted (\d+) requests of worker {victim}", 10
    )
    endings = await asyncio.gather(*streams)
    killed = endings.count("UNAVAILABLE")
    assert killed > 0, "the victim had streams"
    assert int(aborted.group(1)) == killed, "what it left running in the core was aborted"
    assert endings.count("finished") == len(streams) - killed, "the other's streams went on"
    assert len(gateway.serving_workers()) == len(before)
    options = [("grpc.use_local_subchannel_pool", 1)]
    for _ in range(6):  # connections reach the new worker too
        async with grpc.aio.insecure_channel(gateway.address, options=options) as channel:
            answer = await InferenceStub(channel).Generate(long_request(4), timeout=20)
            assert answer.usage.completion_tokens == 4
    async with asyncio.timeout(120):  # and the next standby starts
        while not sum(gateway.metrics("gateway_workers", state="standby")):
            await asyncio.sleep(0.2)


@pytest.mark.slow
async def test_the_only_core_dies_and_callers_are_told_to_come_back_until_it_is_replaced(
    adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    with gateway_process(tmp_path, workers=1, adapters=adapters) as gateway:
        async with grpc.aio.insecure_channel(gateway.address) as channel:
            stub = InferenceStub(channel)
            health: Any = HealthStub(channel)
            asked = health_pb2.HealthCheckRequest()
            assert (await health.Check(asked)).status == health_pb2.HealthCheckResponse.SERVING
            call = stub.GenerateStream(long_request())
            await call.read()
            core = core_of(gateway, "shard-0")
            tree = [core, *core.children(recursive=True)]
            core.kill()
            error = await ending(call)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert error_info(error).reason == "SHARD_UNAVAILABLE"
            assert int(error_info(error).metadata["tokens_emitted"]) > 0
            _, alive = await asyncio.to_thread(psutil.wait_procs, tree, 10)
            assert not alive, "no process of it is left"
            refusal = await ending(stub.GenerateStream(long_request()))
            assert refusal.code() is grpc.StatusCode.UNAVAILABLE
            assert error_info(refusal).reason == "SHARD_UNAVAILABLE"
            assert detail(refusal, error_details_pb2.RetryInfo).retry_delay.ToTimedelta()
            assert (await health.Check(asked)).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert gateway.metrics("gateway_shard_up", shard="shard-0") == [0.0]
            await until_up(gateway, "shard-0", 1, 120)
            answer = await stub.Generate(long_request(4), timeout=20)
            assert answer.usage.completion_tokens == 4
            assert (await health.Check(asked)).status == health_pb2.HealthCheckResponse.SERVING
        assert "shard-0 ended: killed by SIGKILL" in gateway.log
        assert "Traceback" not in gateway.log
        gateway.signal(signal.SIGTERM)
        assert await asyncio.to_thread(gateway.wait_exit, 60) == 0


async def ending(call: Any) -> grpc.aio.AioRpcError:
    """The error that a stream ends with."""
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("a stream without an engine must not end with OK")
