"""A dataset is uploaded as an adapter is, in a folder of its own, and becomes a file for good."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from store.datasets import DatasetFiles
from store.upload_folder import PLAN_FILE, PROGRESS_FILE
from store.uploads import (
    DATASET_UPLOADS,
    ChecksumMismatch,
    DatasetPlan,
    StorageFull,
    UploadIdReused,
    UploadIncomplete,
    UploadStatus,
    UploadStore,
    UploadTooLong,
    UploadUnknown,
)
from tests.store import upload_plan

ROWS = b'{"prompt": "a", "completion": "b"}\n' * 200
PLAN = DatasetPlan(
    upload_id="Night-run.1",
    dataset="corpus",
    size_bytes=len(ROWS),
    sha256=hashlib.sha256(ROWS).hexdigest(),
    format="prompt_completion",
)
TENANT = "acme"


@pytest.fixture
def store(tmp_path: Path) -> UploadStore:
    return UploadStore(tmp_path, folder=DATASET_UPLOADS)


def send(store: UploadStore, begin: int, end: int) -> None:
    with store.open(TENANT, PLAN) as opened:
        opened.write(begin, ROWS[begin:end])


def send_all(store: UploadStore) -> Path:
    with store.open(TENANT, PLAN) as opened:
        opened.write(opened.offset, ROWS[opened.offset :])
        opened.finish()
    return store.file(TENANT, PLAN.upload_id)


def test_it_goes_on_where_it_was_left(store: UploadStore, tmp_path: Path) -> None:
    send(store, 0, 3000)
    later = UploadStore(tmp_path, folder=DATASET_UPLOADS)
    assert later.find(TENANT, PLAN.upload_id).offset == 3000
    with pytest.raises(UploadIncomplete, match="ends at offset 3000"):
        later.file(TENANT, PLAN.upload_id)
    assert send_all(later).read_bytes() == ROWS
    assert later.find(TENANT, PLAN.upload_id) == UploadStatus(
        len(ROWS), len(ROWS), complete=True, expire_time_s=None
    )


KILLED = """
import os, signal, sys
from pathlib import Path
from store.uploads import DATASET_UPLOADS, DatasetPlan, UploadStore
plan = DatasetPlan("Night-run.1", "corpus", 10_000, "0" * 64)
opened = UploadStore(Path(sys.argv[1]), folder=DATASET_UPLOADS).open("acme", plan)
opened.write(0, b"a" * 4000)
opened.sync()
opened.write(4000, b"b" * 4000)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_loses_only_what_was_not_synced(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    store = UploadStore(tmp_path, folder=DATASET_UPLOADS)
    assert store.find(TENANT, PLAN.upload_id).offset == 4000


@pytest.mark.parametrize(
    "change",
    [{"dataset": "other"}, {"size_bytes": 1}, {"sha256": "1" * 64}, {"format": ""}],
)
def test_an_id_stands_for_one_header(store: UploadStore, change: dict[str, object]) -> None:
    send(store, 0, 1000)
    with pytest.raises(UploadIdReused, match="take a new one"):
        store.open(TENANT, replace(PLAN, **change))  # type: ignore[arg-type]
    assert store.find(TENANT, PLAN.upload_id).offset == 1000


def test_other_bytes_are_dropped(store: UploadStore) -> None:
    with store.open(TENANT, PLAN) as opened, pytest.raises(ChecksumMismatch):
        opened.write(0, ROWS[:-1] + b"x")
        opened.finish()
    with pytest.raises(UploadUnknown):
        store.file(TENANT, PLAN.upload_id)
    send_all(store)


def test_more_than_was_announced_is_refused(store: UploadStore) -> None:
    with store.open(TENANT, PLAN) as opened, pytest.raises(UploadTooLong, match="7000 bytes"):
        opened.write(0, ROWS + b"x")


def test_adapters_and_datasets_are_kept_apart(store: UploadStore, tmp_path: Path) -> None:
    adapters = UploadStore(tmp_path, max_open=1, max_bytes_total=len(upload_plan.WEIGHTS))
    upload_plan.send_all(adapters)
    send_all(store)
    assert adapters.complete() == store.complete() == [(TENANT, PLAN.upload_id, False)]
    store.drop(TENANT, PLAN.upload_id)
    assert adapters.find(TENANT, PLAN.upload_id).complete
    with pytest.raises(StorageFull):
        adapters.open(TENANT, replace(upload_plan.PLAN, upload_id="another"))
    send(store, 0, 1000)


def test_a_complete_upload_becomes_a_file_for_good(store: UploadStore, tmp_path: Path) -> None:
    files = DatasetFiles(tmp_path)
    kept = files.keep(send_all(store), PLAN.sha256)
    # The call that sent it broke off before the answer, and is made again.
    with store.open(TENANT, PLAN) as opened:
        access = fcntl.fcntl(opened._descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        assert access == os.O_RDONLY  # a file that is shared is never opened to be written to
        assert opened.offset == len(ROWS)
        with pytest.raises(UploadTooLong):
            opened.write(opened.offset, b"x")
        opened.finish()
    assert files.keep(store.file(TENANT, PLAN.upload_id), PLAN.sha256) == kept
    store.drop(TENANT, PLAN.upload_id)
    assert kept.read_bytes() == ROWS


@pytest.mark.parametrize("size_bytes", [len(ROWS) - 9, len(ROWS) + 9])
def test_a_complete_upload_that_the_disk_changed_is_checked_again(
    store: UploadStore, size_bytes: int
) -> None:
    os.truncate(send_all(store), size_bytes)
    with store.open(TENANT, PLAN) as opened:
        assert opened.offset == min(size_bytes, len(ROWS))
    assert not store.find(TENANT, PLAN.upload_id).complete
    assert send_all(store).read_bytes() == ROWS


def test_what_nobody_goes_on_with_expires(tmp_path: Path) -> None:
    now_s = 1_000.0
    store = UploadStore(tmp_path, folder=DATASET_UPLOADS, ttl_s=100.0, clock=lambda: now_s)
    send(store, 0, 1000)
    now_s = 1_100.0
    assert store.sweep() == [(TENANT, PLAN.upload_id)]
    send_all(store)
    now_s = 1_300.0
    assert store.sweep() == []
    assert store.complete() == [(TENANT, PLAN.upload_id, True)]


def test_an_adapters_upload_of_the_last_release_goes_on(tmp_path: Path) -> None:
    """As it wrote them."""
    folder = tmp_path / "uploads" / "acme" / "Night-run.1"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_bytes(b'{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(upload_plan.WEIGHTS[:3000])
    progress = {"synced_bytes": 3000, "complete": False, "time_s": 4e9}
    (folder / PROGRESS_FILE).write_text(json.dumps(progress))
    (folder / PLAN_FILE).write_text(
        '{"upload_id": "Night-run.1", "adapter": "sql", "weights_size_bytes": 10240, '
        f'"weights_sha256": "{upload_plan.PLAN.weights_sha256}", '
        '"labels": {"team": "search"}, "take_traffic": true, '
        f'"fingerprints": {{"config_sha256": "{"0" * 64}"}}}}'
    )
    store = UploadStore(tmp_path)
    assert upload_plan.offset(store) == 3000
    path = upload_plan.send_all(store)
    assert (path / "adapter_model.safetensors").read_bytes() == upload_plan.WEIGHTS
    assert store.file("acme", "Night-run.1") == path / "adapter_model.safetensors"
