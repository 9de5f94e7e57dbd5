"""An upload goes on where it surely is, whatever ended the call or the machine before."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store import upload
from store.artifacts import WEIGHTS_FILE
from store.upload_folder import PROGRESS_FILE
from store.uploads import (
    ChecksumMismatch,
    StorageFull,
    UploadIncomplete,
    UploadOffsetMismatch,
    UploadStatus,
    UploadStore,
    UploadTooLong,
)
from tests.store.upload_plan import PLAN, TENANT, WEIGHTS, folder, offset, send, send_all


@pytest.fixture
def store(tmp_path: Path) -> UploadStore:
    return UploadStore(tmp_path)


def test_an_upload_goes_on_where_it_was_left(store: UploadStore, tmp_path: Path) -> None:
    send(store, 0, 3000)
    later = UploadStore(tmp_path)
    assert later.find(TENANT, PLAN.upload_id).offset == 3000
    with later.open(TENANT, PLAN) as opened:
        assert opened.offset == 3000
        opened.write(3000, WEIGHTS[3000:])
        assert (opened.finish() / WEIGHTS_FILE).read_bytes() == WEIGHTS


def test_only_what_is_synced_is_told(store: UploadStore) -> None:
    with store.open(TENANT, PLAN) as opened:
        opened.write(0, WEIGHTS[:1000])
        assert (opened.offset, offset(store)) == (1000, 0)
        opened.sync()
        assert offset(store) == 1000


def test_it_syncs_by_itself(store: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "SYNC_EVERY_BYTES", 1000)
    with store.open(TENANT, PLAN) as opened:
        told = []
        for begin in range(0, 2500, 500):
            opened.write(begin, WEIGHTS[begin : begin + 500])
            told.append(offset(store))
    assert told == [0, 1000, 1000, 2000, 2000]


def test_bytes_are_synced_before_they_are_counted(
    store: UploadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    fdatasync, rename = os.fdatasync, Path.rename

    def record_sync(descriptor: int) -> None:
        order.append("weights")
        fdatasync(descriptor)

    def record_rename(path: Path, target: Path) -> Path:
        order.append(target.name)
        return rename(path, target)

    with store.open(TENANT, PLAN) as opened:
        opened.write(0, WEIGHTS)
        monkeypatch.setattr(os, "fdatasync", record_sync)
        monkeypatch.setattr(Path, "rename", record_rename)
        opened.sync()
    assert order == ["weights", PROGRESS_FILE]


def power_cut(path: Path, tail: bytes) -> None:
    """What was synced stays; above it is anything."""
    synced_bytes = UploadStore(path).find(TENANT, PLAN.upload_id).offset
    with (folder(path) / WEIGHTS_FILE).open("r+b") as file:
        file.truncate(synced_bytes)
        file.seek(synced_bytes)
        file.write(tail)


Step = tuple[str, int]
STEPS = st.lists(
    st.tuples(st.sampled_from(["write", "sync", "leave", "cut"]), st.integers(1, 4000)),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_no_power_cut_changes_what_arrives(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Step]
) -> None:
    root = tmp_path_factory.mktemp("root")
    store = UploadStore(root)
    opened = store.open(TENANT, PLAN)
    for step, size in steps:
        match step:
            case "write":
                opened.write(opened.offset, WEIGHTS[opened.offset : opened.offset + size])
            case "sync":
                opened.sync()
            case "leave":
                opened.close()
                opened = store.open(TENANT, PLAN)
            case "cut":
                told = offset(store)
                os.close(opened._descriptor)  # without the sync of a close
                power_cut(root, b"\xff" * size)
                store = UploadStore(root)
                opened = store.open(TENANT, PLAN)
                assert opened.offset == told
    opened.write(opened.offset, WEIGHTS[opened.offset :])
    assert (opened.finish() / WEIGHTS_FILE).read_bytes() == WEIGHTS
    shutil.rmtree(root)


def test_garbage_beyond_the_end_is_cut_off(store: UploadStore, tmp_path: Path) -> None:
    send(store, 0, 3000)
    power_cut(tmp_path, b"\xff" * len(WEIGHTS))
    later = UploadStore(tmp_path)
    assert (send_all(later) / WEIGHTS_FILE).read_bytes() == WEIGHTS


KILLED = """
import os, signal, sys
from pathlib import Path
from store.uploads import UploadPlan, UploadStore
plan = UploadPlan("Night-run.1", "sql", b"{}", 10_000, "0" * 64)
opened = UploadStore(Path(sys.argv[1])).open("acme", plan)
opened.write(0, b"a" * 4000)
opened.sync()
opened.write(4000, b"b" * 4000)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_loses_only_what_was_not_synced(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert UploadStore(tmp_path).find("acme", "Night-run.1").offset == 4000


def test_a_disk_that_lost_what_it_had_promised_is_believed(
    store: UploadStore, tmp_path: Path
) -> None:
    send(store, 0, 3000)
    os.truncate(folder(tmp_path) / WEIGHTS_FILE, 1000)
    send(store, 1000, 2000)
    assert offset(store) == 2000


def test_a_chunk_must_begin_where_the_upload_stands(store: UploadStore) -> None:
    with store.open(TENANT, PLAN) as opened:
        opened.write(0, WEIGHTS[:1000])
        for wrong in (0, 999, 1001):
            with pytest.raises(UploadOffsetMismatch, match="stands at offset 1000") as caught:
                opened.write(wrong, b"x")
            assert (caught.value.upload_id, caught.value.expected) == (PLAN.upload_id, 1000)
        opened.write(1000, WEIGHTS[1000:])
        opened.finish()


def test_more_than_was_announced_is_refused(store: UploadStore) -> None:
    with store.open(TENANT, PLAN) as opened:
        with pytest.raises(UploadTooLong, match="announced with 10240 bytes"):
            opened.write(0, WEIGHTS + b"x")
        assert opened.offset == 0


def test_what_is_missing_can_still_be_sent(store: UploadStore) -> None:
    with (
        store.open(TENANT, PLAN) as opened,
        pytest.raises(UploadIncomplete, match="ends at offset 1000") as caught,
    ):
        opened.write(0, WEIGHTS[:1000])
        opened.finish()
    assert caught.value.offset == 1000
    with pytest.raises(UploadIncomplete):
        store.path(TENANT, PLAN.upload_id)
    send_all(store)


@pytest.mark.parametrize("resumed", [False, True])
def test_other_bytes_are_dropped(store: UploadStore, tmp_path: Path, resumed: bool) -> None:
    spoiled = b"x" + WEIGHTS[1:]
    opened = store.open(TENANT, PLAN)
    opened.write(0, spoiled[:5000])
    if resumed:
        opened.close()
        opened = store.open(TENANT, PLAN)
    opened.write(5000, spoiled[5000:])
    with pytest.raises(ChecksumMismatch, match="send them again from offset 0") as caught:
        opened.finish()
    assert caught.value.expected == PLAN.weights_sha256
    assert caught.value.actual == hashlib.sha256(spoiled).hexdigest()
    assert not folder(tmp_path).exists()
    send_all(store)


def test_a_finished_upload_answers_again(store: UploadStore, tmp_path: Path) -> None:
    path = send_all(store)
    later = UploadStore(tmp_path)
    assert later.find(TENANT, PLAN.upload_id) == UploadStatus(
        len(WEIGHTS), len(WEIGHTS), complete=True, expire_time_s=None
    )
    with later.open(TENANT, PLAN) as opened:
        assert opened.offset == len(WEIGHTS)
        assert opened.finish() == path


def fail_pwrite(number: int) -> Callable[..., int]:
    def fail(descriptor: int, data: bytes, position: int) -> int:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.ENOSPC, StorageFull), (errno.EDQUOT, StorageFull), (errno.EIO, OSError)],
)
def test_a_disk_that_takes_no_more_keeps_what_is_safe(
    store: UploadStore,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    expected: type[Exception],
) -> None:
    with store.open(TENANT, PLAN) as opened:
        opened.write(0, WEIGHTS[:1000])
        opened.sync()
        opened.write(1000, WEIGHTS[1000:2000])
        with monkeypatch.context() as patch, pytest.raises(expected):
            patch.setattr(os, "pwrite", fail_pwrite(number))
            opened.write(2000, WEIGHTS[2000:])
        assert opened.offset == offset(store) == 1000
        opened.write(1000, WEIGHTS[1000:])
        assert (opened.finish() / WEIGHTS_FILE).read_bytes() == WEIGHTS


def test_a_sync_that_fails_makes_its_bytes_be_sent_again(
    store: UploadStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    opened = store.open(TENANT, PLAN)
    opened.write(0, WEIGHTS[:1000])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(OSError, match="Input/output"):
            opened.sync()
    assert opened.offset == 0
    assert (folder(tmp_path) / WEIGHTS_FILE).stat().st_size == 0
    opened.write(0, WEIGHTS)
    opened.finish()
