"""What calls leave in the metrics of the process that answers them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import grpc
import pytest
from prometheus_client import REGISTRY

from engine.pool import ServedAdapter
from engine.split import Split
from gateway import metrics
from gateway.adapter_labels import OTHER_LABEL
from gateway.admission import Draining, Shed
from gateway.call import BASE_MODEL_LABEL, UNRESOLVED_LABEL
from lora_gateway.v1 import inference_pb2 as pb
from store.records import Arm
from tests.gateway.conftest import ALPHA, FakeGateway


def adapters_with_series() -> set[str]:
    """Adapters that have series in this process, which shares nothing."""
    return {
        sample.labels["adapter"]
        for family in REGISTRY.collect()
        if family.name.startswith("llm_adapter_")
        for sample in family.samples
    }


def requests_of(adapter: str, code: str) -> float:
    labels = {"method": "Generate", "adapter": adapter, "code": code}
    return REGISTRY.get_sample_value("llm_adapter_requests_total", labels) or 0.0


async def failures(fake: FakeGateway, requests: Iterable[pb.GenerateRequest]) -> None:
    for request in requests:
        with pytest.raises(grpc.aio.AioRpcError):
            await fake.stub.Generate(request)


async def test_names_that_callers_make_up_make_no_series(fake: FakeGateway) -> None:
    known = adapters_with_series() | {UNRESOLVED_LABEL, BASE_MODEL_LABEL, "alpha"}
    before = requests_of(UNRESOLVED_LABEL, "NOT_FOUND")
    invented = [f"invented-{number}" for number in range(20)]
    await failures(fake, [pb.GenerateRequest(text="x", adapter=name) for name in invented])
    await failures(fake, [pb.GenerateRequest(text="x", adapter="alpha", version=99)])
    await failures(fake, [pb.GenerateRequest(text="x", adapter="Not A Name")])
    assert adapters_with_series() <= known
    assert requests_of(UNRESOLVED_LABEL, "NOT_FOUND") == before + 21


async def test_a_served_adapter_and_the_base_model_have_series(fake: FakeGateway) -> None:
    sampling = pb.SamplingParams(max_tokens=1)
    for adapter, label in (("alpha", "alpha"), ("", BASE_MODEL_LABEL)):
        before = requests_of(label, "OK")
        await fake.stub.Generate(pb.GenerateRequest(text="x", adapter=adapter, sampling=sampling))
        assert requests_of(label, "OK") == before + 1


async def test_an_adapter_that_is_not_named_is_counted_with_the_others(fake: FakeGateway) -> None:
    beta = replace(ALPHA, adapter="beta", lora_int_id=2)
    fake.view.show(beta.tenant, beta.adapter, ServedAdapter(Split([Arm(3, 1)]), (3,)))
    fake.residents.loaded(beta)
    before, known = requests_of(OTHER_LABEL, "OK"), adapters_with_series()
    request = pb.GenerateRequest(text="x", adapter="beta", sampling=pb.SamplingParams(max_tokens=3))
    answer = await fake.stub.Generate(request)
    assert answer.served_by.adapter == "beta"
    async for _ in fake.stub.GenerateStream(request):
        pass
    assert requests_of(OTHER_LABEL, "OK") == before + 1
    assert adapters_with_series() <= known | {OTHER_LABEL}


async def test_the_wait_of_a_call_that_was_answered_is_known(fake: FakeGateway) -> None:
    def waits() -> float:
        return REGISTRY.get_sample_value("gateway_queue_wait_seconds_count") or 0.0

    before = waits()
    sampling = pb.SamplingParams(max_tokens=2)
    await fake.stub.Generate(pb.GenerateRequest(text="x", sampling=sampling))
    async for _ in fake.stub.GenerateStream(pb.GenerateRequest(text="x", sampling=sampling)):
        pass
    await failures(fake, [pb.GenerateRequest(text="x", adapter="invented")])
    assert waits() == before + 2


async def test_calls_that_are_not_admitted_are_counted_by_reason(fake: FakeGateway) -> None:
    def shed() -> list[float]:
        return [
            REGISTRY.get_sample_value("gateway_shed_total", {"reason": reason.value}) or 0.0
            for reason in (Shed.OVERLOADED, Shed.DRAINING)
        ]

    overloaded, draining = shed()
    request = pb.GenerateRequest(text="x", sampling=pb.SamplingParams(max_tokens=10_000))
    fake.admission.limit = 1
    running = fake.stub.GenerateStream(request)
    await running.read()
    await failures(fake, [request, request])
    assert shed() == [overloaded + 2, draining]
    fake.admission.close(Draining())
    await failures(fake, [request])
    assert shed() == [overloaded + 2, draining + 1]
    fake.admission.cut_all(Draining())
    with pytest.raises(grpc.aio.AioRpcError, match="shutting down"):
        while await running.read() is not grpc.aio.EOF:
            pass
    assert shed() == [overloaded + 2, draining + 1], "it had been admitted"


async def test_requests_count_on_their_shard_while_they_run(fake: FakeGateway) -> None:
    def running() -> float:
        return REGISTRY.get_sample_value("gateway_inflight", {"shard": "shard-0"}) or 0.0

    before = running()
    stream = fake.stub.GenerateStream(
        pb.GenerateRequest(text="x", sampling=pb.SamplingParams(max_tokens=10_000))
    )
    await stream.read()
    assert running() == before + 1
    stream.cancel()
    assert await fake.admission.wait_idle(5)
    assert running() == before


async def test_calls_count_as_running_while_they_run(fake: FakeGateway) -> None:
    def running() -> float:
        return REGISTRY.get_sample_value("gateway_inflight_calls") or 0.0

    before = running()
    stream = fake.stub.GenerateStream(
        pb.GenerateRequest(text="x", sampling=pb.SamplingParams(max_tokens=10_000))
    )
    await stream.read()
    assert running() == before + 1
    stream.cancel()
    assert await fake.admission.wait_idle(5)
    assert running() == before


def gaps_of_alpha() -> float:
    labels = {"adapter": "alpha", "stage": "itl"}
    return REGISTRY.get_sample_value("llm_adapter_latency_seconds_count", labels) or 0.0


async def test_a_long_stream_shows_its_gaps_while_it_runs(fake: FakeGateway) -> None:
    tokens = metrics.ITL_BATCH + 2
    sampling = pb.SamplingParams(max_tokens=tokens + 100)
    before = gaps_of_alpha()
    stream = fake.stub.GenerateStream(
        pb.GenerateRequest(text="x", adapter="alpha", sampling=sampling)
    )
    deltas = 0
    async for event in stream:
        deltas += event.HasField("delta")
        if deltas == tokens:
            break
    assert gaps_of_alpha() >= before + metrics.ITL_BATCH
    stream.cancel()
