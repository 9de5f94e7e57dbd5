"""A dataset takes all that was made of it along, and nobody stops half way."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from store.datasets import DatasetFiles
from store.job_records import DatasetExists, DatasetUnknown
from store.sqlite_jobs import SqliteJobs
from store.upload_folder import DatasetPlan
from store.uploads import DATASET_UPLOADS, UploadStore
from tests.trainer.job_stage import LINE, TENANT, served
from tests.trainer.prepared import data_spec
from trainer.datasets import Datasets
from trainer.preparation import Preparations
from trainer.prepared_folders import PreparedFolders
from trainer.rows import REPORT_FILE


class SlowFiles(DatasetFiles):
    """Removes when it is told to."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.removing, self.may_remove = threading.Event(), threading.Event()
        self.may_remove.set()

    def remove(self, sha256: str) -> None:
        self.removing.set()
        assert self.may_remove.wait(30)
        super().remove(sha256)


@dataclass
class Place:
    """Datasets on a disk."""

    root: Path
    store: SqliteJobs
    files: SlowFiles = field(init=False)
    datasets: Datasets = field(init=False)

    def __post_init__(self) -> None:
        self.files = SlowFiles(self.root)
        uploads = UploadStore(self.root, folder=DATASET_UPLOADS)
        self.datasets = Datasets(self.store, self.files, uploads, PreparedFolders(self.root))

    async def add(self, name: str, text: str = LINE, format: str = "") -> str:
        digest = hashlib.sha256(text.encode()).hexdigest()
        source = self.root / f"{name}.jsonl"
        source.write_text(text)
        await asyncio.to_thread(self.files.keep, source, digest)
        await self.store.add_dataset(
            TENANT, name, sha256=digest, size_bytes=len(text), format=format
        )
        return digest

    def prepare(self, digest: str) -> Path:
        """Rows that were made of a dataset."""
        folder = self.root / "prepared" / f"{digest}-1"
        folder.mkdir(parents=True)
        (folder / "rows.parquet").write_bytes(b"rows")
        return folder


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with SqliteJobs(tmp_path / "registry.sqlite") as store:
        yield Place(tmp_path, store)


async def test_rows_go_with_the_last_dataset_of_their_bytes(place: Place) -> None:
    digest, other = await place.add("one"), await place.add("other", LINE * 2)
    await place.add("two")
    rows, others = place.prepare(digest), place.prepare(other)
    await place.datasets.remove(TENANT, "one")
    assert rows.exists() and place.files.path(digest).exists()
    await place.datasets.remove(TENANT, "two")
    assert not rows.exists() and not place.files.path(digest).exists()
    assert others.exists() and place.files.path(other).exists()
    with pytest.raises(DatasetUnknown):
        await place.datasets.remove(TENANT, "two")


async def test_rows_of_no_dataset_go_at_the_start(place: Place) -> None:
    kept, left = place.prepare(await place.add("one")), place.prepare("e" * 64)
    await place.datasets.open()
    assert kept.exists() and not left.exists()


async def test_who_gives_up_on_a_removal_leaves_nothing_half_removed(place: Place) -> None:
    rows = place.prepare(digest := await place.add("one"))
    place.files.may_remove.clear()
    removal = asyncio.create_task(place.datasets.remove(TENANT, "one"))
    await asyncio.to_thread(place.files.removing.wait, 30)
    for _ in range(2):
        removal.cancel()
        await asyncio.sleep(0.01)
    assert not removal.done()
    place.files.may_remove.set()
    await asyncio.wait({removal})
    assert removal.cancelled()
    assert not rows.exists() and not place.files.path(digest).exists()


async def test_a_removal_looks_at_the_dataset_when_its_turn_comes(place: Place) -> None:
    old = await place.add("one")
    async with place.datasets._changing:
        removal = asyncio.create_task(place.datasets.remove(TENANT, "one"))
        await asyncio.sleep(0.05)
        await place.store.remove_dataset(TENANT, "one")
        new = await place.add("one", LINE * 3)
    await removal
    assert not place.files.path(new).exists()
    assert place.files.path(old).exists(), "somebody else's to remove"


@pytest.mark.parametrize(("format", "fits"), [("chat", True), ("", True), ("alpaca", False)])
async def test_the_same_bytes_are_the_same_dataset_unless_another_format_is_asked_for(
    place: Place, format: str, fits: bool
) -> None:
    digest = await place.add("one", format="chat")
    plan = DatasetPlan("up", "one", len(LINE), digest, format)
    if fits:
        found = await place.datasets.expected(TENANT, plan)
        assert found is not None and found.format == "chat"
    else:
        with pytest.raises(DatasetExists, match="another format"):
            await place.datasets.expected(TENANT, plan)


@pytest.mark.parametrize("kept", [False, True], ids=["the last", "one of two"])
async def test_rows_that_are_being_made_go_with_the_last_dataset_of_their_bytes(
    place: Place, kept: bool
) -> None:
    reader = place.root / "reader"
    reader.write_text(
        f"#!/bin/sh\nwhile [ ! -e {place.root}/go ]; do sleep 0.02; done\n"
        f"echo '{{\"valid\": false}}' > $3/{REPORT_FILE}\n"
    )
    reader.chmod(0o700)
    digest = await place.add("one")
    if kept:
        await place.add("two")
    preparations = Preparations(
        place.root, served(place.root), {}, python=str(reader), digests=place.store.dataset_digests
    )
    record = await place.store.dataset(TENANT, "one")
    asked = asyncio.create_task(preparations.prepare(record, place.files.path(digest), data_spec()))
    async with asyncio.timeout(30):
        while not list(place.root.glob("prepared/*.partial-*")):
            await asyncio.sleep(0.02)
    await place.datasets.remove(TENANT, "one")
    (place.root / "go").touch()
    found = await asked
    assert not found.report.valid, "who asked is answered"
    assert found.folder.exists() == kept
    assert len(list(place.root.glob("prepared/*"))) == kept
    await preparations.close()


async def test_rows_stay_where_it_cannot_be_told_whether_they_are_wanted(place: Place) -> None:
    async def broken() -> set[str]:
        raise OSError("no disk")

    reader = place.root / "reader"
    reader.write_text(f"#!/bin/sh\necho '{{\"valid\": false}}' > $3/{REPORT_FILE}\n")
    reader.chmod(0o700)
    digest = await place.add("one")
    preparations = Preparations(
        place.root, served(place.root), {}, python=str(reader), digests=broken
    )
    record = await place.store.dataset(TENANT, "one")
    found = await preparations.prepare(record, place.files.path(digest), data_spec())
    assert found.folder.exists(), "the next start removes it if need be"
    await preparations.close()
