"""What every call goes through: parsing, errors, deadlines, cancellation, admission, drain."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha import reflection_pb2

from engine.fake import Script
from engine.generation import ServedVersion
from engine.pool import ServedAdapter
from engine.split import Split
from gateway.admission import Draining
from gateway.call import Call
from lora_gateway.v1 import inference_pb2 as pb
from store.records import Arm
from tests.details import bad_fields, detail, error_info
from tests.gateway.conftest import FakeGateway, start_fake_gateway

GENERATE = "/lora_gateway.v1.Inference/Generate"
STREAM = "/lora_gateway.v1.Inference/GenerateStream"


def request(max_tokens: int = 4, adapter: str = "") -> pb.GenerateRequest:
    return pb.GenerateRequest(
        text="one two three",
        adapter=adapter,
        sampling=pb.SamplingParams(max_tokens=max_tokens, temperature=0),
    )


async def answer_of(gateway: FakeGateway, adapter: str) -> pb.GenerateResponse:
    """The answer to a request that must end well."""
    return await gateway.stub.Generate(request(adapter=adapter))


def reason(error: grpc.aio.AioRpcError) -> str:
    return str(error_info(error).reason)


async def test_a_stream_is_started_deltas_finished(fake: FakeGateway) -> None:
    events = [event async for event in fake.stub.GenerateStream(request(adapter="alpha"))]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["started", "delta", "delta", "delta", "delta", "finished"]
    assert events[0].started.served_by.adapter == "alpha"
    assert events[0].started.served_by.version == 3
    assert "".join(event.delta.text for event in events[1:-1]) == "0 1 2 3 "
    finished = events[-1].finished
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (3, 4)
    assert finished.completions[0].finish_reason == pb.FINISH_REASON_LENGTH
    assert finished.timings.total_ms > finished.timings.time_to_first_token_ms > 0


async def test_a_unary_answer_is_the_same_text(fake: FakeGateway) -> None:
    answer = await fake.stub.Generate(request())
    assert answer.completions[0].text == "0 1 2 3 "
    assert answer.served_by.adapter == "" and answer.served_by.shard == "shard-0"


@pytest.mark.parametrize("method", [GENERATE, STREAM])
@pytest.mark.parametrize("raw", [b"\xff\xff\xff", b"\x1a\x02\xc3\x28", b"\x0a\x02\xff\xfe"])
async def test_malformed_bytes_are_invalid_argument(
    fake: FakeGateway, method: str, raw: bytes
) -> None:
    """The last two are invalid UTF-8 in `text` and in `adapter`."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if method == GENERATE:
            unary: Any = fake.channel.unary_unary(method)
            await unary(raw)
        else:
            stream: Any = fake.channel.unary_stream(method)
            async for _ in stream(raw):
                pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason(caught.value) == "MALFORMED_MESSAGE"


