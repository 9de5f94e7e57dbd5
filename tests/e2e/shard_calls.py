"""Calls to a gateway of several shards, on connections of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import grpc

from engine.ring import AdapterKey, Ring, ShardState
from lora_gateway.v1 import inference_pb2 as pb
from lora_gateway.v1.inference_pb2_grpc import InferenceStub

NAMES = ("shard-0", "shard-1")
OPTIONS = [("grpc.use_local_subchannel_pool", 1)]
"""A connection for each channel: the kernel spreads them over the workers."""


def homes(adapters: Iterable[str]) -> dict[str, str]:
    """The shard that the ring names for each adapter while both are up."""
    ring = Ring(dict.fromkeys(NAMES, ShardState.UP))
    return {name: ring.ranked(AdapterKey("default", name))[0] for name in adapters}


async def ask(
    address: str, adapter: str = "", *, max_tokens: int = 8, timeout_s: float = 60.0
) -> pb.GenerateResponse:
    """One greedy answer."""
    request = pb.GenerateRequest(
        text="Once upon a time",
        adapter=adapter,
        sampling=pb.SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True),
    )
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        return await InferenceStub(channel).Generate(request, timeout=timeout_s)


async def ask_often(address: str, adapter: str, count: int) -> list[pb.GenerateResponse]:
    """Answers to `count` calls at once."""
    return await asyncio.gather(*(ask(address, adapter) for _ in range(count)))
