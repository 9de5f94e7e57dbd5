"""Cancellation reaches the engine, wherever the handler is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from lora_gateway.v1 import inference_pb2 as pb
from lora_gateway.v1.inference_pb2_grpc import InferenceStub
from tests.e2e.gateway_process import GatewayProcess

RUNNING = "vllm:num_requests_running"
"""The engine core's own scheduler statistics, sent with each step."""


def endless(logprobs: int | None = None, n: int = 1) -> pb.GenerateRequest:
    """A request that runs until the context is full."""
    return pb.GenerateRequest(
        text="Tell me everything",
        adapter="alpha",
        sampling=pb.SamplingParams(
            max_tokens=1990, temperature=1, ignore_eos=True, logprobs=logprobs, n=n
        ),
    )


async def running(gateway: GatewayProcess) -> float:
    (value,) = await asyncio.to_thread(gateway.metrics, RUNNING, shard="shard-0")
    return value


async def until_running(gateway: GatewayProcess, count: int) -> None:
    async with asyncio.timeout(20):
        while await running(gateway) != count:
            await asyncio.sleep(0.05)


@pytest.fixture
async def witness(gateway: GatewayProcess) -> AsyncIterator[None]:
    """A stream that runs all the time, so that the core sends its statistics at each step."""

    async def run() -> None:
        async with grpc.aio.insecure_channel(gateway.address) as channel:
            while True:
                async for _ in InferenceStub(channel).GenerateStream(endless()):
                    pass

    task = asyncio.create_task(run())
    await until_running(gateway, 1)
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await until_running(gateway, 0)


async def test_client_cancel_mid_stream_frees_the_engine_in_200_ms(
    gateway: GatewayProcess, channel: grpc.aio.Channel, witness: object
) -> None:
    call = InferenceStub(channel).GenerateStream(endless())
    for _ in range(3):
        await call.read()
    await until_running(gateway, 2)
    call.cancel()
    await asyncio.sleep(0.2)
    assert await running(gateway) <= 1, "only the witness runs"


async def test_client_cancel_while_the_handler_is_blocked_in_a_write(
    gateway: GatewayProcess, witness: object
) -> None:
    """With log probabilities on and nobody reading, the flow-control window fills up and the
    handler waits in `context.write`; the worker's own gauge says that it does."""
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
    async with grpc.aio.insecure_channel(gateway.address, options=options) as channel:
        calls = [InferenceStub(channel).GenerateStream(endless(logprobs=20, n=8)) for _ in range(2)]
        for call in calls:
            await call.read()
        async with asyncio.timeout(30):
            while sum(gateway.metrics("gateway_stalled_streams")) < 1:
                await asyncio.sleep(0.1)
        assert await running(gateway) > 1, "the engine still runs what nobody reads"
        for call in calls:
            call.cancel()
        await asyncio.sleep(0.2)
        assert await running(gateway) <= 1, "only the witness runs"


async def test_a_deadline_aborts_the_engine_request(
    gateway: GatewayProcess, channel: grpc.aio.Channel, witness: object
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await InferenceStub(channel).Generate(endless(), timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.sleep(0.2)
    assert await running(gateway) <= 1


async def test_a_lost_client_aborts_the_engine_request(
    gateway: GatewayProcess, witness: object
) -> None:
    channel = grpc.aio.insecure_channel(gateway.address)
    call = InferenceStub(channel).GenerateStream(endless())
    await call.read()
    await until_running(gateway, 2)
    await channel.close(grace=None)
    await asyncio.sleep(0.2)
    assert await running(gateway) <= 1
