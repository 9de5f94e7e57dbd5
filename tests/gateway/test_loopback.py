"""The service Admin is for this machine alone, wherever the gateway listens."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import pytest_asyncio
from grpc_reflection.v1alpha import reflection_pb2

from engine.fake import Script
from gateway.address import is_local_peer
from gateway.server import ADMIN, SERVICES
from lora_gateway.v1 import admin_pb2, inference_pb2
from lora_gateway.v1.admin_pb2_grpc import AdminStub
from lora_gateway.v1.inference_pb2_grpc import InferenceStub
from tests.gateway.conftest import FakeGateway, start_fake_gateway
from tests.gateway.promises import refused
from tests.gateway.scripted_host import address_in


@pytest.mark.parametrize(
    "peer",
    [
        "ipv4:127.0.0.1:4711",
        "ipv4:127.9.9.9:4711",
        "ipv6:[::1]:4711",
        "ipv6:%5B::1%5D:4711",
        "ipv6:[::ffff:127.0.0.1]:4711",
        "unix:/run/gateway.sock",
        "unix:",
    ],
)
def test_callers_on_this_machine(peer: str) -> None:
    assert is_local_peer(peer)


@pytest.mark.parametrize(
    "peer",
    [
        "ipv4:192.0.2.7:4711",
        "ipv4:0.0.0.0:4711",
        "ipv6:[2001:db8::7]:4711",
        "ipv6:%5B2001:db8::7%5D:4711",
        "ipv6:[::ffff:192.0.2.7]:4711",
        "ipv4:localhost:4711",
        "vsock:2:4711",
        "",
    ],
)
def test_callers_from_elsewhere_and_who_cannot_be_told(peer: str) -> None:
    assert not is_local_peer(peer)


def own_address() -> str | None:
    """An address of this machine that is no loopback, by which it calls itself."""
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family is socket.AF_INET and not address.address.startswith("127."):
                return address.address
    return None


@pytest_asyncio.fixture
async def outside(tmp_path: Path) -> AsyncIterator[FakeGateway]:
    """A gateway without a host behind it, called by an address that others could call too."""
    address = own_address()
    if address is None:
        pytest.skip("this machine has no address but loopback")
    gateway = await start_fake_gateway(Script(), host=address_in(tmp_path), listen=f"{address}:0")
    yield gateway
    await gateway.close()


async def test_a_caller_from_elsewhere_is_refused_and_is_told_why(outside: FakeGateway) -> None:
    stub: Any = AdminStub(outside.channel)
    for call in (
        stub.ListShards(admin_pb2.ListShardsRequest()),
        stub.DrainShard(admin_pb2.DrainShardRequest(shard="shard-0")),
        stub.ResumeShard(admin_pb2.ResumeShardRequest(shard="shard-0")),
        stub.ExplainRoute(admin_pb2.ExplainRouteRequest()),
    ):
        refusal = await refused(call)
        assert (refusal.reason, refusal.metadata) == ("LOOPBACK_ONLY", {"service": ADMIN})
    await InferenceStub(outside.channel).GetModel(inference_pb2.GetModelRequest())


async def test_a_caller_on_this_machine_comes_through(tmp_path: Path) -> None:
    gateway = await start_fake_gateway(Script(), host=address_in(tmp_path))
    stub: Any = AdminStub(gateway.channel)
    refusal = await refused(stub.ListShards(admin_pb2.ListShardsRequest()))
    assert refusal.reason == "CONTROL_PLANE_UNAVAILABLE", "nobody is behind it"
    await gateway.close()


async def listed(channel: grpc.aio.Channel) -> set[str]:
    call: Any = channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    answer = await call.read()
    return {service.name for service in answer.list_services_response.service}


async def test_reflection_lists_it_to_those_who_may_call_it(
    fake: FakeGateway, outside: FakeGateway
) -> None:
    assert {*SERVICES} <= await listed(fake.channel)
    assert await listed(fake.channel) - await listed(outside.channel) == {ADMIN}
