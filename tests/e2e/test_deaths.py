"""What dies, and who goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import grpc
import psutil

from lora_gateway.v1 import inference_pb2 as pb
from lora_gateway.v1.inference_pb2_grpc import InferenceStub
from tests.details import error_info
from tests.e2e.gateway_process import GatewayProcess, gateway_process

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


async def test_a_core_that_dies_ends_the_gateway_with_a_clear_line(
    adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    with gateway_process(tmp_path, workers=1, adapters=adapters) as gateway:
        family = gateway.family()
        async with grpc.aio.insecure_channel(gateway.address) as channel:
            call = InferenceStub(channel).GenerateStream(long_request())
            await call.read()
            core = next(
                p
                for p in family
                if "EngineCore" in " ".join(p.cmdline()) or "EngineCore" in p.name()
            )
            core.kill()
            try:
                while await call.read() is not grpc.aio.EOF:
                    pass
                raise AssertionError("a stream of a dead engine must not end with OK")
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.UNAVAILABLE
                assert error_info(error).reason == "SHARD_UNAVAILABLE"
                assert int(error_info(error).metadata["tokens_emitted"]) > 0
        assert await asyncio.to_thread(gateway.wait_exit, 40) != 0
        assert "gateway serve: shard-0 ended: killed by SIGKILL" in gateway.log
        assert "Traceback" not in gateway.log
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive, "no process is left"


async def test_nothing_is_left_when_the_host_is_killed(
    adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    with gateway_process(tmp_path, workers=1, adapters=adapters) as gateway:
        family = gateway.family()
        gateway.process.kill()
        _, alive = await asyncio.to_thread(psutil.wait_procs, family, 10)
        assert not alive
