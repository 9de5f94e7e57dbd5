"""The relay: calls of services that the host answers, passed through a worker as bytes.

    client -> worker (tracked, drained, counted) -> Unix socket -> host

A worker parses nothing of them. Statuses, details and messages come back as they are; deadline
and cancellation go through. The host learns who calls from metadata that only a worker can set.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import unquote

import grpc
from google.rpc import code_pb2, status_pb2
from grpc_status import rpc_status

from gateway.address import is_local_peer
from gateway.call import Call, Principal
from gateway.exceptions import ControlPlaneUnavailable, LoopbackOnly, Relayed
from gateway.server import LOOPBACK_SERVICES
from gateway.wrap import Context, Edge, Handler, open_call, write

ACTOR_KEY = "lora-gateway-actor"
TENANT_KEY = "lora-gateway-tenant"
"""Metadata by which a worker tells the host who calls. The socket is this user's alone."""
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),  # the host's own limits hold
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_retries", 0),  # the client decides about retries
    # Of answers that a caller does not read, 64 KiB are held here. gRPC learns that the socket is
    # fast, and held 6 MB of a watch that nobody read.
    ("grpc.http2.bdp_probe", 0),
    # The host may be restarting something; it is asked again soon.
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class Relay(grpc.GenericRpcHandler):
    """Handlers of whole services. Owned by the worker, which closes it."""

    def __init__(self, address: str, paths: frozenset[str], edge: Edge) -> None:
        """`address` is the host's, as gRPC names it; `paths` are `/service/method`. A path that
        a caller makes up is no method: each would be a name in the metrics."""
        self._paths = paths
        self._edge = edge
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        path = handler_call_details.method
        if path not in self._paths:
            return None

        async def relay(requests: AsyncIterator[bytes], context: Context) -> None:
            # The deadline of a call without one is the host's to decide.
            async with open_call(path.rpartition("/")[2], context, self._edge, None) as call:
                _refuse_strangers(path, context)
                await self._relay(path, call, requests, context)

        # On the wire a unary call is a stream of one message, so this serves all four kinds.
        return grpc.stream_stream_rpc_method_handler(relay)

    async def _relay(
        self, path: str, call: Call, requests: AsyncIterator[bytes], context: Context
    ) -> None:
        upstream: Any = self._channel.stream_stream(path)(
            timeout=context.time_remaining(), metadata=_metadata(call, context)
        )
        sending = asyncio.create_task(_send(requests, upstream))
        try:
            async for message in upstream:
                await write(call, context, message)
            status = await _status(upstream)
        except grpc.aio.AioRpcError:
            status = await _status(upstream)
        finally:
            sending.cancel()
            upstream.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        if status is not None:
            raise status

    async def close(self) -> None:
        """Close the connection to the host."""
        await self._channel.close()


def _refuse_strangers(path: str, context: Context) -> None:
    """Raise LoopbackOnly for a call from elsewhere to what is for this machine alone."""
    service = path.split("/")[1]
    if service in LOOPBACK_SERVICES and not is_local_peer(str(context.peer())):
        raise LoopbackOnly(service)


async def _send(requests: AsyncIterator[bytes], upstream: Any) -> None:
    # A call that has ended takes no more; how it ended is seen where its answers are read.
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        async for message in requests:
            await upstream.write(message)
        await upstream.done_writing()


async def _status(upstream: Any) -> Relayed | ControlPlaneUnavailable | None:
    code = await upstream.code()
    if code is grpc.StatusCode.OK:
        return None
    found = await rpc_status.aio.from_call(upstream)
    if found is not None:
        return Relayed(found)
    if code is grpc.StatusCode.UNAVAILABLE:
        return ControlPlaneUnavailable()
    number = code_pb2.Code.Value(code.name)
    return Relayed(status_pb2.Status(code=number, message=await upstream.details()))


def _metadata(call: Call, context: Context) -> list[tuple[str, str]]:
    return [
        (TENANT_KEY, call.principal.tenant),
        (ACTOR_KEY, _actor(context)),
        *(call.trace_headers or {}).items(),
    ]


def _actor(context: Context) -> str:
    """Who calls: by certificate if TLS is mutual, else by address."""
    for name in context.auth_context().get("x509_common_name", ()):
        # Metadata is printable ASCII, and a name may hold anything.
        return name.decode("latin-1").encode("unicode_escape").decode()
    return unquote(str(context.peer()))


def caller(context: Context) -> Principal:
    """Who calls the host, as the worker says that passes the call on."""
    metadata = dict(context.invocation_metadata() or ())
    return Principal(
        str(metadata.get(TENANT_KEY, Principal().tenant)), str(metadata.get(ACTOR_KEY, ""))
    )
