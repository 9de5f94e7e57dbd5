"""Uploads on the wire: whole, in pieces over several calls, and all that goes wrong with them."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from gateway import upload_stream
from lora_gateway.v1 import adapters_pb2 as pb
from store.artifacts import WEIGHTS_FILE
from tests.gateway.control_plane import TIMEOUT_S, Plane, config_of, control_plane, sha256
from tests.gateway.promises import Refusal, refused

WEIGHTS = bytes(range(256)) * 4096
"""1 MiB."""
HALF = len(WEIGHTS) // 2
CHUNK_BYTES = 200_000
UPLOAD_ID = "Night-run.1"
Message = pb.UploadAdapterVersionRequest


@pytest_asyncio.fixture
async def plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Plane]:
    async with control_plane(tmp_path, monkeypatch) as plane:
        yield plane


def header(**fields: Any) -> Message:
    """The header of the one upload that is sent here, but for `fields`."""
    good: dict[str, Any] = {
        "upload_id": UPLOAD_ID,
        "adapter": "sql",
        "adapter_config": config_of("uploaded"),
        "weights_size_bytes": len(WEIGHTS),
        "weights_sha256": sha256(WEIGHTS),
        "wait": True,
    }
    return Message(header=pb.UploadHeader(**good | fields))


def chunk(offset: int, data: bytes) -> Message:
    return Message(chunk=pb.UploadChunk(offset=offset, data=data))


def chunks(begin: int = 0, end: int = len(WEIGHTS)) -> list[Message]:
    """The weights between two offsets."""
    return [
        chunk(offset, WEIGHTS[offset : min(offset + CHUNK_BYTES, end)])
        for offset in range(begin, end, CHUNK_BYTES)
    ]


async def upload(plane: Plane, messages: Iterable[Message]) -> pb.AdapterVersion:
    answer = await plane.stub.UploadAdapterVersion(iter(messages), timeout=TIMEOUT_S)
    version: pb.AdapterVersion = answer.adapter_version
    return version


async def refused_upload(plane: Plane, *messages: Message) -> Refusal:
    return await refused(upload(plane, messages))


async def query(plane: Plane) -> pb.QueryUploadResponse:
    answer: pb.QueryUploadResponse
    answer = await plane.stub.QueryUpload(pb.QueryUploadRequest(upload_id=UPLOAD_ID))
    return answer


def uploads_left(plane: Plane) -> list[Path]:
    return list((plane.sources.parent / "state" / "uploads" / "default").glob("*"))


# --- whole and in pieces -----------------------------------------------------


async def test_an_upload_becomes_a_version_like_any_other(plane: Plane) -> None:
    version = await upload(plane, [header(labels={"team": "search"}), *chunks()])
    assert (version.version, version.state) == (1, pb.VERSION_STATE_READY)
    assert (version.source_uri, dict(version.labels)) == (f"upload:{UPLOAD_ID}", {"team": "search"})
    assert version.weights_sha256 == sha256(WEIGHTS)
    assert version.weight == 100
    stored = plane.sources.parent / "state" / "adapters" / version.digest / WEIGHTS_FILE
    assert stored.read_bytes() == WEIGHTS
    assert not uploads_left(plane), "its bytes are kept once"


async def test_an_upload_that_is_complete_answers_with_its_version_again(plane: Plane) -> None:
    version = await upload(plane, [header(), *chunks()])
    assert await upload(plane, [header(), *chunks()]) == version
    assert await upload(plane, [header()]) == version
    told = await query(plane)
    assert told.adapter_version == version
    assert not told.HasField("expire_time")


async def test_an_upload_goes_on_where_it_ended(plane: Plane) -> None:
    refusal = await refused_upload(plane, header(), *chunks(0, HALF))
    assert refusal.reason == "UPLOAD_INCOMPLETE"
    assert refusal.metadata == {"upload_id": UPLOAD_ID, "offset": str(HALF)}
    told = await query(plane)
    assert (told.offset, told.weights_size_bytes) == (HALF, len(WEIGHTS))
    assert told.HasField("expire_time") and not told.HasField("adapter_version")
    version = await upload(plane, [header(), *chunks(told.offset)])
    assert version.weights_sha256 == sha256(WEIGHTS)


async def test_an_upload_goes_on_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with control_plane(tmp_path, monkeypatch) as plane:
        await refused_upload(plane, header(), *chunks(0, HALF))
    async with control_plane(tmp_path, monkeypatch) as plane:
        assert (await query(plane)).offset == HALF
        assert (await upload(plane, [header(), *chunks(HALF)])).version == 1


async def test_what_a_caller_sent_before_it_vanished_is_kept(plane: Plane) -> None:
    call = plane.stub.UploadAdapterVersion()
    for message in (header(), *chunks(0, HALF)):
        await call.write(message)
    async with asyncio.timeout(TIMEOUT_S):
        while not any((path / WEIGHTS_FILE).stat().st_size == HALF for path in uploads_left(plane)):
            await asyncio.sleep(0.01)
        call.cancel()
        while (await query(plane)).offset < HALF:
            await asyncio.sleep(0.01)
    assert (await upload(plane, [header(), *chunks(HALF)])).state == pb.VERSION_STATE_READY


async def test_without_wait_it_answers_while_it_is_validated(plane: Plane) -> None:
    plane.shard.may_load.clear()
    version = await upload(plane, [header(wait=False), *chunks()])
    assert version.state == pb.VERSION_STATE_VALIDATING
    plane.shard.may_load.set()
    await plane.until("sql", 1, pb.VERSION_STATE_READY)


async def test_an_upload_that_is_no_adapter_is_refused_with_findings(plane: Plane) -> None:
    bad = header(adapter_config=config_of("x", findings=["rank 512 is too high"]))
    refusal = await refused_upload(plane, bad, *chunks())
    assert refusal.reason == "ADAPTER_INVALID"
    assert refusal.metadata == {"adapter": "sql", "version": "1"}
    assert "rank 512 is too high" in refusal.message
    assert not uploads_left(plane)
    assert (await query(plane)).adapter_version.state == pb.VERSION_STATE_FAILED


# --- what goes wrong ---------------------------------------------------------


@pytest.mark.parametrize("offset", [HALF + 1, HALF - 1, 0])
async def test_a_chunk_that_does_not_begin_where_the_upload_stands(
    offset: int, plane: Plane
) -> None:
    refusal = await refused_upload(plane, header(), *chunks(0, HALF), chunk(offset, b"x"))
    assert refusal.reason == "UPLOAD_OFFSET_MISMATCH"
    assert refusal.metadata == {"upload_id": UPLOAD_ID, "offset": str(HALF)}
    assert (await query(plane)).offset == HALF, "what came before is kept"


async def test_more_than_was_announced(plane: Plane) -> None:
    refusal = await refused_upload(plane, header(), *chunks(), chunk(len(WEIGHTS), b"x"))
    assert (refusal.reason, refusal.fields) == ("INVALID_FIELD", ["chunk"])
    assert (await upload(plane, [header()])).state == pb.VERSION_STATE_READY, "the rest is right"


async def test_other_bytes_than_were_announced(plane: Plane) -> None:
    wrong = header(weights_sha256="0" * 64)
    refusal = await refused_upload(plane, wrong, *chunks())
    assert refusal.reason == "CHECKSUM_MISMATCH"
    assert refusal.metadata == {"expected_sha256": "0" * 64, "actual_sha256": sha256(WEIGHTS)}
    assert (await refused(query(plane))).reason == "UPLOAD_NOT_FOUND"
    assert not uploads_left(plane)


async def test_an_id_that_was_used_for_something_else(plane: Plane) -> None:
    await refused_upload(plane, header(), *chunks(0, HALF))
    for other in (header(adapter="other"), header(adapter_config=b"{}"), header(no_traffic=True)):
        refusal = await refused_upload(plane, other, *chunks(HALF))
        assert refusal.reason == "REQUEST_ID_REUSED"
        assert refusal.metadata == {"request_id": UPLOAD_ID}
    await upload(plane, [header(), *chunks(HALF)])
    refusal = await refused_upload(plane, header(adapter="other"))
    assert refusal.reason == "REQUEST_ID_REUSED", "also once it is a version"


async def test_two_calls_cannot_write_to_one_upload(plane: Plane) -> None:
    first = plane.stub.UploadAdapterVersion()
    for message in (header(), chunk(0, WEIGHTS[:CHUNK_BYTES])):
        await first.write(message)
    async with asyncio.timeout(TIMEOUT_S):
        while not uploads_left(plane):
            await asyncio.sleep(0.01)
    refusal = await refused_upload(plane, header(), *chunks())
    assert refusal.reason == "UPLOAD_OFFSET_MISMATCH"
    for message in chunks(CHUNK_BYTES):
        await first.write(message)
    await first.done_writing()
    assert (await first).adapter_version.state == pb.VERSION_STATE_READY


@pytest.mark.parametrize("full", [errno.ENOSPC, errno.EDQUOT])
async def test_a_full_disk_is_said_and_what_was_synced_is_kept(
    full: int, plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    await refused_upload(plane, header(), *chunks(0, HALF))

    def no_room(*arguments: object) -> int:
        raise OSError(full, os.strerror(full))

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", no_room)
        refusal = await refused_upload(plane, header(), *chunks(HALF))
    assert refusal.reason == "STORAGE_FULL"
    assert (await upload(plane, [header(), *chunks(HALF)])).state == pb.VERSION_STATE_READY


async def test_an_upload_that_says_nothing_is_given_up_and_kept(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_stream, "UPLOAD_IDLE_S", 0.2)
    call = plane.stub.UploadAdapterVersion()
    for message in (header(), *chunks(0, HALF)):
        await call.write(message)
    refusal = await refused(call)
    assert (refusal.reason, refusal.fields) == ("INVALID_FIELD", ["chunk"])
    assert "nothing came for 0.2 s" in refusal.message
    assert (await query(plane)).offset == HALF


@pytest.mark.parametrize(
    ("messages", "fields"),
    [
        ([], ["header"]),
        ([Message()], ["header"]),
        ([chunk(0, b"x")], ["header"]),
        ([header(), header()], ["chunk"]),
        ([header(), Message()], ["chunk"]),
        ([header(), chunk(0, b"")], ["chunk.data"]),
        ([header(), chunk(0, bytes(4 * 1024**2 + 1))], ["chunk.data"]),
        (
            [header(upload_id="../x", adapter="", weights_sha256="")],
            ["header.adapter", "header.upload_id", "header.weights_sha256"],
        ),
    ],
    ids=[
        *("nothing", "an empty message", "a chunk first", "two headers", "an empty second"),
        *("an empty chunk", "a large chunk", "a bad header"),
    ],
)
async def test_what_is_no_upload_is_refused(
    messages: list[Message], fields: list[str], plane: Plane
) -> None:
    refusal = await refused_upload(plane, *messages)
    assert (refusal.reason, refusal.fields) == ("INVALID_FIELD", fields)


async def test_bytes_that_are_no_message_in_the_middle(plane: Plane) -> None:
    call: Any = plane.gateway.channel.stream_unary("/lora_gateway.v1.Adapters/UploadAdapterVersion")
    messages = [header().SerializeToString(), b"\xff\xff"]
    refusal = await refused(call(iter(messages), timeout=TIMEOUT_S))
    assert refusal.reason == "MALFORMED_MESSAGE"


@pytest.mark.parametrize("upload_id", ["", "../x", "u" * 64])
async def test_a_query_wants_an_upload_id(upload_id: str, plane: Plane) -> None:
    call = plane.stub.QueryUpload(pb.QueryUploadRequest(upload_id=upload_id))
    refusal = await refused(call)
    assert (refusal.reason, refusal.fields) == ("INVALID_FIELD", ["upload_id"])


async def test_a_query_for_an_upload_that_never_was(plane: Plane) -> None:
    refusal = await refused(query(plane))
    assert refusal.reason == "UPLOAD_NOT_FOUND"
    assert refusal.metadata == {"upload_id": UPLOAD_ID}


async def test_a_refusal_arrives_while_the_caller_still_sends(plane: Plane) -> None:
    """gRPC's client would put an error of its own in place of ours (gateway/wrap.py)."""
    for _ in range(5):
        messages = [header(adapter="Not A Name"), *(chunk(0, bytes(1024**2)) for _ in range(16))]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await upload(plane, messages)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
