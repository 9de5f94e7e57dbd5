"""The asyncio client of the gateway's `Admin` service."""

from __future__ import annotations

import grpc.aio

from lora_gateway._calls import Calls, Metadata
from lora_gateway.v1.admin_pb2 import (
    DrainShardRequest,
    DrainShardResponse,
    ExplainRouteRequest,
    ExplainRouteResponse,
    LiftQuarantineRequest,
    ListQuarantineRequest,
    ListQuarantineResponse,
    ListShardsRequest,
    ResumeShardRequest,
    Shard,
    VersionName,
)
from lora_gateway.v1.admin_pb2_grpc import AdminStub


class AdminClient:
    """Shards, for whoever runs the gateway, on its own machine. `GatewayClient.admin`.

        await client.admin.drain_shard("shard-1", wait=True)
        ...  # whatever is to be done on its GPU
        await client.admin.resume_shard("shard-1")

    Answers are the messages of `admin.proto`, which tells what each field means. Every method
    takes `timeout_s` for the whole call and `metadata` for this call, and raises a GatewayError
    if the call failed: PermissionDenied from another machine.
    """

    def __init__(self, channel: grpc.aio.Channel, calls: Calls) -> None:
        """`GatewayClient` makes one; it is the owner of the channel."""
        self._stub = AdminStub(channel)
        self._calls = calls

    async def list_shards(
        self, *, timeout_s: float | None = None, metadata: Metadata | None = None
    ) -> list[Shard]:
        """How each shard is, what it does and what it has loaded."""
        response = await self._calls.unary(
            self._stub.ListShards, ListShardsRequest(), timeout_s, metadata
        )
        return list(response.shards)

    async def drain_shard(
        self,
        shard: str,
        *,
        wait: bool = False,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> DrainShardResponse:
        """Take a shard out of the route, once what it serves is loaded elsewhere.

        Args:
            wait: until nothing runs there any more. Without, until the route has moved.

        Raises:
            FailedPrecondition: no other shard takes requests.
            NotFound: there is no such shard.
        """
        request = DrainShardRequest(shard=shard, wait=wait)
        return await self._calls.unary(
            self._stub.DrainShard, request, timeout_s, metadata, waits=True
        )

    async def resume_shard(
        self,
        shard: str,
        *,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> Shard:
        """Put a shard back into the route, once what lives there is loaded.

        Raises:
            NotFound: there is no such shard.
        """
        request = ResumeShardRequest(shard=shard)
        response = await self._calls.unary(
            self._stub.ResumeShard, request, timeout_s, metadata, waits=True
        )
        return response.shard

    async def explain_route(
        self,
        adapter: str = "",
        *,
        version: int | None = None,
        session_id: str = "",
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> ExplainRouteResponse:
        """Which version and which shard a request would get now, and by what.

        Args:
            adapter: its name. Empty: the base model.
            version: of the adapter. None: by the traffic split.
            session_id: that the split goes by.

        Raises:
            NotFound: there is no such adapter or version.
        """
        request = ExplainRouteRequest(adapter=adapter, version=version, session_id=session_id)
        return await self._calls.unary(self._stub.ExplainRoute, request, timeout_s, metadata)

    async def list_quarantine(
        self, *, timeout_s: float | None = None, metadata: Metadata | None = None
    ) -> ListQuarantineResponse:
        """Which requests and versions are refused, because engines crashed twice on them."""
        return await self._calls.unary(
            self._stub.ListQuarantine, ListQuarantineRequest(), timeout_s, metadata
        )

    async def lift_quarantine(
        self,
        subject: str | VersionName,
        *,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> bool:
        """Release one of them at once. False if it was not in quarantine.

        Args:
            subject: the fingerprint of a request, or a version.
        """
        request = (
            LiftQuarantineRequest(fingerprint=subject)
            if isinstance(subject, str)
            else LiftQuarantineRequest(version=subject)
        )
        response = await self._calls.unary(self._stub.LiftQuarantine, request, timeout_s, metadata)
        return response.lifted
