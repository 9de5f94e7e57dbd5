"""A real OTLP collector over gRPC, in this process, that keeps what it gets."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector(TraceServiceServicer):
    """Spans by trace id. Listens from construction until `close`."""

    def __init__(self) -> None:
        self._arrived = threading.Condition()
        self._spans: list[Span] = []
        self._server = grpc.server(ThreadPoolExecutor(2))
        add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request: pb.ExportTraceServiceRequest, context: Any) -> Any:
        with self._arrived:
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    self._spans.extend(scope.spans)
            self._arrived.notify_all()
        return pb.ExportTraceServiceResponse()

    def trace(self, trace_id: bytes, count: int, timeout_s: float) -> list[Span]:
        """The spans of a trace, once there are `count`. Fails if there are not in time."""
        with self._arrived:
            found: list[Span] = []

            def enough() -> bool:
                found[:] = [span for span in self._spans if span.trace_id == trace_id]
                return len(found) >= count

            assert self._arrived.wait_for(enough, timeout_s), f"only {found}"
            return found

    def close(self) -> None:
        self._server.stop(0).wait()


def attributes(span: Span) -> dict[str, Any]:
    """A span's attributes as plain values."""
    return {
        pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "string_value")
        for pair in span.attributes
    }
