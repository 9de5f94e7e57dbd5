"""Uploads: whole, broken off, gone on with, refused."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from lora_gateway import ErrorReason, GatewayClient, GatewayError, Unavailable
from lora_gateway._resumable_upload import CHUNK_BYTES, TRIES_WITHOUT_PROGRESS
from lora_gateway.upload import AdapterFiles
from lora_gateway.v1 import adapters_pb2 as pb
from tests.client.fake_adapters import UNAVAILABLE, FakeAdapters, refusal, served

WEIGHTS = bytes(range(256)) * (3 * CHUNK_BYTES // 256) + b"the rest"
TOTAL_BYTES = len(WEIGHTS)


@pytest.fixture
def adapters() -> FakeAdapters:
    return FakeAdapters()


@pytest.fixture
async def client(adapters: FakeAdapters) -> AsyncIterator[GatewayClient]:
    async with served(adapters) as target, GatewayClient(target) as client:
        yield client


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_bytes(b'{"r": 8}')
    (tmp_path / "adapter_model.safetensors").write_bytes(WEIGHTS)
    return tmp_path


def headers(adapters: FakeAdapters) -> list[pb.UploadHeader]:
    return [request for request in adapters.requests if isinstance(request, pb.UploadHeader)]


async def test_an_upload_sends_header_and_chunks_and_becomes_a_version(
    client: GatewayClient, adapters: FakeAdapters, folder: Path
) -> None:
    told: list[tuple[int, int]] = []
    version = await client.adapters.upload(
        folder,
        adapter="pirate",
        upload_id="mine",
        labels={"team": "search"},
        wait=True,
        no_traffic=True,
        progress=lambda sent_bytes, total_bytes: told.append((sent_bytes, total_bytes)),
    )

    assert (version.adapter, version.version) == ("pirate", 1)
    assert headers(adapters) == [
        pb.UploadHeader(
            upload_id="mine",
            adapter="pirate",
            adapter_config=b'{"r": 8}',
            weights_size_bytes=TOTAL_BYTES,
            weights_sha256=hashlib.sha256(WEIGHTS).hexdigest(),
            labels={"team": "search"},
            wait=True,
            no_traffic=True,
        )
    ]
    assert told == [
        (sent_bytes, TOTAL_BYTES)
        for sent_bytes in (0, CHUNK_BYTES, 2 * CHUNK_BYTES, 3 * CHUNK_BYTES, TOTAL_BYTES)
    ]


async def test_an_upload_that_breaks_off_goes_on_from_what_is_stored(
    client: GatewayClient, adapters: FakeAdapters, folder: Path
) -> None:
    adapters.upload_cuts.extend([(CHUNK_BYTES, UNAVAILABLE), (3 * CHUNK_BYTES, UNAVAILABLE)])
    begins: list[int] = []
    previous_bytes = TOTAL_BYTES

    def progress(sent_bytes: int, total_bytes: int) -> None:
        nonlocal previous_bytes
        if sent_bytes <= previous_bytes:
            begins.append(sent_bytes)
        previous_bytes = sent_bytes

    version = await client.adapters.upload(folder, adapter="pirate", progress=progress)
    assert version.version == 1
    assert len(headers(adapters)) == 3
    assert len({header.upload_id for header in headers(adapters)}) == 1
    assert begins == [0, CHUNK_BYTES, 3 * CHUNK_BYTES]


async def test_another_process_goes_on_with_the_upload(
    adapters: FakeAdapters, folder: Path
) -> None:
    full = refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE_FULL", "no space")
    adapters.upload_cuts.append((2 * CHUNK_BYTES, full))
    told: list[int] = []
    async with served(adapters) as target:
        async with GatewayClient(target) as client:
            with pytest.raises(GatewayError, match="no space"):
                await client.adapters.upload(folder, adapter="pirate")
        async with GatewayClient(target) as client:
            await client.adapters.upload(
                folder, adapter="pirate", progress=lambda sent_bytes, _: told.append(sent_bytes)
            )
    assert told == [2 * CHUNK_BYTES, 3 * CHUNK_BYTES, TOTAL_BYTES]


async def test_tries_that_store_nothing_further_are_bounded(
    client: GatewayClient, adapters: FakeAdapters, folder: Path
) -> None:
    adapters.upload_cuts.extend([(0, UNAVAILABLE)] * (TRIES_WITHOUT_PROGRESS + 1))
    with pytest.raises(Unavailable):
        await client.adapters.upload(folder, adapter="pirate")
    assert len(headers(adapters)) == TRIES_WITHOUT_PROGRESS


async def test_tries_that_store_more_are_not_counted(
    client: GatewayClient, adapters: FakeAdapters, folder: Path
) -> None:
    nothing, more = [(0, UNAVAILABLE)] * (TRIES_WITHOUT_PROGRESS - 2), (CHUNK_BYTES, UNAVAILABLE)
    adapters.upload_cuts.extend([*nothing, more, *nothing])
    assert (await client.adapters.upload(folder, adapter="pirate")).version == 1


async def test_an_upload_does_not_wait_beyond_its_timeout(
    client: GatewayClient, adapters: FakeAdapters, folder: Path
) -> None:
    hour = refusal(grpc.StatusCode.UNAVAILABLE, "DRAINING", "in an hour", retry_delay_s=3600)
    adapters.upload_cuts.append((0, hour))
    with pytest.raises(Unavailable, match="in an hour"):
        await client.adapters.upload(folder, adapter="pirate", timeout_s=60)
    assert len(headers(adapters)) == 1


async def test_an_upload_sent_twice_is_one_version(
    client: GatewayClient, adapters: FakeAdapters, folder: Path
) -> None:
    first = await client.adapters.upload(folder, adapter="pirate")
    told: list[int] = []
    second = await client.adapters.upload(
        folder, adapter="pirate", progress=lambda sent_bytes, _: told.append(sent_bytes)
    )
    assert first == second
    assert told == [TOTAL_BYTES]
    # The header goes out again: only the gateway can tell whether it is the same.
    assert len(headers(adapters)) == 2


async def test_another_call_that_still_holds_the_upload_is_waited_for(
    client: GatewayClient, adapters: FakeAdapters, folder: Path
) -> None:
    held = refusal(
        grpc.StatusCode.FAILED_PRECONDITION, "UPLOAD_OFFSET_MISMATCH", "another call writes"
    )
    adapters.failures.append(held)
    assert (await client.adapters.upload(folder, adapter="pirate")).version == 1


@pytest.mark.parametrize("_", range(20))
async def test_a_refusal_is_raised_at_once_even_amid_the_chunks(
    client: GatewayClient, adapters: FakeAdapters, folder: Path, _: int
) -> None:
    # Often, because a chunk that is on its way then turns it into an INTERNAL by chance.
    text = "used with other labels"
    reused = refusal(grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED", text)
    adapters.upload_cuts.append((CHUNK_BYTES, reused))
    with pytest.raises(GatewayError, match=text) as raised:
        await client.adapters.upload(folder, adapter="pirate")
    assert raised.value.reason == ErrorReason.ERROR_REASON_REQUEST_ID_REUSED


async def test_weights_that_shrink_while_they_are_sent_are_no_upload(
    client: GatewayClient, folder: Path
) -> None:
    def shrink(sent_bytes: int, total_bytes: int) -> None:
        (folder / "adapter_model.safetensors").write_bytes(WEIGHTS[:CHUNK_BYTES])

    with pytest.raises(ValueError, match="changed while it was uploaded"):
        await client.adapters.upload(folder, adapter="pirate", progress=shrink)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
async def test_a_folder_without_one_of_the_files_is_refused_unsent(
    client: GatewayClient, adapters: FakeAdapters, folder: Path, name: str
) -> None:
    (folder / name).unlink()
    with pytest.raises(ValueError, match=re.escape(name) + ".*save_pretrained"):
        await client.adapters.upload(folder, adapter="pirate")
    assert not adapters.requests


async def test_a_config_beyond_its_limit_is_refused_unsent(
    client: GatewayClient, adapters: FakeAdapters, folder: Path
) -> None:
    (folder / "adapter_config.json").write_bytes(b" " * (64 * 1024 + 1))
    with pytest.raises(ValueError, match="65536 bytes allowed"):
        await client.adapters.upload(folder, adapter="pirate")
    assert not adapters.requests


def test_the_upload_id_stands_for_name_config_and_weights(folder: Path) -> None:
    files = AdapterFiles.read(folder)
    same = files.upload_id("pirate")
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", same)
    assert AdapterFiles.read(folder).upload_id("pirate") == same
    assert files.upload_id("other") != same

    (folder / "adapter_config.json").write_bytes(b'{"r": 9}')
    assert AdapterFiles.read(folder).upload_id("pirate") != same
    (folder / "adapter_config.json").write_bytes(b'{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(b"other")
    assert AdapterFiles.read(folder).upload_id("pirate") != same
