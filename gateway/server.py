"""The gRPC server of one worker: options, TLS, services, reflection."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection, reflection_pb2
from grpc_reflection.v1alpha.reflection import aio as reflection_aio
from grpc_reflection.v1alpha.reflection_pb2_grpc import add_ServerReflectionServicer_to_server

from gateway.address import is_local_peer
from gateway.admission import MAX_WATCHES
from gateway.health import Health
from gateway.settings import Settings
from gateway.wrap import Edge, EdgeInterceptor
from lora_gateway.v1 import adapters_pb2, admin_pb2, inference_pb2, training_pb2
from lora_gateway.v1.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server

MAX_MESSAGE_BYTES = 8 * 1024 * 1024
"""Largest request. Parsing runs on the event loop, so this bounds how long one
caller can hold it; datasets and adapters are streamed."""
INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
ADAPTERS = adapters_pb2.DESCRIPTOR.services_by_name["Adapters"].full_name
TRAINING = training_pb2.DESCRIPTOR.services_by_name["Training"].full_name
ADMIN = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name
SERVICES = (INFERENCE, ADAPTERS, TRAINING, ADMIN)
"""Full names of the services on the public address."""
HOST_SERVICES = (ADAPTERS, TRAINING, ADMIN)
"""Those that the host answers, and workers pass on."""
LOOPBACK_SERVICES = (ADMIN,)
"""Those of them that are for callers on this machine alone, and that others are not shown."""
HOST_PATHS = frozenset(
    f"/{service.full_name}/{method.name}"
    for file in (adapters_pb2, training_pb2, admin_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
)
"""Paths of their methods."""
ENDLESS_METHODS = frozenset({"WatchAdapters", "WatchJob", "GetJobLogs"})
"""Their calls end when the server drains: to wait for them would use up every grace."""
_REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"

OPTIONS: tuple[tuple[str, int], ...] = (
    # Unknown keys are ignored in silence; tests/gateway/test_server.py looks each one up in
    # the installed binary.
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Log probabilities are the only large answer; MAX_UNARY_LOGPROBS bounds them below this.
    ("grpc.max_send_message_length", 4 * MAX_MESSAGE_BYTES),
    # Long metadata is memory per call before any check of ours.
    ("grpc.max_metadata_size", 16 * 1024),
    # Notice clients that vanished without a FIN, and free their KV cache.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Clients ping while a long prompt is prefilled in silence; the default of one ping per
    # 300 s answers the third with GOAWAY too_many_pings (vllm#55102).
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # One connection cannot hold more than this many calls; a client opens another.
    ("grpc.max_concurrent_streams", 1024),
    # Calls that have come and that Python has not taken yet. All watchers come back at once when
    # a gateway restarts: of 2,000, gRPC's own bound of 1000 ended 190 with a bare CANCELLED, which
    # no client tries again.
    ("grpc.server.max_pending_requests", 2 * MAX_WATCHES),
    ("grpc.server.max_pending_requests_hard_limit", 4 * MAX_WATCHES),
    # A connection that sends nothing must not hold a socket for ever.
    ("grpc.server_handshake_timeout_ms", 10_000),
    # The workers share the public port. The host holds it bound, and has probed that nobody
    # else listens there, because the kernel would share it with them in silence.
    ("grpc.so_reuseport", 1),
)
HOST_OPTIONS: tuple[tuple[str, int], ...] = tuple(
    {
        **dict(OPTIONS),
        # A worker has one connection to the host, for all of its callers. With no more than 1024
        # calls on it, the 1025th watch and every call after it waited without an answer.
        "grpc.max_concurrent_streams": MAX_WATCHES + 1024,
    }.items()
)
"""Of the server that the host answers workers on."""


class GatewayServer:
    """A grpc.aio server with everything on it. Owned by the worker."""

    def __init__(
        self,
        edge: Edge,
        inference: InferenceServicer,
        settings: Settings,
        relay: grpc.GenericRpcHandler | None = None,
    ) -> None:
        """`relay` handles what the host answers; without it those services are not there."""
        self.health = Health(SERVICES)
        self._server = grpc.aio.server(
            interceptors=[EdgeInterceptor(edge, (INFERENCE,))], options=list(OPTIONS)
        )
        add_InferenceServicer_to_server(inference, self._server)
        if relay is not None:
            self._server.add_generic_rpc_handlers((relay,))
        add_HealthServicer_to_server(self.health, self._server)
        if settings.reflection_on:
            _add_reflection(self._server)

    def bind(self, address: str, settings: Settings) -> int:
        """Bind the public address; returns the port. Raises RuntimeError if that cannot be."""
        credentials = _credentials(settings)
        if credentials is None:
            return self._server.add_insecure_port(address)
        return self._server.add_secure_port(address, credentials)

    async def start(self) -> None:
        """Accept calls. Health stays NOT_SERVING until `health.serving()`."""
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        """Stop accepting; end what still runs after `grace_s`. Safe to call twice."""
        with contextlib.suppress(grpc.aio.UsageError):
            await self._server.stop(grace_s)


def _credentials(settings: Settings) -> grpc.ServerCredentials | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    client_ca = settings.tls_client_ca
    return grpc.ssl_server_credentials(
        [(settings.tls_key.read_bytes(), settings.tls_cert.read_bytes())],
        root_certificates=client_ca.read_bytes() if client_ca is not None else None,
        require_client_auth=client_ca is not None,
    )


class _Reflection(reflection_aio.ReflectionServicer):
    """Lists to each caller the services that he may call."""

    def __init__(self) -> None:
        names = (
            *SERVICES,
            health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
            reflection.SERVICE_NAME,
            _REFLECTION_V1,
        )
        super().__init__(names)
        public = [name for name in names if name not in LOOPBACK_SERVICES]
        self._for_others = reflection_aio.ReflectionServicer(public)

    async def ServerReflectionInfo(  # type: ignore[override]  # its stub takes it for a coroutine
        self, request_iterator: AsyncIterable[Any], context: Any
    ) -> AsyncIterator[Any]:
        answer: Any = self._for_others.ServerReflectionInfo
        if is_local_peer(str(context.peer())):
            answer = super().ServerReflectionInfo
        async for response in answer(request_iterator, context):
            yield response


def _add_reflection(server: grpc.aio.Server) -> None:
    """Reflection under both of its names: old tools ask v1alpha, new ones v1.

    grpcio-reflection has v1alpha alone. The messages of both are the same on the wire, so
    one servicer answers both.
    """
    servicer = _Reflection()
    add_ServerReflectionServicer_to_server(servicer, server)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handlers: Sequence[Any] = [
        grpc.method_handlers_generic_handler(_REFLECTION_V1, {"ServerReflectionInfo": handler})
    ]
    server.add_generic_rpc_handlers(tuple(handlers))
