"""A host that answers as a test has written, over a real socket, with a worker before it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from engine.fake import Script
from gateway.server import OPTIONS
from lora_gateway.v1 import adapters_pb2 as pb
from lora_gateway.v1.adapters_pb2_grpc import (
    AdaptersServicer,
    AdaptersStub,
    add_AdaptersServicer_to_server,
)
from tests.gateway.conftest import FakeGateway, start_fake_gateway


class ScriptedHost(AdaptersServicer):
    """Answers as a test says, and notes what came."""

    def __init__(self) -> None:
        self.metadata: dict[str, str | bytes] = {}
        self.remaining_s: float | None = None
        self.entered = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.fails: Callable[[Any], Awaitable[None]] | None = None
        """Called with the context, instead of an answer."""
        self.fails_late: Callable[[Any], Awaitable[None]] | None = None
        """The same after the messages of a stream."""

    async def GetAdapter(
        self, request: pb.GetAdapterRequest, context: Any
    ) -> pb.GetAdapterResponse:
        await self._begin(context)
        return pb.GetAdapterResponse(adapter=pb.Adapter(adapter=request.adapter, etag="t7"))

    async def GetAdapterVersion(
        self, request: pb.GetAdapterVersionRequest, context: Any
    ) -> pb.GetAdapterVersionResponse:
        await self._begin(context)
        await self._for_ever()
        raise AssertionError

    async def UploadAdapterVersion(
        self, request_iterator: AsyncIterator[pb.UploadAdapterVersionRequest], context: Any
    ) -> pb.UploadAdapterVersionResponse:
        if self.fails is not None:  # hears it out first, as the host does (gateway/wrap.py)
            async for _ in request_iterator:
                pass
        await self._begin(context)
        digest, size_bytes = hashlib.sha256(), 0
        async for request in request_iterator:
            digest.update(request.chunk.data)
            size_bytes += len(request.chunk.data)
        version = pb.AdapterVersion(weights_sha256=digest.hexdigest(), size_bytes=size_bytes)
        return pb.UploadAdapterVersionResponse(adapter_version=version)

    async def WatchAdapters(
        self, request: pb.WatchAdaptersRequest, context: Any
    ) -> AsyncIterator[pb.WatchAdaptersResponse]:
        await self._begin(context)
        for sequence in range(request.after_sequence + 1, 4):
            yield pb.WatchAdaptersResponse(heartbeat=pb.WatchHeartbeat(sequence=sequence))
        if self.fails_late is not None:
            await self.fails_late(context)
        if request.adapter == "followed":
            await self._for_ever()

    async def _begin(self, context: Any) -> None:
        self.metadata = dict(context.invocation_metadata())
        self.remaining_s = context.time_remaining()
        self.entered.set()
        if self.fails is not None:
            await self.fails(context)

    async def _for_ever(self) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


class Relayed:
    """A worker with a host behind it."""

    def __init__(self, gateway: FakeGateway, host: ScriptedHost, server: grpc.aio.Server) -> None:
        self.gateway = gateway
        self.host = host
        self.server = server
        self.stub: Any = AdaptersStub(gateway.channel)

    def watch(self, adapter: str = "followed") -> Any:
        """A watch with three heartbeats, which then goes on if it is `followed`."""
        return self.stub.WatchAdapters(pb.WatchAdaptersRequest(after_sequence=0, adapter=adapter))


@contextlib.asynccontextmanager
async def serving_host(folder: Path) -> AsyncIterator[tuple[ScriptedHost, grpc.aio.Server]]:
    """A host alone."""
    host = ScriptedHost()  # type: ignore[abstract]  # the other methods are not called
    server = grpc.aio.server(options=list(OPTIONS))
    add_AdaptersServicer_to_server(host, server)
    server.add_insecure_port(address_in(folder))
    await server.start()
    try:
        yield host, server
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def relaying(folder: Path, **options: Any) -> AsyncIterator[Relayed]:
    """A host, and a fake gateway with these options before it."""
    async with serving_host(folder) as (host, server):
        gateway = await start_fake_gateway(Script(), host=address_in(folder), **options)
        try:
            yield Relayed(gateway, host, server)
        finally:
            await gateway.close()


def address_in(folder: Path) -> str:
    """Of the host's socket, as gRPC names it."""
    return f"unix:{folder}/host.sock"
