"""Adapter files are copied, addressed by content, and never change again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from store import artifacts
from store.artifacts import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    MAX_WEIGHTS_BYTES,
    WEIGHTS_FILE,
    ArtifactStore,
    SourceUnusable,
)
from tests.store.stored_adapter import keep, mode, staging, write_source


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "root")


def test_an_artifact_holds_the_two_files_and_nothing_else(
    store: ArtifactStore, source: Path
) -> None:
    (source / "README.md").write_text("ignored")
    (source / "optimizer.pt").write_bytes(b"ignored")
    artifact = keep(store, source)
    assert sorted(path.name for path in artifact.path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    assert (artifact.path / WEIGHTS_FILE).read_bytes() == b"weights" * 1000
    assert artifact.size_bytes == 8 + 7000
    assert artifact.weights_sha256 == hashlib.sha256(b"weights" * 1000).hexdigest()


def test_an_artifact_lies_under_its_digest_and_is_read_only(
    store: ArtifactStore, source: Path
) -> None:
    artifact = keep(store, source)
    assert artifact.path.name == artifact.digest
    assert artifact.path.is_absolute()
    assert mode(artifact.path) == 0o555
    assert mode(artifact.path / CONFIG_FILE) == mode(artifact.path / WEIGHTS_FILE) == 0o444


def test_the_digest_is_of_the_content_wherever_it_came_from(
    store: ArtifactStore, source: Path, tmp_path: Path
) -> None:
    with store.stage(source) as staged:
        before = staged.digest
    elsewhere = source.rename(tmp_path / "elsewhere")
    with store.stage(elsewhere) as staged:
        assert staged.digest == before


def test_the_digest_is_stable_over_releases(store: ArtifactStore, source: Path) -> None:
    # Stored artifacts are found by it: changing how it is computed needs a migration.
    assert keep(store, source).digest == (
        "1d4188e09fc2e8c0f65365953b12cf3450265d75391caf44ed3838bb001db4ac"
    )


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_another_byte_is_another_digest(store: ArtifactStore, source: Path, name: str) -> None:
    before = keep(store, source)
    with (source / name).open("ab") as file:
        file.write(b" ")
    after = keep(store, source)
    assert after.digest != before.digest
    assert before.path.is_dir()


def test_moving_bytes_between_the_files_is_another_digest(
    store: ArtifactStore, source: Path
) -> None:
    (source / CONFIG_FILE).write_bytes(b"ab")
    (source / WEIGHTS_FILE).write_bytes(b"c")
    before = keep(store, source).digest
    (source / CONFIG_FILE).write_bytes(b"a")
    (source / WEIGHTS_FILE).write_bytes(b"bc")
    assert keep(store, source).digest != before


def test_changing_the_source_does_not_change_the_copy(store: ArtifactStore, source: Path) -> None:
    with store.stage(source) as staged:
        (source / WEIGHTS_FILE).write_bytes(b"evil")
        artifact = staged.commit()
    assert (artifact.path / WEIGHTS_FILE).read_bytes() == b"weights" * 1000


def test_the_same_content_is_kept_once(store: ArtifactStore, source: Path, tmp_path: Path) -> None:
    first = keep(store, source)
    inode = first.path.stat().st_ino
    second = keep(store, source)
    assert second == first
    assert second.path.stat().st_ino == inode
    assert staging(tmp_path) == []


def test_a_copy_that_is_not_committed_is_dropped(
    store: ArtifactStore, source: Path, tmp_path: Path
) -> None:
    with store.stage(source) as staged:
        assert staged.path.is_dir()
    assert not staged.path.exists()
    assert list((tmp_path / "root" / "adapters").iterdir()) == []


def test_a_copy_is_dropped_when_validation_raises(
    store: ArtifactStore, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyError), store.stage(source):
        raise KeyError
    assert staging(tmp_path) == []


def test_what_an_earlier_process_left_in_staging_is_swept(source: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    kept = keep(ArtifactStore(root), source)
    ArtifactStore(root).stage(source)
    assert len(staging(tmp_path)) == 1
    ArtifactStore(root)
    assert staging(tmp_path) == []
    assert kept.path.is_dir()


def test_threads_that_keep_the_same_content_at_once_agree(
    store: ArtifactStore, source: Path, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(8) as pool:
        kept = list(pool.map(lambda _: keep(store, source), range(32)))
    assert len(set(kept)) == 1
    assert staging(tmp_path) == []
    assert store.verify(kept[0].digest) == kept[0]


def test_a_linked_source_folder_is_followed(
    store: ArtifactStore, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(source)
    assert keep(store, tmp_path / "link") == keep(store, source)


def test_everything_is_on_disk_before_the_artifact_appears(
    store: ArtifactStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, rename = artifacts.sync_path, Path.rename

    def record_fsync(path: Path) -> None:
        order.append(f"fsync {path.name}")
        fsync(path)

    def record_rename(path: Path, target: Path) -> Path:
        order.append("rename")
        return rename(path, target)

    monkeypatch.setattr(artifacts, "sync_path", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    with store.stage(source) as staged:
        copy = staged.path.name
        artifact = staged.commit()
    assert order == [
        f"fsync {CONFIG_FILE}",
        f"fsync {WEIGHTS_FILE}",
        f"fsync {copy}",
        "rename",
        f"fsync {artifact.digest}",
        "fsync adapters",
    ]


# --- what is refused


def replace_with_link(source: Path) -> None:
    real = source / "real"
    (source / WEIGHTS_FILE).rename(real)
    (source / WEIGHTS_FILE).symlink_to(real)


def replace_with_fifo(source: Path) -> None:
    (source / CONFIG_FILE).unlink()
    os.mkfifo(source / CONFIG_FILE)


def replace_with_folder(source: Path) -> None:
    (source / WEIGHTS_FILE).unlink()
    (source / WEIGHTS_FILE).mkdir()


def replace_with_pickle(source: Path) -> None:
    (source / WEIGHTS_FILE).rename(source / "adapter_model.bin")


def grow_config(source: Path) -> None:
    (source / CONFIG_FILE).write_bytes(b" " * (MAX_CONFIG_BYTES + 1))


def grow_weights(source: Path) -> None:
    os.truncate(source / WEIGHTS_FILE, MAX_WEIGHTS_BYTES + 1)  # sparse: it takes no space


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda source: (source / CONFIG_FILE).unlink(), "holds no adapter_config.json; name a"),
        (lambda source: (source / WEIGHTS_FILE).unlink(), "holds no adapter_model.safetensors;"),
        (replace_with_pickle, "holds adapter_model.bin, which is a pickle and can run code"),
        (replace_with_link, r"is a symbolic link; copy the file itself there \(cp -L\)"),
        (replace_with_fifo, "is no regular file"),
        (replace_with_folder, "is no regular file"),
        (grow_config, "has 65537 bytes, the limit is 65536"),
        (grow_weights, "has 4294967297 bytes, the limit is 4294967296"),
    ],
)
def test_a_source_that_cannot_be_taken_says_why(
    store: ArtifactStore,
    source: Path,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    message: str,
) -> None:
    spoil(source)
    with pytest.raises(SourceUnusable, match=message):
        store.stage(source)
    assert staging(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "does not exist"),
        (f"source/{CONFIG_FILE}", "is no folder"),
        ("source\0", "cannot be opened"),
    ],
)
def test_a_source_that_is_no_folder_is_refused(
    store: ArtifactStore, source: Path, path: str, message: str
) -> None:
    with pytest.raises(SourceUnusable, match=message):
        store.stage(source.parent / path)


@pytest.mark.parametrize("new_size_bytes", [100, 8000])
def test_a_file_that_changes_while_it_is_copied_is_refused(
    store: ArtifactStore,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    new_size_bytes: int,
) -> None:
    write_all = artifacts._write_all

    def write_and_change(descriptor: int, data: bytes) -> None:
        write_all(descriptor, data)
        if len(data) == 1000:  # the first chunk of the weights, not the config
            os.truncate(source / WEIGHTS_FILE, new_size_bytes)

    monkeypatch.setattr(artifacts, "COPY_CHUNK_BYTES", 1000)
    monkeypatch.setattr(artifacts, "_write_all", write_and_change)
    with pytest.raises(SourceUnusable, match="changed while it was copied"):
        store.stage(source)


def test_a_full_disk_leaves_nothing_behind(
    store: ArtifactStore, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts, "_write_all", fail)
    with pytest.raises(OSError, match="No space left"):
        store.stage(source)
    assert staging(tmp_path) == []
