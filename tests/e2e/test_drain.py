"""SIGTERM: health first, no new calls, running streams finish, exit 0, nothing is left."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2

from lora_gateway.v1 import inference_pb2 as pb
from lora_gateway.v1.inference_pb2_grpc import InferenceStub
from tests.details import error_info
from tests.e2e.gateway_process import GatewayProcess, gateway_process

STREAMS = 20
TOKENS = 400


async def stream(channel: grpc.aio.Channel, started: asyncio.Barrier) -> int:
    """Read one stream to its end; returns its tokens. Fails if it is cut short with OK."""
    request = pb.GenerateRequest(
        text="A long story",
        adapter="alpha",
        sampling=pb.SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=1),
        return_token_ids=True,
    )
    tokens = 0
    finished = None
    async for event in InferenceStub(channel).GenerateStream(request):
        match event.WhichOneof("event"):
            case "started":
                await started.wait()
            case "delta":
                tokens += len(event.delta.token_ids)
            case "finished":
                finished = event.finished
    assert finished is not None, "an OK without `finished` is a stream cut short"
    assert finished.usage.completion_tokens == tokens
    return tokens


async def health(channel: grpc.aio.Channel) -> int:
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    answer = await check(health_pb2.HealthCheckRequest())
    return int(answer.status)


async def drain_with_streams(gateway: GatewayProcess, *, group: bool) -> None:
    family = gateway.family()
    async with (
        grpc.aio.insecure_channel(gateway.address) as channel,
        grpc.aio.insecure_channel(
            gateway.address, options=[("grpc.use_local_subchannel_pool", 1)]
        ) as other,
    ):
        assert await health(other) == health_pb2.HealthCheckResponse.SERVING
        started = asyncio.Barrier(STREAMS + 1)
        streams = [asyncio.create_task(stream(channel, started)) for _ in range(STREAMS)]
        await started.wait()
        gateway.signal(signal.SIGTERM, group=group)
        await asyncio.to_thread(gateway.wait_log, "draining for at most", 10)
        async with asyncio.timeout(10):
            while await health(channel) != health_pb2.HealthCheckResponse.NOT_SERVING:
                await asyncio.sleep(0.02)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await InferenceStub(channel).Generate(pb.GenerateRequest(text="too late"))
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert error_info(refused.value).reason == "DRAINING"
        assert await asyncio.gather(*streams) == [TOKENS] * STREAMS
    assert await asyncio.to_thread(gateway.wait_exit, 40) == 0
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive, "no process is left"


@pytest.mark.parametrize(
    "group",
    [
        pytest.param(False, id="to the host", marks=pytest.mark.slow),
        pytest.param(True, id="to the process group"),
    ],
)
async def test_drain_finishes_running_streams_and_exits_0(
    group: bool, adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    with gateway_process(tmp_path, workers=1, adapters=adapters) as gateway:
        await drain_with_streams(gateway, group=group)
