"""An honest fake of the Admin service: two shards in memory, drained and resumed as asked.

It speaks real gRPC from a real server; only engines and workers behind it are missing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import status_pb2

from lora_gateway.v1 import admin_pb2 as pb
from lora_gateway.v1.adapters_pb2 import TrafficSplit
from lora_gateway.v1.admin_pb2_grpc import AdminServicer, add_AdminServicer_to_server
from tests.client.fake_adapters import Context, fail, refusal

SHARD_NOT_FOUND = refusal(
    grpc.StatusCode.NOT_FOUND, "SHARD_NOT_FOUND", "there is no such shard", shard="shard-7"
)
LAST_OPEN_SHARD = refusal(
    grpc.StatusCode.FAILED_PRECONDITION, "LAST_OPEN_SHARD", "no shard but this", shard="shard-1"
)
LOOPBACK_ONLY = refusal(
    grpc.StatusCode.PERMISSION_DENIED, "LOOPBACK_ONLY", "call it there", service="Admin"
)


class FakeAdmin(AdminServicer):
    """Two shards; every drain moves `moved`."""

    def __init__(self) -> None:
        self.refusals: deque[status_pb2.Status] = deque()
        """Each next call takes one, and fails with it."""
        self.asked: list[object] = []
        """All requests, in order."""
        self.moved = [
            pb.MovedVersion(adapter="sql", version=3, shard="shard-0", duration_ms=12.4),
            pb.MovedVersion(
                adapter="[red]faq", version=1, shard="shard-0", error="the\x1b[1m disk"
            ),
        ]
        self.shards = {
            "shard-0": pb.Shard(
                shard="shard-0",
                state=pb.SHARD_STATE_UP,
                state_time=Timestamp(seconds=0),
                in_flight=5,
                load=pb.ShardLoad(running=3, waiting=2, kv_cache_usage=0.25),
                client_slots_left=61,
                places=64,
                residents=[pb.ResidentVersion(adapter="sql", version=3)],
            ),
            "shard-1": pb.Shard(
                shard="shard-1",
                state=pb.SHARD_STATE_DEAD,
                next_start_time=Timestamp(seconds=60),
                last_death=pb.ShardDeath(
                    reason="killed by\nSIGKILL", time=Timestamp(seconds=1_700_000_000)
                ),
                restarts=2,
                places=64,
            ),
        }
        self.quarantine = pb.ListQuarantineResponse(
            requests=[pb.QuarantinedRequest(fingerprint="fedcba9876543210")], suspect_count=3
        )
        self.route = pb.ExplainRouteResponse(
            version=3,
            version_reason=pb.VERSION_REASON_SPLIT,
            splits=[TrafficSplit(version=2, weight=90), TrafficSplit(version=3, weight=10)],
            shards=[
                pb.RouteShard(shard="shard-1", state=pb.SHARD_STATE_DEAD, drained=True),
                pb.RouteShard(
                    shard="shard-0",
                    state=pb.SHARD_STATE_UP,
                    resident=True,
                    adapters_in_use=4,
                    slot_free=True,
                    places_left=7,
                ),
            ],
            workers=[
                pb.WorkerRoute(
                    worker=4711,
                    version=3,
                    shard="shard-0",
                    reason=pb.ROUTE_REASON_FAILOVER,
                    candidates=[pb.RouteCandidate(shard="shard-0", in_flight=2)],
                    replicas=1,
                    cap=4,
                    plan_revision=9,
                )
            ],
            shard="shard-0",
        )

    async def ListShards(
        self, request: pb.ListShardsRequest, context: Context
    ) -> pb.ListShardsResponse:
        await self._begin(request, context)
        return pb.ListShardsResponse(shards=self.shards.values())

    async def DrainShard(
        self, request: pb.DrainShardRequest, context: Context
    ) -> pb.DrainShardResponse:
        await self._begin(request, context)
        shard = self.shards[request.shard]
        shard.drain.phase = pb.DRAIN_PHASE_DRAINED
        return pb.DrainShardResponse(shard=shard, moved=self.moved)

    async def ResumeShard(
        self, request: pb.ResumeShardRequest, context: Context
    ) -> pb.ResumeShardResponse:
        await self._begin(request, context)
        shard = self.shards[request.shard]
        shard.ClearField("drain")
        return pb.ResumeShardResponse(shard=shard)

    async def ExplainRoute(
        self, request: pb.ExplainRouteRequest, context: Context
    ) -> pb.ExplainRouteResponse:
        await self._begin(request, context)
        return self.route

    async def ListQuarantine(
        self, request: pb.ListQuarantineRequest, context: Context
    ) -> pb.ListQuarantineResponse:
        await self._begin(request, context)
        return self.quarantine

    async def LiftQuarantine(
        self, request: pb.LiftQuarantineRequest, context: Context
    ) -> pb.LiftQuarantineResponse:
        await self._begin(request, context)
        named = request.version
        lifted = request.fingerprint in {held.fingerprint for held in self.quarantine.requests} or (
            (named.tenant or "default", named.adapter, named.version)
            in {(held.tenant, held.adapter, held.version) for held in self.quarantine.versions}
        )
        return pb.LiftQuarantineResponse(lifted=lifted)

    async def _begin(self, request: object, context: Context) -> None:
        self.asked.append(request)
        if self.refusals:
            await fail(context, self.refusals.popleft())


@asynccontextmanager
async def served_admin(admin: FakeAdmin) -> AsyncIterator[str]:
    """Serve on a free port of the loopback; gives the target."""
    server = grpc.aio.server()
    add_AdminServicer_to_server(admin, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=None)
