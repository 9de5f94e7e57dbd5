"""The relay: a call of the host's services comes out as if the caller had asked the host."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.any_pb2 import Any as Packed
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from engine.fake import Script
from gateway.admission import RETRY_DELAY_S, Draining
from gateway.relay import ACTOR_KEY, TENANT_KEY
from gateway.settings import Settings
from gateway.tracing import Tracing
from lora_gateway.v1 import adapters_pb2 as pb
from lora_gateway.v1 import inference_pb2
from lora_gateway.v1.adapters_pb2_grpc import AdaptersStub
from tests.collector import Collector
from tests.details import DETAILS_KEY
from tests.gateway.certificates import Authority
from tests.gateway.conftest import start_fake_gateway
from tests.gateway.promises import refusal_of, refused
from tests.gateway.scripted_host import Relayed, address_in, relaying, serving_host

TIMEOUT_S = 10.0
WEIGHTS_BYTES = 20 * 1024**2
CHUNK_BYTES = 4 * 1024**2


@pytest_asyncio.fixture
async def relayed(tmp_path: Path) -> AsyncIterator[Relayed]:
    async with relaying(tmp_path) as relayed:
        yield relayed


def get(adapter: str = "alpha") -> pb.GetAdapterRequest:
    return pb.GetAdapterRequest(adapter=adapter)


async def happens(event: asyncio.Event) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        await event.wait()


# --- what comes through ------------------------------------------------------


async def test_a_unary_call_is_answered_by_the_host(relayed: Relayed) -> None:
    answer = await relayed.stub.GetAdapter(get("pirate"))
    assert (answer.adapter.adapter, answer.adapter.etag) == ("pirate", "t7")


async def test_a_stream_comes_message_by_message_and_ends(relayed: Relayed) -> None:
    told = [message.heartbeat.sequence async for message in relayed.watch("alpha")]
    assert told == [1, 2, 3]
    followed = relayed.watch()
    assert (await followed.read()).heartbeat.sequence == 1, "before the stream ends"
    followed.cancel()


async def test_an_upload_arrives_byte_for_byte(relayed: Relayed) -> None:
    weights = secrets.token_bytes(WEIGHTS_BYTES)

    def messages() -> Any:
        yield pb.UploadAdapterVersionRequest(header=pb.UploadHeader(upload_id="u"))
        for offset in range(0, len(weights), CHUNK_BYTES):
            chunk = pb.UploadChunk(offset=offset, data=weights[offset : offset + CHUNK_BYTES])
            yield pb.UploadAdapterVersionRequest(chunk=chunk)

    answer = await relayed.stub.UploadAdapterVersion(messages())
    assert answer.adapter_version.size_bytes == WEIGHTS_BYTES
    assert answer.adapter_version.weights_sha256 == hashlib.sha256(weights).hexdigest()


async def test_inference_beside_it_is_answered_by_the_worker_itself(relayed: Relayed) -> None:
    answer = await relayed.gateway.stub.Generate(inference_pb2.GenerateRequest(text="one"))
    assert answer.completions[0].text
    assert not relayed.host.entered.is_set()


async def test_a_method_that_the_host_has_not_is_unimplemented(relayed: Relayed) -> None:
    for service in ("lora_gateway.v1.Adapters", "lora_gateway.v1.Nothing"):
        call: Any = relayed.gateway.channel.unary_unary(f"/{service}/Nothing")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_the_hosts_own_messages_pass_whatever_they_hold(relayed: Relayed) -> None:
    """Nothing is parsed on the way, so a host that is newer is understood by newer callers."""
    call: Any = relayed.gateway.channel.unary_unary("/lora_gateway.v1.Adapters/GetAdapter")
    unknown_field = b"\xfa\x7f\x03new"
    answer = await call(get().SerializeToString() + unknown_field)
    assert pb.GetAdapterResponse.FromString(answer).adapter.adapter == "alpha"


# --- statuses ----------------------------------------------------------------


def rich_status() -> status_pb2.Status:
    status = status_pb2.Status(code=code_pb2.ABORTED, message="changed since: \N{SKULL} read again")
    info = error_details_pb2.ErrorInfo(
        reason="ETAG_MISMATCH", domain="lora-gateway", metadata={"adapter": "alpha", "etag": "t8"}
    )
    for detail in (info, error_details_pb2.DebugInfo(detail="of a kind that we never send")):
        packed = Packed()
        packed.Pack(detail)
        status.details.append(packed)
    return status


async def call_unary(relayed: Relayed) -> None:
    await relayed.stub.GetAdapter(get())


async def call_stream(relayed: Relayed) -> None:
    async for _ in relayed.watch("alpha"):
        pass


async def call_upload(relayed: Relayed) -> None:
    header = pb.UploadAdapterVersionRequest(header=pb.UploadHeader(upload_id="u"))
    await relayed.stub.UploadAdapterVersion(iter([header]))


KINDS = pytest.mark.parametrize(
    "call", [call_unary, call_stream, call_upload], ids=["unary", "stream", "upload"]
)


@KINDS
async def test_a_status_with_details_passes_unchanged(
    call: Callable[[Relayed], Coroutine[Any, Any, None]], relayed: Relayed
) -> None:
    status = rich_status()
    relayed.host.fails = lambda context: context.abort_with_status(rpc_status.to_status(status))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(relayed)
    raw = dict(caught.value.trailing_metadata() or ())[DETAILS_KEY]
    assert status_pb2.Status.FromString(raw) == status
    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert caught.value.details() == status.message


@KINDS
async def test_a_status_without_details_passes_unchanged(
    call: Callable[[Relayed], Coroutine[Any, Any, None]], relayed: Relayed
) -> None:
    relayed.host.fails = lambda context: context.abort(grpc.StatusCode.DATA_LOSS, "of its own")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(relayed)
    assert (caught.value.code(), caught.value.details()) == (
        grpc.StatusCode.DATA_LOSS,
        "of its own",
    )


async def test_a_host_that_cancels_says_so(relayed: Relayed) -> None:
    relayed.host.fails = lambda context: context.abort(grpc.StatusCode.CANCELLED, "gave up")
    stream: Any = relayed.gateway.channel.unary_unary("/lora_gateway.v1.Adapters/GetAdapter")
    call = stream(b"")
    assert await call.code() is grpc.StatusCode.CANCELLED
    assert await call.details() == "gave up"


async def test_a_status_after_messages_comes_after_them(relayed: Relayed) -> None:
    status = rpc_status.to_status(rich_status())
    relayed.host.fails_late = lambda context: context.abort_with_status(status)
    seen = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for message in relayed.watch("alpha"):
            seen.append(message.heartbeat.sequence)
    assert seen == [1, 2, 3]
    assert caught.value.code() is grpc.StatusCode.ABORTED


# --- deadline and cancellation -----------------------------------------------


async def test_the_callers_deadline_reaches_the_host(relayed: Relayed) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await relayed.stub.GetAdapterVersion(pb.GetAdapterVersionRequest(), timeout=0.5)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert relayed.host.remaining_s is not None
    assert 0 < relayed.host.remaining_s < 0.6, "gRPC rounds it on its way"
    await happens(relayed.host.cancelled)
    assert await relayed.gateway.admission.wait_idle(TIMEOUT_S)


async def test_without_a_deadline_the_host_decides(tmp_path: Path) -> None:
    """The worker's own default is for what the worker answers itself."""
    async with relaying(tmp_path, unary_deadline_s=0.05, stream_deadline_s=0.05) as relayed:
        watch = relayed.watch()
        for _ in range(3):
            await watch.read()
        ended = asyncio.ensure_future(watch.read())
        assert not (await asyncio.wait([ended], timeout=0.3))[0]
        assert relayed.host.remaining_s is None
        watch.cancel()
        await happens(relayed.host.cancelled)
        await asyncio.wait([ended])


