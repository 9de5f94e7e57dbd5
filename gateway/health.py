"""`grpc.health.v1` whose watchers end when the server drains."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio

SERVING = health_pb2.HealthCheckResponse.SERVING
NOTIFY_TIMEOUT_S = 1.0
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health(health_aio.HealthServicer):
    """Overall and per-service health: NOT_SERVING until told otherwise.

    The stock `Watch` never returns, and `server.stop(grace)` waits for every RPC: one
    watcher would use up the whole grace. This one ends after it has told NOT_SERVING.
    """

    def __init__(self, services: Sequence[str]) -> None:
        super().__init__()
        self._services = ("", *services)
        self._server_status: dict[str, Any] = dict.fromkeys(self._services, NOT_SERVING)
        self._draining = asyncio.Event()

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        whole: Any = _WholeWrites(context)
        watching = asyncio.ensure_future(super().Watch(request, whole))
        draining = asyncio.ensure_future(self._draining.wait())
        try:
            await asyncio.wait({watching, draining}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (watching, draining):
                task.cancel()
            await asyncio.gather(watching, draining, return_exceptions=True)
        await whole.ended()
        await context.write(health_pb2.HealthCheckResponse(status=NOT_SERVING))

    async def serving(self, serving: bool = True) -> None:
        """Announce whether calls are answered now. Does nothing once the server drains."""
        status = SERVING if serving else NOT_SERVING
        for service in self._services:
            if self._draining.is_set():
                return
            self._server_status[service] = status
            # A watcher that does not read holds its service's lock; it must not hold us.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.set(service, status), NOTIFY_TIMEOUT_S)

    def drain(self) -> None:
        """Announce NOT_SERVING for good, and end the watchers, each of which is told."""
        self._gracefully_shutting_down = True
        self._server_status.update(dict.fromkeys(self._services, NOT_SERVING))
        self._draining.set()


class _WholeWrites:
    """Writes that end though their writer is cancelled: after one that was cut off in the middle,
    the next one never returned."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._context = context
        self._writing: asyncio.Future[None] | None = None

    async def write(self, message: health_pb2.HealthCheckResponse) -> None:
        self._writing = asyncio.ensure_future(self._context.write(message))
        await asyncio.shield(self._writing)

    async def ended(self) -> None:
        """Wait until the last one has ended. Raises what it did."""
        if self._writing is not None:
            await self._writing
