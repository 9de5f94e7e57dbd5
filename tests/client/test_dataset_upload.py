"""Uploads of datasets: whole, broken off, gone on with, sent twice, refused."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from lora_gateway import DatasetFormat, ErrorReason, GatewayClient, GatewayError, Unavailable
from lora_gateway._resumable_upload import CHUNK_BYTES, TRIES_WITHOUT_PROGRESS
from lora_gateway.dataset_upload import DatasetFile
from lora_gateway.v1 import training_pb2 as pb
from tests.client.fake_adapters import UNAVAILABLE, refusal
from tests.client.fake_training import FakeTraining, served

CONTENT = b'{"prompt": "a", "completion": "b"}\n' * (3 * CHUNK_BYTES // 35) + b"\n" * 100
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
"""Of a dataset, as the contract has it."""


@pytest.fixture
def training() -> FakeTraining:
    return FakeTraining()


@pytest.fixture
async def client(training: FakeTraining) -> AsyncIterator[GatewayClient]:
    async with served(training) as target, GatewayClient(target) as client:
        yield client


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "Support Team.jsonl"
    path.write_bytes(CONTENT)
    return path


def headers(training: FakeTraining) -> list[pb.DatasetHeader]:
    return [request for request in training.requests if isinstance(request, pb.DatasetHeader)]


async def test_an_upload_sends_header_and_chunks_and_becomes_a_dataset(
    client: GatewayClient, training: FakeTraining, file: Path
) -> None:
    told: list[tuple[int, int]] = []
    dataset = await client.training.upload_dataset(
        file,
        dataset="mine",
        format=DatasetFormat.DATASET_FORMAT_PROMPT_COMPLETION,
        upload_id="once",
        progress=lambda sent_bytes, total_bytes: told.append((sent_bytes, total_bytes)),
    )
    assert (dataset.name, dataset.sha256) == ("mine", SHA256)
    assert training.content["mine"] == CONTENT
    assert headers(training) == [
        pb.DatasetHeader(
            upload_id="once",
            dataset="mine",
            size_bytes=len(CONTENT),
            sha256=SHA256,
            format=DatasetFormat.DATASET_FORMAT_PROMPT_COMPLETION,
        )
    ]
    sent = [0, CHUNK_BYTES, 2 * CHUNK_BYTES, 3 * CHUNK_BYTES, len(CONTENT)]
    assert told == [(sent_bytes, len(CONTENT)) for sent_bytes in sent]


async def test_bytes_are_uploaded_as_a_file_is(
    client: GatewayClient, training: FakeTraining
) -> None:
    dataset = await client.training.upload_dataset(CONTENT)
    assert dataset.name == f"dataset-{SHA256[:8]}"
    assert training.content[dataset.name] == CONTENT


async def test_an_upload_that_breaks_off_goes_on_from_what_is_stored(
    client: GatewayClient, training: FakeTraining, file: Path
) -> None:
    training.upload_cuts.extend([(CHUNK_BYTES, UNAVAILABLE), (2 * CHUNK_BYTES, UNAVAILABLE)])
    begins: list[int] = []
    previous_bytes = len(CONTENT)

    def progress(sent_bytes: int, total_bytes: int) -> None:
        nonlocal previous_bytes
        if sent_bytes <= previous_bytes:
            begins.append(sent_bytes)
        previous_bytes = sent_bytes

    dataset = await client.training.upload_dataset(file, progress=progress)
    assert training.content[dataset.name] == CONTENT
    assert begins == [0, CHUNK_BYTES, 2 * CHUNK_BYTES]
    assert len({header.upload_id for header in headers(training)}) == 1


async def test_another_process_goes_on_with_the_upload(training: FakeTraining, file: Path) -> None:
    full = refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE_FULL", "no space")
    training.upload_cuts.append((2 * CHUNK_BYTES, full))
    told: list[int] = []
    async with served(training) as target:
        async with GatewayClient(target) as client:
            with pytest.raises(GatewayError, match="no space"):
                await client.training.upload_dataset(file)
        async with GatewayClient(target) as client:
            await client.training.upload_dataset(
                file, progress=lambda sent_bytes, _: told.append(sent_bytes)
            )
    assert told == [2 * CHUNK_BYTES, 3 * CHUNK_BYTES, len(CONTENT)]


async def test_tries_that_store_nothing_further_are_bounded(
    client: GatewayClient, training: FakeTraining, file: Path
) -> None:
    training.upload_cuts.extend([(0, UNAVAILABLE)] * (TRIES_WITHOUT_PROGRESS + 1))
    with pytest.raises(Unavailable):
        await client.training.upload_dataset(file)
    assert len(headers(training)) == TRIES_WITHOUT_PROGRESS


@pytest.mark.parametrize("_", range(10))
async def test_the_same_bytes_again_are_answered_at_once_even_amid_the_chunks(
    client: GatewayClient, training: FakeTraining, file: Path, _: int
) -> None:
    # Often, because it depends on chance how far the chunks come before the answer.
    first = await client.training.upload_dataset(file)
    assert await client.training.upload_dataset(file) == first
    assert len(training.datasets) == 1


async def test_other_bytes_under_the_same_name_are_refused(
    client: GatewayClient, training: FakeTraining, file: Path
) -> None:
    training.add_dataset("mine", b"other")
    with pytest.raises(GatewayError, match="take another name") as raised:
        await client.training.upload_dataset(file, dataset="mine")
    assert raised.value.reason == ErrorReason.ERROR_REASON_DATASET_EXISTS
    assert training.content["mine"] == b"other"


async def test_an_empty_or_missing_file_is_refused_unsent(
    client: GatewayClient, training: FakeTraining, tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl is empty"):
        await client.training.upload_dataset(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match=r"missing\.jsonl cannot be read"):
        await client.training.upload_dataset(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="is empty"):
        await client.training.upload_dataset(b"")
    assert not training.requests


async def test_a_file_that_shrinks_while_it_is_sent_is_no_dataset(
    client: GatewayClient, training: FakeTraining, file: Path
) -> None:
    def shrink(sent_bytes: int, total_bytes: int) -> None:
        file.write_bytes(CONTENT[:CHUNK_BYTES])

    with pytest.raises(ValueError, match="changed while it was uploaded"):
        await client.training.upload_dataset(file, progress=shrink)
    assert not training.datasets


async def test_a_file_that_grows_while_it_is_sent_is_sent_as_it_was(
    client: GatewayClient, training: FakeTraining, file: Path
) -> None:
    def grow(sent_bytes: int, total_bytes: int) -> None:
        if not sent_bytes:
            file.write_bytes(CONTENT + b"more")

    dataset = await client.training.upload_dataset(file, progress=grow)
    assert training.content[dataset.name] == CONTENT


@pytest.mark.parametrize(
    ("stem", "begin"),
    [
        ("support", "support-"),
        ("Support Team", "support-team-"),
        ("..hidden", "hidden-"),
        ("été", "t-"),
        ("数据", "dataset-"),
        ("x" * 200, "x" * 54 + "-"),
    ],
)
def test_a_name_is_made_of_stem_and_digest(tmp_path: Path, stem: str, begin: str) -> None:
    path = tmp_path / f"{stem}.jsonl"
    path.write_bytes(CONTENT)
    name = DatasetFile.read(path).name()
    assert name == begin + SHA256[:8]
    assert NAME.fullmatch(name)


def test_the_upload_id_stands_for_name_content_and_format(file: Path) -> None:
    def upload_id(dataset: str, format: DatasetFormat.ValueType) -> str:
        read = DatasetFile.read(file)
        return read.header(dataset=dataset, format=format, upload_id=None).upload_id

    chat, alpaca = DatasetFormat.DATASET_FORMAT_CHAT, DatasetFormat.DATASET_FORMAT_ALPACA
    same = upload_id("mine", chat)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", same)
    assert upload_id("mine", chat) == same
    assert upload_id("other", chat) != same
    assert upload_id("mine", alpaca) != same
    file.write_bytes(b"other")
    assert upload_id("mine", chat) != same
