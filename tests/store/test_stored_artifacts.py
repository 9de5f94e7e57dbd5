"""What was kept is what is loaded, or is said to be damaged; what is removed is gone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from store import artifacts
from store.artifacts import CONFIG_FILE, WEIGHTS_FILE, ArtifactDamaged, ArtifactStore
from tests.store.stored_adapter import keep, mode, staging, write_source


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "root")


def test_verifying_hashes_what_is_kept(store: ArtifactStore, source: Path) -> None:
    artifact = keep(store, source)
    assert store.verify(artifact.digest) == artifact
    (artifact.path / WEIGHTS_FILE).chmod(0o644)
    (artifact.path / WEIGHTS_FILE).write_bytes(b"WEIGHTS" * 1000)
    with pytest.raises(ArtifactDamaged, match="were changed after they were stored"):
        store.verify(artifact.digest)
    with pytest.raises(ArtifactDamaged), store.stage(source) as staged:
        staged.commit()


def test_files_that_are_gone_are_missed(store: ArtifactStore, source: Path) -> None:
    artifact = keep(store, source)
    artifact.path.chmod(0o755)
    (artifact.path / CONFIG_FILE).unlink()
    with pytest.raises(ArtifactDamaged, match="cannot be read"):
        store.verify(artifact.digest)
    with pytest.raises(ArtifactDamaged, match="cannot be read"):
        store.verify("0" * 64)


@pytest.mark.parametrize("digest", ["", "..", "A" * 64, "0" * 63])
def test_only_a_digest_is_looked_up(store: ArtifactStore, digest: str) -> None:
    with pytest.raises(ValueError, match="not a digest"):
        store.verify(digest)


def test_a_seal_that_a_crash_prevented_is_put_on_later(store: ArtifactStore, source: Path) -> None:
    artifact = keep(store, source)
    artifact.path.chmod(0o700)
    keep(store, source)
    assert mode(artifact.path) == 0o555


def count_hashes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    hashed: list[str] = []
    hash_file = artifacts._hash_file

    def record(path: Path) -> object:
        hashed.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(artifacts, "_hash_file", record)
    return hashed


def test_what_is_loaded_is_hashed_once_by_each_process(
    store: ArtifactStore, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = keep(store, source)
    hashed = count_hashes(monkeypatch)
    for _ in range(3):
        assert store.open_verified(artifact.digest) == artifact
    assert hashed == [CONFIG_FILE, WEIGHTS_FILE]
    ArtifactStore(tmp_path / "root").open_verified(artifact.digest)
    assert len(hashed) == 4


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_file_that_was_touched_is_hashed_again(
    store: ArtifactStore, source: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    artifact = store.open_verified(keep(store, source).digest)
    hashed = count_hashes(monkeypatch)
    os.utime(artifact.path / name)
    assert store.open_verified(artifact.digest) == store.open_verified(artifact.digest)
    assert len(hashed) == 2


def write_over(path: Path) -> None:
    """Other bytes of the same length, in the same file and with the same mtime."""
    before = path.stat()
    path.chmod(0o644)
    path.write_bytes(b"W" * before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_by_link(path: Path) -> None:
    path.parent.chmod(0o755)
    path.symlink_to(path.rename(path.parent.parent / "elsewhere"))


@pytest.mark.parametrize("damage", [write_over, replace_by_link])
@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_damage_is_seen_before_a_load(
    store: ArtifactStore, source: Path, damage: Callable[[Path], None], name: str
) -> None:
    artifact = store.open_verified(keep(store, source).digest)
    damage(artifact.path / name)
    with pytest.raises(ArtifactDamaged, match="create the version again"):
        store.open_verified(artifact.digest)


def test_a_removed_artifact_is_gone_and_can_be_kept_again(
    store: ArtifactStore, source: Path, tmp_path: Path
) -> None:
    artifact = store.open_verified(keep(store, source).digest)
    store.remove(artifact.digest)
    store.remove(artifact.digest)
    assert not artifact.path.exists()
    assert staging(tmp_path) == []
    with pytest.raises(ArtifactDamaged, match="cannot be read"):
        store.open_verified(artifact.digest)
    assert keep(store, source) == artifact


def test_a_removal_that_is_cut_off_leaves_no_half_artifact(
    store: ArtifactStore, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = keep(store, source)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
        store.remove(artifact.digest)
    assert not artifact.path.exists()
    ArtifactStore(tmp_path / "root")
    assert staging(tmp_path) == []
