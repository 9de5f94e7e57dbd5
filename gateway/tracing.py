"""OpenTelemetry spans of calls, over OTLP, in the caller's trace.

Names and attributes follow the GenAI conventions where they exist. The engine's own span
(queue, prefill, decode) becomes a child through the headers that a call carries.
"""

from __future__ import annotations

from collections.abc import Iterable

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from gateway.call import Call

_PROPAGATOR = TraceContextTextMapPropagator()
_OPERATION = {"Generate": "text_completion", "GenerateStream": "text_completion"}


class Tracing:
    """Spans for the calls of one process. Without an endpoint it does nothing."""

    def __init__(self, otlp_endpoint: str | None) -> None:
        self._provider: TracerProvider | None = None
        self._tracer: trace.Tracer | None = None
        if otlp_endpoint is not None:
            self._provider = TracerProvider(
                resource=Resource.create({"service.name": "lora-gateway"})
            )
            self._provider.add_span_processor(
                BatchSpanProcessor(OTLPSpanExporter(endpoint=otlp_endpoint))
            )
            self._tracer = self._provider.get_tracer("lora_gateway")

    def start(self, call: Call, metadata: Iterable[tuple[str, str | bytes]]) -> trace.Span | None:
        """Open the span of a call, under the caller's if the metadata names one."""
        if self._tracer is None:
            return None
        carrier = {key: value for key, value in metadata if isinstance(value, str)}
        span = self._tracer.start_span(
            call.method, context=_PROPAGATOR.extract(carrier), kind=trace.SpanKind.SERVER
        )
        headers: dict[str, str] = {}
        _PROPAGATOR.inject(headers, trace.set_span_in_context(span))
        call.trace_headers = headers
        return span

    def end(self, span: trace.Span | None, call: Call, code: str) -> None:
        """Close the span with what became known of the call."""
        if span is None:
            return
        operation = _OPERATION.get(call.method)
        if operation and call.adapter is not None:
            span.update_name(f"{operation} {call.adapter}")
            span.set_attributes(
                {
                    "gen_ai.operation.name": operation,
                    "gen_ai.provider.name": "lora-gateway",
                    "gen_ai.request.model": call.adapter,
                    "gen_ai.response.model": f"{call.adapter}@{call.version}",
                    "gen_ai.usage.input_tokens": call.prompt_tokens,
                    "gen_ai.usage.output_tokens": call.completion_tokens,
                    "lora_gateway.shard": call.shard,
                }
            )
        span.set_attributes(
            {
                "rpc.system": "grpc",
                "rpc.method": call.method,
                "rpc.grpc.status_code": code,
                "gen_ai.response.id": call.request_id,
                "lora_gateway.tenant": call.principal.tenant,
            }
        )
        if code not in ("OK", "CANCELLED"):
            span.set_attribute("error.type", code)
            span.set_status(trace.Status(trace.StatusCode.ERROR))
        span.end()

    def close(self) -> None:
        """Send what is left. Blocks for at most the exporter's own timeout."""
        if self._provider is not None:
            self._provider.shutdown()
