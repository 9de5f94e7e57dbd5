"""Calls of Admin to a control plane of three fake shards, and what a test looks at."""

from __future__ import annotations

from typing import Any

from engine.generation import VersionKey
from engine.residents import Resident
from engine.ring import AdapterKey, Ring, ShardState
from gateway.drains import Drains
from lora_gateway.v1 import admin_pb2
from lora_gateway.v1.admin_pb2_grpc import AdminStub
from tests.gateway.control_plane import TENANT, TIMEOUT_S, Plane

NAMES = ("shard-0", "shard-1", "shard-2")
RING = Ring(dict.fromkeys(NAMES, ShardState.UP))


def order(adapter: str) -> tuple[str, ...]:
    return RING.ranked(AdapterKey(TENANT, adapter))


def living_on(shard: str, count: int = 1) -> list[str]:
    """Adapters whose home is this shard."""
    names = (f"a{number}" for number in range(100))
    return [name for name in names if order(name)[0] == shard][:count]


def key_of(adapter: str, version: int = 1) -> VersionKey:
    return VersionKey(TENANT, adapter, version)


def drains_of(plane: Plane) -> Drains:
    renewal = plane.control._renewal
    assert renewal is not None
    return renewal._drains


def stub_of(plane: Plane) -> Any:
    return AdminStub(plane.gateway.channel)


async def drain(plane: Plane, shard: str, **fields: Any) -> admin_pb2.DrainShardResponse:
    request = admin_pb2.DrainShardRequest(shard=shard, **fields)
    answer: admin_pb2.DrainShardResponse
    answer = await stub_of(plane).DrainShard(request, timeout=TIMEOUT_S)
    return answer


async def resume(plane: Plane, shard: str) -> admin_pb2.Shard:
    request = admin_pb2.ResumeShardRequest(shard=shard)
    answer = await stub_of(plane).ResumeShard(request, timeout=TIMEOUT_S)
    told: admin_pb2.Shard = answer.shard
    return told


async def shards(plane: Plane) -> dict[str, admin_pb2.Shard]:
    answer = await stub_of(plane).ListShards(admin_pb2.ListShardsRequest(), timeout=TIMEOUT_S)
    return {shard.shard: shard for shard in answer.shards}


async def hold(plane: Plane, shard: str, key: VersionKey) -> Resident:
    """A request of the host's own on a version."""
    assert plane.control._shards is not None
    return await plane.control._shards._residents[shard].hold(key)


def states(plane: Plane) -> dict[str, ShardState]:
    """Of the host's ring."""
    assert plane.control._shards is not None
    return dict(plane.control._shards.pool.ring.states)


def no_slot() -> Any:
    raise AssertionError("there is no worker")