@pytest.mark.parametrize("kind", ["unary", "stream"])
async def test_a_caller_who_leaves_ends_the_call_at_the_host(kind: str, relayed: Relayed) -> None:
    if kind == "unary":
        call: Any = relayed.stub.GetAdapterVersion(pb.GetAdapterVersionRequest())
        await happens(relayed.host.entered)
    else:
        call = relayed.watch()
        await call.read()
    call.cancel()
    await happens(relayed.host.cancelled)
    assert await relayed.gateway.admission.wait_idle(TIMEOUT_S)


# --- a host that is gone -----------------------------------------------------


async def test_a_host_that_is_not_there_is_an_unavailable_control_plane(tmp_path: Path) -> None:
    gateway = await start_fake_gateway(Script(), host=address_in(tmp_path))
    stub: Any = AdaptersStub(gateway.channel)
    begin_s = time.monotonic()
    try:
        refusal = await refused(stub.GetAdapter(get()))
        assert refusal.reason == "CONTROL_PLANE_UNAVAILABLE"
        assert refusal.metadata == {}
        delay = refusal.details["RetryInfo"].retry_delay
        assert delay.ToMilliseconds() == RETRY_DELAY_S * 1000
        assert time.monotonic() - begin_s < 2, "whoever is told to retry is told at once"
    finally:
        await gateway.close()


