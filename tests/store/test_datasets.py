"""A dataset's file is whole, is kept once, and goes when nobody wants it."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from store.datasets import DatasetFiles
from store.upload_folder import StorageFull

CONTENT = b'{"prompt": "a", "completion": "b"}\n' * 9
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "upload").write_bytes(CONTENT)
    return tmp_path / "upload"


@pytest.fixture
def files(tmp_path: Path) -> DatasetFiles:
    return DatasetFiles(tmp_path)


def scratch(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "datasets" / ".scratch").iterdir())


def test_a_file_is_found_by_its_content(files: DatasetFiles, source: Path, tmp_path: Path) -> None:
    path = files.keep(source, SHA256)
    assert path == files.path(SHA256) == tmp_path / "datasets" / SHA256 / "data.jsonl"
    assert path.read_bytes() == CONTENT
    assert source.read_bytes() == CONTENT
    source.unlink()
    assert DatasetFiles(tmp_path).path(SHA256).read_bytes() == CONTENT
    assert scratch(tmp_path) == []


def test_it_can_only_be_read(files: DatasetFiles, source: Path) -> None:
    path = files.keep(source, SHA256)
    assert path.stat().st_mode & 0o777 == 0o444
    assert path.parent.stat().st_mode & 0o777 == 0o555


def test_keeping_it_again_changes_nothing(files: DatasetFiles, source: Path) -> None:
    path = files.keep(source, SHA256)
    inode = path.stat().st_ino
    other = source.with_name("other")
    other.write_bytes(CONTENT)
    assert files.keep(other, SHA256) == path
    assert path.stat().st_ino == inode


def test_one_that_another_thread_made_meanwhile_is_taken(
    files: DatasetFiles, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def link_late(*arguments: object, **options: object) -> None:
        monkeypatch.setattr(os, "link", link)
        files.keep(source, SHA256)
        link(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "link", link_late)
    assert files.keep(source, SHA256).read_bytes() == CONTENT


def test_one_whose_process_died_is_sealed_later(
    files: DatasetFiles, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chmod = Path.chmod

    def die(path: Path, mode: int) -> None:
        if mode == 0o555:
            raise KeyboardInterrupt
        chmod(path, mode)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "chmod", die)
        files.keep(source, SHA256)
    assert files.keep(source, SHA256).parent.stat().st_mode & 0o777 == 0o555


@pytest.mark.parametrize(
    ("number", "expected"), [(errno.ENOSPC, StorageFull), (errno.EIO, OSError)]
)
def test_a_disk_that_fails_leaves_nothing(
    files: DatasetFiles,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    expected: type[Exception],
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch, pytest.raises(expected):
        patch.setattr(os, "fsync", fail)
        files.keep(source, SHA256)
    assert not files.path(SHA256).exists()
    assert scratch(tmp_path) == []


def test_everything_is_synced_before_it_has_its_name(
    files: DatasetFiles, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def record_sync(descriptor: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def record_rename(path: Path, target: Path) -> Path:
        order.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "rename", record_rename)
    files.keep(source, SHA256)
    assert order[0] == "data.jsonl"
    assert order[2:] == ["rename", SHA256, "datasets"]


def test_a_removed_file_is_gone(files: DatasetFiles, source: Path, tmp_path: Path) -> None:
    files.keep(source, SHA256)
    files.remove(SHA256)
    files.remove(SHA256)
    assert not files.path(SHA256).exists()
    assert scratch(tmp_path) == []
    files.keep(source, SHA256)


def test_what_is_not_in_use_is_swept(files: DatasetFiles, source: Path) -> None:
    other = hashlib.sha256(b"other").hexdigest()
    for sha256 in (SHA256, other):
        files.keep(source, sha256)
    assert files.sweep({SHA256}) == [other]
    assert files.path(SHA256).exists()
    assert not files.path(other).exists()
    assert files.sweep({SHA256}) == []
    assert files.sweep(set()) == [SHA256]


def test_a_start_sweeps_what_was_never_made(tmp_path: Path) -> None:
    half = tmp_path / "datasets" / ".scratch" / "half"
    half.mkdir(parents=True)
    (half / "data.jsonl").touch(0o444)
    DatasetFiles(tmp_path)
    assert scratch(tmp_path) == []


@pytest.mark.parametrize("sha256", ["", "..", ".scratch", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_what_is_no_digest_leads_nowhere(files: DatasetFiles, source: Path, sha256: str) -> None:
    for call in (files.path, files.remove, lambda given: files.keep(source, given)):
        with pytest.raises(ValueError, match="not a SHA-256"):
            call(sha256)
