from __future__ import annotations

from pathlib import Path

import pytest

from trainer.checkpoint import (
    CheckpointCorrupt,
    adopt,
    drop_earlier,
    drop_oldest,
    folder_of,
    remove_unfinished,
    seal,
    steps_of,
    verified_manifest,
    verify,
)
from trainer.events import Checkpoint, Manifest
from trainer.run_folder import RunFolder, write_whole


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def unfinished(run: RunFolder, step: int) -> Path:
    folder = folder_of(run, step)
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights %d" % step)
    (folder / "optimizer.pt").write_bytes(b"state")
    return folder


def finished(run: RunFolder, step: int) -> Path:
    folder = unfinished(run, step)
    seal(folder, step, eval_loss=1.5)
    return folder


def test_a_finished_one_verifies_and_tells_its_files(run: RunFolder) -> None:
    manifest = verify(finished(run, 3))
    assert set(manifest.files) == {"adapter/adapter_model.safetensors", "optimizer.pt"}
    assert set(manifest.adapter_files) == {"adapter_model.safetensors"}
    assert (manifest.step, manifest.eval_loss, manifest.size_bytes) == (3, 1.5, 14)


def test_one_that_was_not_finished_does_not(run: RunFolder) -> None:
    with pytest.raises(CheckpointCorrupt, match="was not finished"):
        verify(unfinished(run, 3))


@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "optimizer.pt"])
def test_a_file_that_is_gone_or_another_is_found(run: RunFolder, name: str) -> None:
    folder = finished(run, 3)
    (folder / name).write_bytes(b"other")
    with pytest.raises(CheckpointCorrupt, match=f"another {name}"):
        verify(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointCorrupt, match=f"lost its {name}"):
        verify(folder)


def test_a_manifest_cannot_name_files_elsewhere(run: RunFolder) -> None:
    folder = finished(run, 3)
    manifest = verify(folder)
    outside = {"../../secret": "0" * 64}
    write_whole(folder / "manifest.json", manifest.model_copy(update={"files": outside}))
    with pytest.raises(CheckpointCorrupt, match="names"):
        verify(folder)


def test_a_manifest_that_is_no_json_is_told(run: RunFolder) -> None:
    folder = finished(run, 3)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(CheckpointCorrupt, match="cannot be read"):
        verify(folder)


def test_files_that_came_later_are_let_be(run: RunFolder) -> None:
    folder = finished(run, 3)
    (folder / "publication-pirate.json").write_text("{}")
    verify(folder)


def test_the_newest_are_kept_by_number_and_not_by_name(run: RunFolder) -> None:
    for step in (2, 9, 10, 100):
        finished(run, step)
    unfinished(run, 200)
    assert steps_of(run) == [2, 9, 10, 100]
    drop_oldest(run, 2, spared=[2])
    assert steps_of(run) == [2, 10, 100]
    assert folder_of(run, 200).is_dir()


def test_the_newest_of_all_attempts_are_kept(tmp_path: Path) -> None:
    runs = [RunFolder(tmp_path / str(number)) for number in (1, 2, 3)]
    for run, steps in zip(runs, [(2, 9, 10), (4, 8), (6,)], strict=True):
        for step in steps:
            finished(run, step)
    drop_earlier(runs[2], 3, 2)
    assert [steps_of(run) for run in runs] == [[], [8], [6]]
    finished(runs[2], 7)
    drop_earlier(runs[2], 3, 2)
    assert [steps_of(run) for run in runs] == [[], [], [6, 7]]


def test_an_adopted_one_is_whole_and_stays_when_the_other_goes(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "1"), RunFolder(tmp_path / "2")
    theirs = finished(first, 3)
    second.checkpoints.mkdir(parents=True)
    ours = adopt(second, theirs)
    assert ours == folder_of(second, 3)
    drop_oldest(first, 1)
    drop_earlier(second, 2, 1)
    assert not theirs.exists()
    assert verify(ours).step == 3


def test_what_was_not_finished_can_be_swept(run: RunFolder) -> None:
    remove_unfinished(run)
    finished(run, 3)
    unfinished(run, 6)
    run.rows.mkdir()
    remove_unfinished(run)
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint-3"]
    assert not run.rows.exists()


def manifest_of(run: RunFolder, step: int) -> Manifest:
    return Manifest(
        dataset_sha256="d",
        rows_sha256="r",
        base_model="tiny",
        fingerprints={},
        versions={},
        seed=1,
        device="cpu",
        files=verify(folder_of(run, step)).adapter_files,
        final_loss=1.0,
        effective_spec={},
        checkpoint=Checkpoint(
            step=step, folder="f", size_bytes=1, sha256="s", create_time_ns=1, final=True
        ),
    )


def test_a_runs_manifest_is_believed_with_its_checkpoint(run: RunFolder) -> None:
    with pytest.raises(CheckpointCorrupt, match="no manifest"):
        verified_manifest(run)
    finished(run, 3)
    finished(run, 6)
    write_whole(run.manifest, manifest_of(run, 6))
    assert len(verified_manifest(run).sha256) == 64
    other = manifest_of(run, 3).files
    write_whole(run.manifest, manifest_of(run, 6).model_copy(update={"files": other}))
    with pytest.raises(CheckpointCorrupt, match="another adapter"):
        verified_manifest(run)
