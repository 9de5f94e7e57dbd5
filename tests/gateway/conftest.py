"""The real edge, over a fake shard, in this process: for what needs no model."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import pytest
import pytest_asyncio

from engine.fake import FakeShard, Script
from engine.generation import ServedVersion, VersionKey
from engine.pool import ServedAdapter, ServedView, ShardPool
from engine.residents import Residents
from engine.ring import AdapterKey
from engine.split import Split
from gateway import metrics
from gateway.adapter_labels import AdapterLabels
from gateway.admission import Admission
from gateway.call import Call
from gateway.inference import Inference
from gateway.relay import Relay
from gateway.server import HOST_PATHS, GatewayServer
from gateway.settings import Settings
from gateway.tracing import Tracing
from gateway.wrap import Edge
from lora_gateway.v1 import inference_pb2 as pb
from lora_gateway.v1.inference_pb2_grpc import InferenceStub
from store.records import Arm
from tests.engine.open_slots import open_slots

if TYPE_CHECKING:
    from lora_gateway.v1.inference_pb2_grpc import InferenceAsyncStub

MODEL = pb.Model(
    base_model="fake",
    vocab_size=1024,
    limits=pb.ModelLimits(max_model_len=512),
    defaults=pb.ModelDefaults(max_tokens=16, temperature=0.7),
)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """Commands that tests start can be interrupted, though a shell has started the tests in the
    background: that ignores SIGINT, and so would they."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


ALPHA = ServedVersion("default", "alpha", 3, 1, "/nowhere", "digest")
"""The version that a fake gateway serves, and has loaded."""


@dataclass
class FakeGateway:
    """An edge on a port of its own, and what a test wants to look at."""

    shard: FakeShard
    residents: Residents
    view: ServedView
    wanted: list[VersionKey]
    """What the host was asked to load."""
    admission: Admission
    server: GatewayServer
    relay: Relay | None
    channel: grpc.aio.Channel
    stub: InferenceAsyncStub
    address: str

    async def close(self) -> None:
        """End everything, without a grace."""
        await self.channel.close()
        await self.server.stop(0)
        if self.relay is not None:
            await self.relay.close()
        await self.residents.close()


async def start_fake_gateway(
    script: Script,
    *,
    limit: int = 100,
    unary_deadline_s: float = 30.0,
    stream_deadline_s: float = 300.0,
    settings: Settings | None = None,
    tracing: Tracing | None = None,
    host: str | None = None,
    listen: str = "127.0.0.1:0",
    ended: Callable[[Call, str, float], None] = metrics.record,
) -> FakeGateway:
    """An edge that serves the base model and adapter `alpha` version 3.

    With `host`, an address as gRPC names it, it relays what the host answers. The caller closes
    `tracing`.
    """
    settings = settings or Settings()
    shard = FakeShard(script=script)
    view = ServedView()
    view.show(ALPHA.tenant, ALPHA.adapter, ServedAdapter(Split([Arm(3, 1)]), (3,)))
    wanted: list[VersionKey] = []
    residents = Residents(wanted.append, _nothing_in_core, open_slots())
    residents.loaded(ALPHA)
    pool = ShardPool([shard], {shard.name: residents}, view)
    admission = Admission(limit)
    labels = AdapterLabels(frozenset({AdapterKey(ALPHA.tenant, ALPHA.adapter)}))
    edge = Edge(
        *(admission, tracing or Tracing(None), unary_deadline_s, stream_deadline_s, ended),
        running=metrics.inflight.track_inprogress,
    )
    relay = None if host is None else Relay(host, HOST_PATHS, edge)
    server = GatewayServer(edge, Inference(pool, admission, MODEL, labels), settings, relay)
    port = server.bind(listen, settings)
    await server.start()
    await server.health.serving()
    address = f"{listen.rpartition(':')[0]}:{port}"
    channel = grpc.aio.insecure_channel(address)
    stub = InferenceStub(channel)
    return FakeGateway(
        *(shard, residents, view, wanted, admission, server, relay, channel, stub, address)
    )


async def _nothing_in_core(lora_int_id: int) -> int:
    return 0


@pytest_asyncio.fixture
async def fake() -> AsyncIterator[FakeGateway]:
    """A fake gateway that makes a token every 10 ms."""
    gateway = await start_fake_gateway(Script(token_interval_s=0.01))
    yield gateway
    await gateway.close()
