"""Prepared folders are whole, are found again, and go when they take too much."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from trainer import prepared_folders
from trainer.prepare_plan import PLAN_FILE, PreparePlan
from trainer.prepared_folders import UNTOUCHED_S, PreparedFolders
from trainer.report import DatasetReport
from trainer.rows import REPORT_FILE, ROWS_FILE
from trainer.run_folder import write_whole
from trainer.spec import DataSpec

PLAN = PreparePlan(dataset="/d", model="/m", data=DataSpec())


@pytest.fixture
def folders(tmp_path: Path) -> PreparedFolders:
    found = PreparedFolders(tmp_path)
    found.sweep()
    return found


def make(folders: PreparedFolders, name: str, *, age_s: float = 0, size_bytes: int = 10) -> Path:
    """A folder that was used so long ago."""
    made = folders.partial(name)
    folders.begin(made, PLAN)
    (made / ROWS_FILE).write_bytes(b"x" * size_bytes)
    write_whole(made / REPORT_FILE, DatasetReport(valid=True, rows=1))
    folders.finish(made, name)
    used_s = time.time() - age_s
    os.utime(folders.path(name) / REPORT_FILE, (used_s, used_s))
    return folders.path(name)


def test_a_folder_has_its_name_once_it_is_whole(folders: PreparedFolders) -> None:
    made = folders.partial("a-1")
    folders.begin(made, PLAN)
    assert PreparePlan.model_validate_json((made / PLAN_FILE).read_bytes()) == PLAN
    assert folders.find("a-1") is None
    (made / ROWS_FILE).write_bytes(b"rows")
    write_whole(made / REPORT_FILE, DatasetReport(valid=True, rows=7))
    assert folders.finish(made, "a-1").rows == 7
    found = folders.find("a-1")
    assert found is not None and found.rows == 7
    assert not made.exists()


def test_a_report_without_rows_is_enough_if_it_is_not_valid(folders: PreparedFolders) -> None:
    folder = make(folders, "a-1")
    write_whole(folder / REPORT_FILE, DatasetReport(valid=False))
    (folder / ROWS_FILE).unlink()
    assert folders.find("a-1") == DatasetReport(valid=False)


@pytest.mark.parametrize("damage", ["no rows", "no report", "half a report", "other fields"])
def test_a_damaged_folder_is_made_again(folders: PreparedFolders, damage: str) -> None:
    folder = make(folders, "a-1")
    match damage:
        case "no rows":
            (folder / ROWS_FILE).unlink()
        case "no report":
            (folder / REPORT_FILE).unlink()
        case "half a report":
            (folder / REPORT_FILE).write_bytes(b'{"valid": tr')
        case _:
            (folder / REPORT_FILE).write_bytes(b'{"valid": true, "colour": 1}')
    assert folders.find("a-1") is None
    make(folders, "a-1")
    assert folders.find("a-1") is not None


def test_what_was_never_finished_or_half_removed_is_swept(
    tmp_path: Path, folders: PreparedFolders
) -> None:
    kept = make(folders, "a-1")
    folders.begin(folders.partial("a-2"), PLAN)
    folders.begin(folders.partial("a-1"), PLAN)
    PreparedFolders(tmp_path).sweep()
    assert list((tmp_path / "prepared").iterdir()) == [kept]


def test_a_folder_that_is_dropped_or_removed_leaves_nothing(
    tmp_path: Path, folders: PreparedFolders
) -> None:
    made = folders.partial("a-1")
    folders.begin(made, PLAN)
    folders.drop(made)
    folders.drop(made)
    make(folders, "a-1")
    folders.remove("a-1")
    folders.remove("a-1")
    assert list((tmp_path / "prepared").iterdir()) == []


def test_those_not_used_for_longest_go_when_they_are_too_many(
    folders: PreparedFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared_folders, "MAX_FOLDERS", 2)
    ages_s = {"a-1": 3, "a-2": 1, "a-3": 2, "a-4": 4}
    made = [make(folders, name, age_s=UNTOUCHED_S + 60 * age) for name, age in ages_s.items()]
    assert folders.find("a-4") is not None  # so it is the one used last
    folders.prune()
    assert [folder.name for folder in made if folder.exists()] == ["a-2", "a-4"]


def test_those_not_used_for_longest_go_when_they_are_too_large(
    folders: PreparedFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared_folders, "MAX_BYTES", 250_000)
    made = [
        make(folders, f"a-{age}", age_s=UNTOUCHED_S + 60 * age, size_bytes=100_000)
        for age in range(1, 5)
    ]
    folders.prune()
    assert [folder.name for folder in made if folder.exists()] == ["a-1", "a-2"]


def test_a_folder_that_a_training_process_may_still_read_stays(
    folders: PreparedFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared_folders, "MAX_FOLDERS", 0)
    recent, old = make(folders, "a-1", age_s=60), make(folders, "a-2", age_s=UNTOUCHED_S + 60)
    folders.prune()
    assert (recent.exists(), old.exists()) == (True, False)


def test_folders_of_datasets_that_are_gone_go(folders: PreparedFolders) -> None:
    made = [make(folders, name) for name in ("a-1", "a-2", "b-1", "c-1")]
    folders.remove_dataset("b")
    assert [folder.name for folder in made if folder.exists()] == ["a-1", "a-2", "c-1"]
    folders.keep_only({"a"})
    assert [folder.name for folder in made if folder.exists()] == ["a-1", "a-2"]


def test_a_folder_that_another_removes_meanwhile_is_no_error(
    folders: PreparedFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared_folders, "MAX_FOLDERS", 0)
    old = make(folders, "a-1", age_s=UNTOUCHED_S + 60)
    monkeypatch.setattr(folders, "_names", lambda: ["gone-1", "a-1"])
    folders.prune()
    assert not old.exists()


def test_nothing_is_there_before_the_first(tmp_path: Path) -> None:
    folders = PreparedFolders(tmp_path / "new")
    folders.prune()
    folders.keep_only(set())
    folders.remove_dataset("a")
    assert folders.find("a-1") is None
