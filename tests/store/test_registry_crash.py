"""Whatever a host dies of: nothing acknowledged is lost, nothing half-written is served.

SIGKILL before every call that changes a file of the state folder, SIGKILL within writes, and a
power cut at every such call, on a disk that drops what was not synced. `tests/store/crash` has
how; how many kill points there are is printed.
"""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from tests.store.crash.crash_site import CrashSite, Recording, power_cuts
from tests.store.crash.disk import Disk, Survival
from tests.store.crash.journal import Entry, Op
from tests.store.crash.layer import LayerUnbuildable, build_layer
from tests.store.crash.script import Script
from tests.store.crash.verdict import expect, judge
from tests.store.crash.victim import Victim

FEWEST_KILL_POINTS = 50
"""Fewer, and the layer does not see what is written."""

Say = Callable[[str], None]


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_layer(tmp_path_factory.mktemp("layer"))


@pytest.fixture(scope="module")
def site(layer: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CrashSite]:
    with Victim(layer) as victim:
        yield CrashSite(tmp_path_factory.mktemp("crash"), victim)


@pytest.fixture(scope="module")
async def recordings(site: CrashSite) -> Mapping[Script, Recording]:
    return {script: await site.record(script) for script in Script}


@pytest.fixture(
    params=[
        # It takes as long as all others but one, and differs from them in its statements alone.
        pytest.param(
            script, marks=pytest.mark.slow if script is Script.JOBS else (), id=script.value
        )
        for script in Script
    ]
)
def recording(recordings: Mapping[Script, Recording], request: pytest.FixtureRequest) -> Recording:
    return recordings[request.param]


@pytest.fixture
def creation(recordings: Mapping[Script, Recording]) -> Recording:
    return recordings[Script.CREATION]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Print, whether output is captured or not."""

    def show(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}", flush=True)

    return show


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.slow)])
async def test_sigkill_before_a_write(
    site: CrashSite, recording: Recording, stride: int, say: Say
) -> None:
    script, points = recording.expected.script, recording.kill_points[::stride]
    assert len(recording.kill_points) >= FEWEST_KILL_POINTS
    say(
        f"{script.value}: SIGKILL at {len(points)} of {len(recording.kill_points)} kill points, "
        f"{len(recording.writes)} of which are writes, in {len(script.operations)} operations"
    )
    wrong = {point: await site.kill(recording, point, within=False) for point in points}
    assert not {point: found for point, found in wrong.items() if found}


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.slow)])
async def test_sigkill_within_a_write(
    site: CrashSite, recording: Recording, stride: int, say: Say
) -> None:
    points = recording.writes[::stride]
    say(f"{recording.expected.script.value}: SIGKILL within {len(points)} writes")
    wrong = {point: await site.kill(recording, point, within=True) for point in points}
    assert not {point: found for point, found in wrong.items() if found}


@pytest.mark.parametrize(
    ("survival", "stride", "draws"),
    [
        (Survival.NOTHING, 1, 1),
        (Survival.PREFIX, 4, 1),
        (Survival.SCATTERED, 4, 1),
        pytest.param(Survival.PREFIX, 1, 4, marks=pytest.mark.slow),
        pytest.param(Survival.SCATTERED, 1, 4, marks=pytest.mark.slow),
    ],
)
async def test_power_cut(
    site: CrashSite, recording: Recording, survival: Survival, stride: int, draws: int, say: Say
) -> None:
    cuts = list(power_cuts(recording, survival, draws))[::stride]
    say(f"{recording.expected.script.value}: {len(cuts)} power cuts, {survival.value} survives")
    wrong = [(cut.kill_point, await site.restore(recording, cut)) for cut in cuts]
    assert not [found for found in wrong if found[1]]


# --- whether the harness would notice


async def test_the_layer_sees_all_that_sqlite_and_python_write(recording: Recording) -> None:
    written = {entry.path for entry in recording.journal if entry.op is Op.WRITE}
    assert {"state/registry.sqlite", "state/registry.sqlite-wal"} <= written
    disk = Disk(recording.before)
    for entry in recording.journal:
        disk.apply(entry)
    assert disk.cut(Survival.EVERYTHING, seed=0) == recording.after


def test_operations_can_be_told_apart_by_what_they_leave(
    recordings: Mapping[Script, Recording],
) -> None:
    silent = []
    for script, recording in recordings.items():
        steps = itertools.pairwise(recording.expected.states)
        for operation, (old, new) in zip(script.operations[1:], steps, strict=True):
            if old == new and operation.name != "end":
                silent.append(operation.name)
    assert silent == [
        "repeat the request of version 2",
        "checkpoint",
        "keep files that are there",
        "repeat the request of the job",
    ]


def database_syncs(entry: Entry) -> bool:
    return "registry.sqlite" in entry.path


def artifact_syncs(entry: Entry) -> bool:
    return entry.path == "state/adapters"


@pytest.mark.parametrize(
    ("forgotten", "message"),
    [
        (database_syncs, "it is as after 'open'"),
        (artifact_syncs, "and has no files"),
    ],
)
async def test_a_host_that_forgets_to_sync_is_found_out(
    site: CrashSite, creation: Recording, forgotten: Callable[[Entry], bool], message: str
) -> None:
    journal = [
        entry for entry in creation.journal if entry.op is not Op.SYNC or not forgotten(entry)
    ]
    for cut in power_cuts(replace(creation, journal=journal), Survival.NOTHING):
        if any(message in text for text in await site.restore(creation, cut)):
            return
    pytest.fail("no power cut showed it")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("DELETE FROM event WHERE sequence = 1", "have a gap"),
        ("UPDATE adapter_version SET state = 'ready' WHERE version = 2", "half an operation"),
        ("UPDATE traffic SET arms = '[[2,100]]'", "sends traffic to 2, which is not READY"),
        ("UPDATE counter SET last = 2 WHERE name = 'lora_int_id'", "lora_int_id 3 is used again"),
        ("UPDATE adapter SET last_version = 0", "cannot be used: UNIQUE"),
    ],
)
async def test_a_registry_that_is_half_written_is_found_out(
    site: CrashSite, tmp_path: Path, damage: str, message: str
) -> None:
    expected = await expect(Script.CREATION, tmp_path / "watched", site.sources)
    told = [f"{index} {result!r}" for index, result in enumerate(expected.results)]
    database = tmp_path / "watched" / "state" / "registry.sqlite"
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        assert connection.execute(damage).rowcount
    found = await judge(tmp_path / "watched", site.sources, expected, told)
    assert any(message in text for text in found)


def test_without_a_compiler_it_fails_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LayerUnbuildable, match="install g\\+\\+"):
        build_layer(tmp_path)
