"""The record of a core's steps, read after every kind of end."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from engine.fingerprint import Tagged, tag
from engine.step_record import StepRecord, Steps, read_steps

IDS = [f"{tag(f'r{number}', number)}-0123abcd" for number in range(300)]


def tagged(*numbers: int) -> frozenset[Tagged]:
    return frozenset(Tagged(f"r{number}", number) for number in numbers)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "record"


@pytest.fixture
def record(path: Path) -> StepRecord:
    return StepRecord(path, slots=3, max_requests=256, max_versions=8)


def test_the_step_that_was_begun_and_not_ended_is_what_is_read(
    record: StepRecord, path: Path
) -> None:
    assert read_steps(path) == Steps(), "no step yet"
    for _ in range(10):
        record.end(record.begin(IDS[:3], IDS[3:5], ["", "acme/alpha@1"]))
        assert read_steps(path) == Steps()
    slot = record.begin(IDS[:1], [IDS[1], "1_" + IDS[2]], ["", "acme/alpha@1"])
    steps = read_steps(path)
    assert (steps.fresh, steps.older) == (tagged(0), tagged(1, 2))
    assert steps.versions == {"", "acme/alpha@1"}
    record.end(slot)
    assert read_steps(path) == Steps()


def test_steps_on_their_way_together_are_all_read_and_end_one_by_one(
    record: StepRecord, path: Path
) -> None:
    first = record.begin(IDS[:1], [], [""])
    second = record.begin(IDS[1:2], IDS[:1], ["b"])
    steps = read_steps(path)
    assert (steps.fresh, steps.older) == (tagged(0, 1), tagged()), "0 is in its first step yet"
    assert steps.versions == {"", "b"}
    record.end(first)
    assert (read_steps(path).fresh, read_steps(path).older) == (tagged(1), tagged(0))
    record.end(second)
    assert read_steps(path) == Steps()


def test_256_requests_with_the_longest_names_have_room_and_more_are_left_out(
    record: StepRecord, path: Path
) -> None:
    names = [f"{'t' * 63}/{'a' * 63}@{number}" for number in range(8)]
    ids = [f"63_{tag(f'{number:032x}', number)}-0123abcd" for number in range(256)]
    record.end(record.begin(ids[:100], ids[100:], names))
    record.begin(ids[:100], ids[100:], names)
    steps = read_steps(path)
    assert (len(steps.fresh), len(steps.older), len(steps.versions)) == (100, 156, 8)
    small = StepRecord(path.with_name("small"), 1, 2, 0)
    small.begin([], ids, [""])
    few = read_steps(path.with_name("small"))
    assert 2 <= len(few.requests) < 10, "and no half of one"
    assert all(int(request.request_id, 16) == request.fingerprint for request in few.requests)


def test_requests_without_a_fingerprint_are_nobodys(record: StepRecord, path: Path) -> None:
    record.begin(["warm-up-0123-0123abcd"], [], [""])
    assert read_steps(path).requests == frozenset()


@pytest.mark.parametrize(
    ("fresh", "older", "alone"),
    [
        ([0], [], True),
        ([0], [1, 2], True),
        ([], [0], True),
        ([0, 1], [], False),
        ([1], [0], False),
        ([], [0, 1], False),
        ([1], [], False),
        ([], [], False),
    ],
)
def test_who_is_alone_or_alone_in_a_first_step(
    record: StepRecord, path: Path, fresh: list[int], older: list[int], alone: bool
) -> None:
    record.begin([IDS[n] for n in fresh], [IDS[n] for n in older], [""])
    assert read_steps(path).is_alone(0) is alone


def test_several_tries_of_one_request_are_one(record: StepRecord, path: Path) -> None:
    record.begin([f"{tag(f'try-{n}', 5)}-0123abcd" for n in range(3)], [], [""])
    assert len(read_steps(path).requests) == 3 and read_steps(path).is_alone(5)


def damaged(path: Path, at: int, value: bytes) -> Steps:
    content = bytearray(path.read_bytes())
    content[at : at + len(value)] = value
    other = path.with_name("damaged")
    other.write_bytes(content)
    return read_steps(other)


def test_a_torn_record_accuses_nobody(record: StepRecord, path: Path) -> None:
    record.begin(IDS[:2], [], [""])
    content = path.read_bytes()
    text_at = content.index(b"\n2\nr0.")
    slot_at = text_at - 24
    (sequence,) = struct.unpack_from("<Q", content, slot_at)
    assert len(read_steps(path).requests) == 2
    assert damaged(path, slot_at, struct.pack("<Q", sequence + 1)) == Steps(), "being written"
    assert damaged(path, slot_at + 8, struct.pack("<I", 5)) == Steps(), "another length"
    assert damaged(path, slot_at + 8, struct.pack("<I", 2**31)) == Steps(), "beyond its slot"
    assert damaged(path, text_at + 3, b"R") == Steps(), "another text"
    assert damaged(path, 0, b"????") == Steps(), "no record"


def test_files_that_are_none_accuse_nobody(record: StepRecord, path: Path, tmp_path: Path) -> None:
    record.begin(IDS[:2], [], [""])
    (tmp_path / "short").write_bytes(path.read_bytes()[:100])
    (tmp_path / "cut").write_bytes(path.read_bytes()[:300])
    (tmp_path / "empty").write_bytes(b"")
    for name in ("short", "cut", "empty", "missing"):
        assert read_steps(tmp_path / name) == Steps(), name


def test_the_file_is_this_users_alone_and_never_one_that_was_there(
    record: StepRecord, path: Path
) -> None:
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        StepRecord(path, 1, 1, 1)


def test_exits_of_executor_processes_are_kept(record: StepRecord, path: Path) -> None:
    assert read_steps(path).executor_exits == ()
    record.note_exits([-9, 0, -11])
    record.begin(IDS[:1], [], [""])
    assert read_steps(path).executor_exits == (-9, 0, -11)


ENDS = {
    "sigkill": "os.kill(os.getpid(), 9)",
    "segv": "os.kill(os.getpid(), 11)",
    "exit": "os._exit(3)",
    "raise": "raise RuntimeError",
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_it_is_there_however_its_process_ends(path: Path, end: str) -> None:
    program = f"""
import os
from pathlib import Path
from engine.step_record import StepRecord
record = StepRecord(Path({str(path)!r}), 3, 256, 8)
record.end(record.begin([{IDS[1]!r}], [], ["gone"]))
record.begin([{IDS[0]!r}], [], ["acme/alpha@1"])
{end}
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert ended.returncode != 0
    assert read_steps(path) == Steps(tagged(0), frozenset(), frozenset({"acme/alpha@1"}))


def test_a_reader_beside_a_writer_sees_whole_steps_or_none(path: Path) -> None:
    program = f"""
from pathlib import Path
from engine.step_record import StepRecord
from engine.fingerprint import tag
record = StepRecord(Path({str(path)!r}), 2, 256, 8)
batches = [[tag(f"b{{batch}}", batch) for _ in range(1)] +
           [tag(f"b{{batch}}.{{n}}", batch) for n in range(199)] for batch in range(7)]
print(flush=True)
while True:
    for batch in batches:
        record.end(record.begin(batch, [], [""]))
"""
    writer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None
        writer.stdout.readline()
        whole = 0
        while whole < 50:
            steps = read_steps(path)
            for request in steps.fresh:
                assert request.request_id.startswith(f"b{request.fingerprint}")
            counts = len(steps.fresh)
            assert counts % 200 == 0 and counts <= 400
            whole += counts > 0
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        assert writer.stdout is not None
        writer.stdout.close()
