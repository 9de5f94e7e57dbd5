"""Uploads are kept apart, bounded, and dropped when nobody goes on with them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from store.artifacts import CONFIG_FILE, WEIGHTS_FILE, ArtifactStore
from store.upload_folder import PLAN_FILE, PROGRESS_FILE
from store.uploads import StorageFull, UploadBusy, UploadIdReused, UploadStore, UploadUnknown
from tests.store.upload_plan import PLAN, TENANT, WEIGHTS, folder, offset, send, send_all

Spoil = Callable[[Path], object]
SPOILED: dict[str, Spoil] = {
    "text": lambda path: (path / PLAN_FILE).write_text("{"),
    "list": lambda path: (path / PROGRESS_FILE).write_text("[]"),
    "fields": lambda path: (path / PLAN_FILE).write_text('{"unknown": 1}'),
    "missing": lambda path: (path / PLAN_FILE).unlink(),
}
"""Upload id to what breaks it."""


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.time_s = 1_000_000.0

    def __call__(self) -> float:
        return self.time_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> UploadStore:
    return UploadStore(tmp_path, ttl_s=100.0, clock=clock)


def test_a_finished_upload_is_a_folder_that_can_be_staged(
    store: UploadStore, tmp_path: Path
) -> None:
    path = send_all(store)
    assert store.path(TENANT, PLAN.upload_id) == path == folder(tmp_path)
    with ArtifactStore(tmp_path).stage(path) as staged:
        assert (staged.path / CONFIG_FILE).read_bytes() == PLAN.adapter_config
        assert (staged.path / WEIGHTS_FILE).read_bytes() == WEIGHTS
        assert staged.weights_sha256 == PLAN.weights_sha256


@pytest.mark.parametrize(
    "change",
    [
        {"adapter": "other"},
        {"adapter_config": b"{}"},
        {"weights_size_bytes": 1},
        {"weights_sha256": "1" * 64},
        {"labels": {}},
        {"take_traffic": False},
        {"fingerprints": {}},
    ],
)
def test_an_id_stands_for_one_header(store: UploadStore, change: dict[str, object]) -> None:
    send(store, 0, 1000)
    with pytest.raises(UploadIdReused, match="take a new one"):
        store.open(TENANT, replace(PLAN, **change))  # type: ignore[arg-type]
    assert offset(store) == 1000
    send_all(store)


def test_one_call_at_a_time_has_an_upload(store: UploadStore) -> None:
    with store.open(TENANT, PLAN):
        with pytest.raises(UploadBusy):
            store.open(TENANT, PLAN)
        with pytest.raises(UploadBusy):
            store.drop(TENANT, PLAN.upload_id)
        with store.open("other", PLAN):  # another tenant's is another upload
            pass
    with store.open(TENANT, PLAN):
        pass


def test_a_dropped_upload_is_gone(store: UploadStore, tmp_path: Path) -> None:
    send(store, 0, 1000)
    store.drop(TENANT, PLAN.upload_id)
    store.drop(TENANT, PLAN.upload_id)
    for lookup in (store.find, store.path):
        with pytest.raises(UploadUnknown, match="begin at offset 0"):
            lookup(TENANT, PLAN.upload_id)
    assert list((tmp_path / "uploads" / ".scratch").iterdir()) == []


def test_what_nobody_goes_on_with_expires(store: UploadStore, clock: Clock) -> None:
    send(store, 0, 1000)
    assert store.find(TENANT, PLAN.upload_id).expire_time_s == clock.time_s + 100.0
    clock.time_s += 99.0
    assert store.sweep() == []
    send(store, 1000, 2000)
    clock.time_s += 99.0
    assert store.sweep() == []
    clock.time_s += 1.0
    assert store.sweep() == [(TENANT, PLAN.upload_id)]
    with pytest.raises(UploadUnknown):
        store.find(TENANT, PLAN.upload_id)


def test_what_is_complete_or_being_written_to_does_not_expire(
    store: UploadStore, clock: Clock
) -> None:
    send_all(store)
    with store.open("other", PLAN):
        clock.time_s += 1000.0
        assert store.sweep() == []


def test_a_start_drops_what_expired_what_is_damaged_and_what_was_never_made(
    store: UploadStore, tmp_path: Path, clock: Clock
) -> None:
    for upload_id, spoil in SPOILED.items():
        store.open(TENANT, replace(PLAN, upload_id=upload_id)).close()
        spoil(folder(tmp_path).parent / upload_id)
    (tmp_path / "uploads" / ".scratch" / "half").mkdir()
    send(store, 0, 1000)
    UploadStore(tmp_path, ttl_s=100.0, clock=clock)
    assert [path.name for path in folder(tmp_path).parent.iterdir()] == [PLAN.upload_id]
    assert list((tmp_path / "uploads" / ".scratch").iterdir()) == []


def test_too_many_are_refused(tmp_path: Path) -> None:
    store = UploadStore(tmp_path, max_open=2)
    send_all(store, replace(PLAN, upload_id="done"))
    store.open(TENANT, replace(PLAN, upload_id="a")).close()
    store.open("other", replace(PLAN, upload_id="b")).close()
    with pytest.raises(StorageFull, match="2 uploads are open"):
        store.open(TENANT, replace(PLAN, upload_id="c"))
    store.drop("other", "b")
    store.open(TENANT, replace(PLAN, upload_id="c")).close()


def test_too_large_together_are_refused_by_what_was_announced(tmp_path: Path) -> None:
    store = UploadStore(tmp_path, max_bytes_total=2 * len(WEIGHTS))
    send_all(store, replace(PLAN, upload_id="done"))
    store.open(TENANT, replace(PLAN, upload_id="a")).close()
    with pytest.raises(StorageFull, match="would have 30720 bytes, and the limit is 20480"):
        store.open(TENANT, replace(PLAN, upload_id="b"))
    store.open(TENANT, replace(PLAN, upload_id="a")).close()  # is there, and needs no room


def test_a_full_disk_makes_no_half_upload(
    store: UploadStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(StorageFull, match="disk is full"):
        patch.setattr(os, "fsync", fail)
        store.open(TENANT, PLAN)
    assert not folder(tmp_path).exists()
    assert list((tmp_path / "uploads" / ".scratch").iterdir()) == []
    send_all(store)


@pytest.mark.parametrize("upload_id", ["", ".", "..", "a/b", "../x", ".scratch", "a" * 64, "a\n"])
def test_an_id_leads_nowhere_else(store: UploadStore, upload_id: str) -> None:
    with pytest.raises(ValueError, match="not a tenant and an upload id"):
        store.open(TENANT, replace(PLAN, upload_id=upload_id))
    with pytest.raises(ValueError, match="not a tenant and an upload id"):
        store.find("..", "a")


def test_files_are_for_their_owner_alone(store: UploadStore, tmp_path: Path) -> None:
    path = send_all(store)
    assert path.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o600}