async def test_all_violations_come_at_once(fake: FakeGateway) -> None:
    bad = pb.GenerateRequest(
        adapter="Not A Name",
        sampling=pb.SamplingParams(temperature=float("nan"), top_p=0, max_tokens=0),
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await fake.stub.Generate(bad)
    assert reason(caught.value) == "INVALID_FIELD"
    assert bad_fields(caught.value) == {
        *("prompt", "adapter", "sampling.temperature", "sampling.top_p", "sampling.max_tokens")
    }


async def test_unknown_adapter_names_the_served_ones(fake: FakeGateway) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await fake.stub.Generate(request(adapter="alphq"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert reason(caught.value) == "ADAPTER_NOT_FOUND"
    assert "served here: alpha" in (caught.value.details() or "")


async def test_a_version_that_is_not_loaded_is_asked_for_once_and_waited_for(
    fake: FakeGateway,
) -> None:
    fake.view.show("default", "beta", ServedAdapter(Split([Arm(1, 1)]), (1,)))
    beta = ServedVersion("default", "beta", 1, 2, "/nowhere", "digest")
    calls = [asyncio.create_task(answer_of(fake, "beta")) for _ in range(3)]
    async with asyncio.timeout(5):
        while fake.admission.held < len(calls) or not fake.wanted:
            await asyncio.sleep(0.01)
    assert not any(call.done() for call in calls)
    fake.residents.loaded(beta)
    assert {answer.served_by.version for answer in await asyncio.gather(*calls)} == {1}
    assert fake.wanted == [beta.key]


async def test_a_version_that_cannot_be_loaded_fails_its_own_callers_alone(
    fake: FakeGateway,
) -> None:
    fake.view.show("default", "beta", ServedAdapter(Split([Arm(1, 1)]), (1,)))
    waiting = asyncio.create_task(answer_of(fake, "beta"))
    async with asyncio.timeout(5):
        while not fake.wanted:
            await asyncio.sleep(0.01)
    fake.residents.failed(fake.wanted[0], "its stored files are gone")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await waiting
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert reason(caught.value) == "ADAPTER_LOAD_FAILED"
    assert "its stored files are gone" in (caught.value.details() or "")
    assert (await answer_of(fake, "alpha")).served_by.version == 3


async def test_an_adapter_without_traffic_answers_only_by_version(fake: FakeGateway) -> None:
    fake.view.show("default", "alpha", ServedAdapter(Split([]), (3,)))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await fake.stub.Generate(request(adapter="alpha"))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert reason(caught.value) == "ADAPTER_NOT_READY"
    named = request(adapter="alpha")
    named.version = 3
    assert (await fake.stub.Generate(named)).served_by.version == 3


async def test_every_call_that_ended_is_told_with_its_version_and_code() -> None:
    ended: list[tuple[str, str, int, str]] = []

    def note(call: Call, code: str, end_s: float) -> None:
        assert call.started_s <= end_s <= time.monotonic()
        ended.append((call.method, call.adapter or "", call.version, code))

    gateway = await start_fake_gateway(Script(), ended=note)
    await gateway.stub.Generate(request(adapter="alpha"))
    await gateway.stub.Generate(request())
    with pytest.raises(grpc.aio.AioRpcError):
        await gateway.stub.Generate(request(adapter="nosuch"))
    await gateway.close()
    assert ended == [
        ("Generate", "alpha", 3, "OK"),
        ("Generate", "(base)", 0, "OK"),
        ("Generate", "", 0, "NOT_FOUND"),
    ]


async def test_cancel_aborts_the_engine_request(fake: FakeGateway) -> None:
    call = fake.stub.GenerateStream(request(max_tokens=10_000))
    await call.read()
    assert len(fake.shard.running) == 1
    call.cancel()
    async with asyncio.timeout(2):
        while fake.shard.running:
            await asyncio.sleep(0.01)
    assert len(fake.shard.aborted) == 1
    assert await fake.admission.wait_idle(2)


async def test_client_deadline_aborts_the_engine_request(fake: FakeGateway) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await fake.stub.Generate(request(max_tokens=10_000), timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    async with asyncio.timeout(2):
        while fake.shard.running:
            await asyncio.sleep(0.01)


async def test_default_deadline_ends_a_call_without_one() -> None:
    gateway = await start_fake_gateway(
        Script(token_interval_s=0.01), unary_deadline_s=0.2, stream_deadline_s=0.3
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway.stub.Generate(request(max_tokens=10_000))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert reason(caught.value) == "DEADLINE_EXCEEDED"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in gateway.stub.GenerateStream(request(max_tokens=10_000)):
            pass
    assert reason(caught.value) == "DEADLINE_EXCEEDED"
    assert not gateway.shard.running
    await gateway.close()


async def test_too_many_requests_are_refused_with_retry_info() -> None:
    gateway = await start_fake_gateway(Script(token_interval_s=0.01), limit=1)
    running = gateway.stub.GenerateStream(request(max_tokens=10_000))
    await running.read()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway.stub.Generate(request())
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert reason(caught.value) == "OVERLOADED"
    detail(caught.value, error_details_pb2.RetryInfo)
    running.cancel()
    await gateway.close()


async def test_a_dead_shard_is_unavailable_and_tells_tokens_emitted() -> None:
    gateway = await start_fake_gateway(Script(dies_after_tokens=3))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in gateway.stub.GenerateStream(request(max_tokens=10)):
            pass
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    info = error_info(caught.value)
    assert info.reason == "SHARD_UNAVAILABLE" and info.metadata["tokens_emitted"] == "3"
    await gateway.close()


async def test_an_inner_bug_is_internal_with_a_fixed_text(
    fake: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def bug(prompt: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(fake.shard, "render", bug)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await fake.stub.Generate(request())
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert reason(caught.value) == "INTERNAL"
    detail(caught.value, error_details_pb2.RequestInfo)
    assert "secret" not in str(caught.value.details())


async def test_a_stray_cancellation_becomes_internal(
    fake: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stray(prompt: object) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(fake.shard, "render", stray)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await fake.stub.Generate(request(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.INTERNAL


async def test_draining_refuses_new_calls_and_cuts_late_ones(fake: FakeGateway) -> None:
    running = fake.stub.GenerateStream(request(max_tokens=10_000))
    await running.read()
    fake.admission.close(Draining())
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await fake.stub.Generate(request())
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert reason(refused.value) == "DRAINING"
    detail(refused.value, error_details_pb2.RetryInfo)
    assert not await fake.admission.wait_idle(0.05), "the running stream goes on"
    fake.admission.cut_all(Draining())
    with pytest.raises(grpc.aio.AioRpcError) as cut:
        while await running.read() is not grpc.aio.EOF:
            pass
    assert cut.value.code() is grpc.StatusCode.UNAVAILABLE
    assert reason(cut.value) == "DRAINING"
    assert fake.shard.aborted


async def test_a_cut_during_the_first_write_still_reaches_the_client(
    fake: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first write carries the headers; grpc refuses a status that overtakes it."""

    def cut_during_first_write(call: Call, name: str, value: object) -> None:
        object.__setattr__(call, name, value)
        if name == "writing_since_s" and value is not None and call.cut_by is None:
            asyncio.get_running_loop().call_soon(call.cut, Draining())

    monkeypatch.setattr(Call, "__setattr__", cut_during_first_write)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(5):
            async for _ in fake.stub.GenerateStream(request(max_tokens=1000)):
                pass
    assert reason(caught.value) == "DRAINING"
    assert not fake.shard.running


async def test_many_violations_fit_into_the_trailers(fake: FakeGateway) -> None:
    """A client's grpc refuses trailers of over 8 KiB, and would hide the reason."""
    messages = [pb.ChatMessage(role=f"wizard-{i}", content="hi") for i in range(4096)]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await fake.stub.Generate(pb.GenerateRequest(chat=pb.Chat(messages=messages)))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(bad_fields(caught.value)) == 16
    assert "(and 4095 more)" in (caught.value.details() or "")


async def test_millions_of_entries_are_refused_at_once(fake: FakeGateway) -> None:
    start_s = time.monotonic()
    bad = pb.GenerateRequest(text="hi", sampling=pb.SamplingParams(stop=[""] * 1_000_000))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await fake.stub.Generate(bad)
    assert bad_fields(caught.value) == {"sampling.stop"}
    assert time.monotonic() - start_s < 3


async def test_every_health_watcher_is_told_that_the_server_drains(fake: FakeGateway) -> None:
    health: Any = HealthStub(fake.channel)
    watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(10)]
    for watch in watches:
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    fake.server.health.drain()
    for watch in watches:
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_health_watchers_end_when_the_server_drains(fake: FakeGateway) -> None:
    health: Any = HealthStub(fake.channel)
    for service in ("", "lora_gateway.v1.Inference"):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    watch = health.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    fake.server.health.drain()
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert await watch.read() is grpc.aio.EOF
    start_s = time.monotonic()
    await fake.server.stop(10)
    assert time.monotonic() - start_s < 5, "a watcher must not use up the grace"


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_answers_under_both_names(fake: FakeGateway, version: str) -> None:
    call: Any = fake.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    answer = await call.read()
    names = {service.name for service in answer.list_services_response.service}
    assert {"lora_gateway.v1.Inference", "lora_gateway.v1.Adapters"} <= names


async def test_health_tells_that_no_shard_is_up_and_when_one_is_back(fake: FakeGateway) -> None:
    health: Any = HealthStub(fake.channel)
    watch = health.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    await fake.server.health.serving(False)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    await fake.server.health.serving(True)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    fake.server.health.drain()
    await fake.server.health.serving(True)
    answer = await health.Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING, "a drain is for good"