async def test_a_host_that_comes_later_is_found(tmp_path: Path) -> None:
    gateway = await start_fake_gateway(Script(), host=address_in(tmp_path))
    stub: Any = AdaptersStub(gateway.channel)
    try:
        await refused(stub.GetAdapter(get()))
        async with serving_host(tmp_path) as (host, _), asyncio.timeout(TIMEOUT_S):
            while not host.entered.is_set():
                try:
                    await stub.GetAdapter(get())
                except grpc.aio.AioRpcError as error:
                    assert refusal_of(error).reason == "CONTROL_PLANE_UNAVAILABLE"
                    await asyncio.sleep(0.05)
    finally:
        await gateway.close()


@KINDS
async def test_a_host_that_ends_in_the_middle_is_an_unavailable_control_plane(
    call: Callable[[Relayed], Coroutine[Any, Any, None]], relayed: Relayed
) -> None:
    waits = asyncio.Event()

    async def hang(context: Any) -> None:
        await waits.wait()

    relayed.host.fails = hang
    running = asyncio.create_task(call(relayed))
    await happens(relayed.host.entered)
    await relayed.server.stop(0)
    refusal = await refused(running)
    assert refusal.reason == "CONTROL_PLANE_UNAVAILABLE"
    assert await relayed.gateway.admission.wait_idle(TIMEOUT_S)


# --- drain -------------------------------------------------------------------


async def test_a_drain_cuts_a_watch_that_would_never_end(relayed: Relayed) -> None:
    watch = relayed.watch()
    for _ in range(3):
        await watch.read()
    admission = relayed.gateway.admission
    admission.close(Draining())
    assert (await refused(relayed.stub.GetAdapter(get()))).reason == "DRAINING"
    assert not await admission.wait_idle(0.05), "the watch goes on"
    admission.cut_all(Draining())
    refusal = await refused(watch.read())
    assert refusal.reason == "DRAINING"
    await happens(relayed.host.cancelled)
    assert await admission.wait_idle(TIMEOUT_S)


# --- who calls ---------------------------------------------------------------


async def test_the_host_learns_the_callers_address(relayed: Relayed) -> None:
    await relayed.stub.GetAdapter(get())
    assert str(relayed.host.metadata[ACTOR_KEY]).startswith("ipv4:127.0.0.1:")
    assert relayed.host.metadata[TENANT_KEY] == "default"


async def test_a_caller_cannot_say_who_it_is(relayed: Relayed) -> None:
    forged = ((ACTOR_KEY, "guard"), (TENANT_KEY, "victim"), ("x-other", "kept away"))
    await relayed.stub.GetAdapter(get(), metadata=forged)
    assert str(relayed.host.metadata[ACTOR_KEY]).startswith("ipv4:127.0.0.1:")
    assert relayed.host.metadata[TENANT_KEY] == "default"
    assert "x-other" not in relayed.host.metadata


@pytest.mark.parametrize(
    ("name", "actor"),
    [("ci deployer", "ci deployer"), ("zo\xeb", r"zo\xc3\xab"), ("two\nlines", r"two\nlines")],
    ids=["plain", "not ascii", "control character"],
)
async def test_a_client_certificate_says_who_calls(name: str, actor: str, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca.pem")
    cert, key = authority.issue(tmp_path, "server")
    settings = Settings(tls_cert=cert, tls_key=key, tls_client_ca=authority.path)
    client_cert, client_key = authority.issue(tmp_path, name)
    credentials = grpc.ssl_channel_credentials(
        authority.path.read_bytes(), client_key.read_bytes(), client_cert.read_bytes()
    )
    async with relaying(tmp_path, settings=settings) as relayed:
        address = relayed.gateway.address
        async with grpc.aio.secure_channel(address, credentials) as channel:
            stub: Any = AdaptersStub(channel)
            await stub.GetAdapter(get(), timeout=TIMEOUT_S)
        assert relayed.host.metadata[ACTOR_KEY] == actor


async def test_the_hosts_span_can_join_the_callers_trace(tmp_path: Path) -> None:
    collector = Collector()
    tracing = Tracing(collector.endpoint)
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    async with relaying(tmp_path, tracing=tracing) as relayed:
        parent = (("traceparent", f"00-{trace_id}-{span_id}-01"),)
        await relayed.stub.GetAdapter(get(), metadata=parent)
    await asyncio.to_thread(tracing.close)
    (span,) = collector.trace(bytes.fromhex(trace_id), 1, TIMEOUT_S)
    collector.close()
    assert relayed.host.metadata["traceparent"] == f"00-{trace_id}-{span.span_id.hex()}-01"
