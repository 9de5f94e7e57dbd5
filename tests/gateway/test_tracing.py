"""Spans: in the caller's trace, with what became known of the call. A real exporter."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import grpc
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from engine.fake import Script
from gateway.call import Call
from gateway.tracing import Tracing
from lora_gateway.v1 import inference_pb2 as pb
from tests.collector import Collector, attributes
from tests.gateway.conftest import FakeGateway, start_fake_gateway

ARRIVAL_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Caller:
    """Who calls, within a trace of its own."""

    trace_id: bytes
    span_id: bytes
    sampled: bool = True

    @classmethod
    def new(cls, *, sampled: bool = True) -> Caller:
        return cls(secrets.token_bytes(16), secrets.token_bytes(8), sampled)

    @property
    def metadata(self) -> list[tuple[str, str]]:
        flags = "01" if self.sampled else "00"
        return [("traceparent", f"00-{self.trace_id.hex()}-{self.span_id.hex()}-{flags}")]


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@contextlib.asynccontextmanager
async def traced_gateway(collector: Collector) -> AsyncIterator[FakeGateway]:
    """A gateway whose spans have all been sent when the block ends."""
    tracing = Tracing(collector.endpoint)
    gateway = await start_fake_gateway(Script(), tracing=tracing)
    try:
        yield gateway
    finally:
        await gateway.close()
        await asyncio.to_thread(tracing.close)


def request(**fields: str) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(max_tokens=4, temperature=0)
    return pb.GenerateRequest(text="one two three", sampling=sampling, **fields)  # type: ignore[arg-type]


def only_span(collector: Collector, caller: Caller) -> Span:
    (span,) = collector.trace(caller.trace_id, 1, ARRIVAL_TIMEOUT_S)
    return span


async def test_a_call_is_a_span_below_the_callers(collector: Collector) -> None:
    caller = Caller.new()
    async with traced_gateway(collector) as gateway:
        answer = await gateway.stub.Generate(request(adapter="alpha"), metadata=caller.metadata)
    span = only_span(collector, caller)
    assert span.name == "text_completion alpha"
    assert span.kind == Span.SPAN_KIND_SERVER
    assert span.parent_span_id == caller.span_id
    assert span.end_time_unix_nano > span.start_time_unix_nano
    assert span.status.code == Status.STATUS_CODE_UNSET
    assert attributes(span) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "lora-gateway",
        "gen_ai.request.model": "alpha",
        "gen_ai.response.model": "alpha@3",
        "gen_ai.response.id": answer.request_id,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 4,
        "lora_gateway.shard": "shard-0",
        "lora_gateway.tenant": "default",
        "rpc.grpc.status_code": "OK",
        "rpc.method": "Generate",
        "rpc.system": "grpc",
    }


async def test_a_stream_is_one_span_until_its_end(collector: Collector) -> None:
    caller = Caller.new()
    async with traced_gateway(collector) as gateway:
        async for _ in gateway.stub.GenerateStream(request(), metadata=caller.metadata):
            pass
    facts = attributes(only_span(collector, caller))
    assert facts["gen_ai.request.model"] == "(base)"
    assert facts["gen_ai.usage.output_tokens"] == 4
    assert facts["rpc.grpc.status_code"] == "OK"


async def test_a_call_that_generates_nothing_is_a_span_of_its_method(
    collector: Collector,
) -> None:
    caller = Caller.new()
    async with traced_gateway(collector) as gateway:
        await gateway.stub.GetModel(pb.GetModelRequest(), metadata=caller.metadata)
    span = only_span(collector, caller)
    assert span.name == "GetModel"
    assert not [name for name in attributes(span) if name.startswith("gen_ai.usage")]


async def test_a_call_that_fails_is_an_error_with_its_code(collector: Collector) -> None:
    caller = Caller.new()
    async with traced_gateway(collector) as gateway:
        with pytest.raises(grpc.aio.AioRpcError):
            await gateway.stub.Generate(request(adapter="nobody"), metadata=caller.metadata)
    span = only_span(collector, caller)
    assert span.status.code == Status.STATUS_CODE_ERROR
    assert span.name == "Generate", "no adapter was found"
    facts = attributes(span)
    assert facts["rpc.grpc.status_code"] == facts["error.type"] == "NOT_FOUND"
    assert "nobody" not in str(span), "names that callers make up are no label"


async def test_a_call_that_its_caller_cancels_is_no_error(collector: Collector) -> None:
    caller = Caller.new()
    async with traced_gateway(collector) as gateway:
        long = pb.GenerateRequest(text="x", sampling=pb.SamplingParams(max_tokens=1_000_000))
        call = gateway.stub.GenerateStream(long, metadata=caller.metadata)
        await call.read()
        call.cancel()
        assert await gateway.admission.wait_idle(ARRIVAL_TIMEOUT_S)
    span = only_span(collector, caller)
    assert span.status.code == Status.STATUS_CODE_UNSET
    facts = attributes(span)
    assert facts["rpc.grpc.status_code"] == "CANCELLED"
    assert facts["gen_ai.usage.output_tokens"] >= 1


async def test_a_trace_that_is_not_sampled_is_not_exported(collector: Collector) -> None:
    unsampled, sampled = Caller.new(sampled=False), Caller.new()
    async with traced_gateway(collector) as gateway:
        for caller in (unsampled, sampled):
            await gateway.stub.Generate(request(), metadata=caller.metadata)
    assert only_span(collector, sampled)
    assert not collector.trace(unsampled.trace_id, 0, ARRIVAL_TIMEOUT_S)


@pytest.mark.parametrize(
    "metadata",
    [[], [("traceparent", "nonsense")], [("traceparent-bin", b"\x00\xff")]],
    ids=["none", "nonsense", "bytes"],
)
async def test_without_a_trace_of_the_caller_there_is_a_new_one(
    metadata: list[tuple[str, str | bytes]], collector: Collector
) -> None:
    tracing = Tracing(collector.endpoint)
    call = Call("Generate")
    span = tracing.start(call, metadata)
    assert span is not None
    tracing.end(span, call, "OK")
    await asyncio.to_thread(tracing.close)
    trace_id = span.get_span_context().trace_id.to_bytes(16)
    (exported,) = collector.trace(trace_id, 1, ARRIVAL_TIMEOUT_S)
    assert not exported.parent_span_id


async def test_the_engine_is_told_of_our_span(collector: Collector) -> None:
    """So that its own becomes a child of ours."""
    caller = Caller.new()
    tracing = Tracing(collector.endpoint)
    call = Call("Generate")
    span = tracing.start(call, caller.metadata)
    tracing.end(span, call, "OK")
    await asyncio.to_thread(tracing.close)
    exported = only_span(collector, caller)
    assert call.trace_headers == {
        "traceparent": f"00-{caller.trace_id.hex()}-{exported.span_id.hex()}-01"
    }


async def test_without_an_endpoint_there_is_no_span() -> None:
    tracing = Tracing(None)
    call = Call("Generate")
    span = tracing.start(call, Caller.new().metadata)
    assert span is None
    assert call.trace_headers is None
    tracing.end(span, call, "OK")
    tracing.close()
