"""What a client of a dead engine makes of its requests."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from engine import verdict as module
from engine.errors import CrashPart
from engine.fingerprint import tag
from engine.step_record import StepRecord
from engine.verdict import Verdict

NONE, SUSPECT, ALONE = CrashPart.NONE, CrashPart.SUSPECT, CrashPart.ALONE


@pytest.fixture
def record(tmp_path: Path) -> StepRecord:
    return StepRecord(tmp_path / "record", 2, 8, 2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "record"


async def test_who_was_in_a_crash_alone_is_told_at_once(record: StepRecord, path: Path) -> None:
    record.begin([tag("r", 7)], [], [""])
    verdict = Verdict(path)
    async with asyncio.timeout(1):
        assert await verdict.part_of(7, waits=True) is ALONE
        assert await verdict.part_of(8, waits=True) is NONE
        assert await verdict.part_of(None, waits=True) is NONE


async def test_who_was_in_it_with_others_waits_for_the_host(record: StepRecord, path: Path) -> None:
    record.begin([tag("r", 7), tag("s", 8)], [], [""])
    verdict = Verdict(path)
    assert await verdict.part_of(7, waits=False) is SUSPECT
    waiting = asyncio.create_task(verdict.part_of(7, waits=True))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    verdict.say(True)
    assert await waiting is SUSPECT


async def test_a_host_that_says_nothing_is_not_waited_for_for_ever(
    record: StepRecord, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "VERDICT_WAIT_S", 0.01)
    record.begin([tag("r", 7), tag("s", 8)], [], [""])
    assert await Verdict(path).part_of(7, waits=True) is SUSPECT


async def test_what_was_killed_from_outside_accuses_nobody(record: StepRecord, path: Path) -> None:
    record.begin([tag("r", 7)], [tag("s", 8)], [""])
    verdict = Verdict(path)
    waiting = asyncio.create_task(verdict.part_of(8, waits=True))
    await asyncio.sleep(0)
    verdict.say(False)
    verdict.say(True)  # the first word stands
    assert await waiting is NONE
    assert await verdict.part_of(7, waits=True) is NONE


async def test_nor_does_a_core_whose_executor_was_killed(record: StepRecord, path: Path) -> None:
    record.begin([tag("r", 7)], [], [""])
    record.note_exits([-9])
    assert await Verdict(path).part_of(7, waits=True) is NONE
    told = Verdict(path)
    told.say(True)
    assert await told.part_of(7, waits=True) is ALONE, "the host knows better"


async def test_without_a_record_nobody_is_accused(tmp_path: Path) -> None:
    assert await Verdict(tmp_path / "none").part_of(7, waits=True) is NONE
