"""Spans of gateway and engine arrive at a collector, in the caller's trace."""

from __future__ import annotations

import asyncio
import secrets

import grpc

from lora_gateway.v1 import inference_pb2 as pb
from lora_gateway.v1.inference_pb2_grpc import InferenceStub
from tests.collector import Collector, attributes

EXPORT_TIMEOUT_S = 30.0
"""The exporter sends in batches, every 5 s."""


async def test_gateway_and_engine_spans_join_the_callers_trace(
    channel: grpc.aio.Channel, collector: Collector
) -> None:
    trace_id, parent = secrets.token_bytes(16), secrets.token_bytes(8)
    answer = await InferenceStub(channel).Generate(
        pb.GenerateRequest(
            text="Once", adapter="beta", sampling=pb.SamplingParams(max_tokens=5, temperature=0)
        ),
        metadata=[("traceparent", f"00-{trace_id.hex()}-{parent.hex()}-01")],
    )
    spans = await asyncio.to_thread(collector.trace, trace_id, 2, EXPORT_TIMEOUT_S)
    ours = next(span for span in spans if span.name == "text_completion beta")
    engine = next(span for span in spans if span is not ours)
    assert ours.parent_span_id == parent
    assert engine.parent_span_id == ours.span_id, "the engine's span hangs below ours"
    facts = attributes(ours)
    assert facts["gen_ai.response.model"] == "beta@1"
    assert facts["gen_ai.usage.output_tokens"] == 5
    assert facts["gen_ai.response.id"] == answer.request_id
    assert facts["lora_gateway.shard"] == "shard-0"
    assert facts["rpc.grpc.status_code"] == "OK"
