"""The real edge, over a fake shard, in this process: for what needs no model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import pytest_asyncio

from engine.fake import FakeShard, Script
from engine.generation import ServedVersion
from engine.pool import ServedAdapter, ServedView, ShardPool
from gateway.admission import Admission
from gateway.inference import Inference
from gateway.server import GatewayServer
from gateway.settings import Settings
from gateway.tracing import Tracing
from gateway.wrap import Edge
from lora_gateway.v1 import inference_pb2 as pb
from lora_gateway.v1.inference_pb2_grpc import InferenceStub

if TYPE_CHECKING:
    from lora_gateway.v1.inference_pb2_grpc import InferenceAsyncStub

MODEL = pb.Model(
    base_model="fake",
    vocab_size=1024,
    limits=pb.ModelLimits(max_model_len=512),
    defaults=pb.ModelDefaults(max_tokens=16, temperature=0.7),
)


@dataclass
class FakeGateway:
    """An edge on a port of its own, and what a test wants to look at."""

    shard: FakeShard
    admission: Admission
    server: GatewayServer
    channel: grpc.aio.Channel
    stub: InferenceAsyncStub
    address: str


async def start_fake_gateway(
    script: Script,
    *,
    limit: int = 100,
    unary_deadline_s: float = 30.0,
    stream_deadline_s: float = 300.0,
    settings: Settings | None = None,
    tracing: Tracing | None = None,
) -> FakeGateway:
    """An edge that serves the base model and adapter `alpha` version 3.

    The caller closes `tracing`.
    """
    settings = settings or Settings()
    shard = FakeShard(script=script)
    pool = ShardPool([shard])
    alpha = ServedVersion("default", "alpha", 3, 1, "/nowhere", "digest")
    pool.show(ServedView({"alpha": ServedAdapter(3, {3: alpha})}))
    admission = Admission(limit)
    edge = Edge(admission, tracing or Tracing(None), unary_deadline_s, stream_deadline_s)
    server = GatewayServer(edge, Inference(pool, admission, MODEL), settings)
    port = server.bind("127.0.0.1:0", settings)
    await server.start()
    await server.health.serving()
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    return FakeGateway(
        shard, admission, server, channel, InferenceStub(channel), f"127.0.0.1:{port}"
    )


@pytest_asyncio.fixture
async def fake() -> AsyncIterator[FakeGateway]:
    """A fake gateway that makes a token every 10 ms."""
    gateway = await start_fake_gateway(Script(token_interval_s=0.01))
    yield gateway
    await gateway.channel.close()
    await gateway.server.stop(0)
