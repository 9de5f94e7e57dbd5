"""Event files are read by whole lines, from where they were read to before."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from store.job_records import EventKind, JobRecord, JobState
from tests.gateway.error_samples import JOB
from trainer.event_file import BYTES_PER_READ, Line, read_events
from trainer.events import Notice, Progress, WorkerEvent, WorkerEventKind
from trainer.ingest import as_json, changes
from trainer.spec import JobSpec


def progress(step: int, **values: float) -> bytes:
    payload = Progress(
        step=step,
        total_steps=9,
        epoch=0.1,
        tokens_seen=1,
        trained_tokens=1,
        tokens_per_second=1.0,
        **values,
    )
    return line(WorkerEventKind.PROGRESS, as_json(payload))


def job(state: JobState) -> JobRecord:
    return replace(JOB, state=state)


def line(kind: WorkerEventKind, payload: dict[str, object]) -> bytes:
    event = WorkerEvent(sequence=1, time_ns=5, kind=kind, payload=payload)
    return event.model_dump_json().encode() + b"\n"


LOADED = line(WorkerEventKind.LOADED, as_json(JobSpec(dataset="d", adapter="a")))
NOTICE = line(WorkerEventKind.NOTICE, as_json(Notice(code="A", message="b")))


def steps(lines: list[Line]) -> list[int | None]:
    return [x.payload.step if isinstance(x.payload, Progress) else None for x in lines]


def test_a_file_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_events(tmp_path / "events.ndjson", 0) == []


@given(cuts=st.lists(st.integers(0, 2000), max_size=8))
def test_each_line_is_read_once_however_the_file_grows(cuts: list[int]) -> None:
    content = b"".join(progress(step) for step in range(8))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "events.ndjson"
        read: list[Line] = []
        for end in [*sorted(min(cut, len(content)) for cut in cuts), len(content)]:
            path.write_bytes(content[:end])
            read += read_events(path, read[-1].end if read else 0)
    assert steps(read) == list(range(8))
    assert read[-1].end == len(content)


def test_rubbish_is_a_line_that_is_no_event(tmp_path: Path) -> None:
    path = tmp_path / "events.ndjson"
    path.write_bytes(
        progress(1)
        + b"\xff\x00\n\n{}\n"
        + line(WorkerEventKind.PROGRESS, {"step": "many"})
        + progress(2)
    )
    assert steps(read_events(path, 0)) == [1, None, None, None, None, 2]


def test_a_line_without_end_is_let_go_of(tmp_path: Path) -> None:
    path = tmp_path / "events.ndjson"
    path.write_bytes(b"x" * (2 * BYTES_PER_READ) + b"\n" + progress(7))
    read: list[Line] = []
    while more := read_events(path, read[-1].end if read else 0):
        read += more
    assert steps(read)[-1] == 7 and all(x.event is None for x in read[:-1])


def test_a_batch_is_one_change_and_the_model_that_is_loaded_begins_another(
    tmp_path: Path,
) -> None:
    path = tmp_path / "events.ndjson"
    path.write_bytes(NOTICE + LOADED + progress(1) + progress(2))
    before, after = changes(job(JobState.PREPARING), read_events(path, 0))
    assert [event.kind for event in before.events] == [EventKind.NOTICE]
    assert before.state is None and before.ingested_bytes == len(NOTICE)
    assert after.state is JobState.RUNNING and after.effective_spec is not None
    assert [event.kind for event in after.events] == [EventKind.PROGRESS] * 2
    assert after.progress is not None and after.progress["step"] == 2
    assert after.events[0].time_ns == 5
    assert after.ingested_bytes == path.stat().st_size


def test_a_job_that_is_cancelled_does_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "events.ndjson"
    path.write_bytes(LOADED + progress(1))
    (change,) = changes(job(JobState.CANCELLING), read_events(path, 0))
    assert change.state is None and len(change.events) == 1


def test_an_evaluation_leaves_the_loss_of_the_step_and_a_step_the_loss_of_the_evaluation(
    tmp_path: Path,
) -> None:
    path = tmp_path / "events.ndjson"
    path.write_bytes(
        progress(1, loss=4.0, learning_rate=0.2)
        + progress(2, loss=2.0, learning_rate=0.1, grad_norm=0.7)
        + progress(2, eval_loss=3.0)
    )
    running = job(JobState.RUNNING)
    (change,) = changes(running, read_events(path, 0))
    assert change.progress is not None
    kept = {"loss": 2.0, "learning_rate": 0.1, "grad_norm": 0.7, "eval_loss": 3.0}
    assert kept.items() <= change.progress.items() and change.progress["step"] == 2
    *_, evaluation = change.events
    assert evaluation.payload["loss"] is None, "events are told as they were"

    # Another batch goes on from what the store has.
    told = path.stat().st_size
    with path.open("ab") as file:
        file.write(progress(3, loss=float("nan")) + progress(4, learning_rate=0.05))
    running = replace(running, progress=change.progress)
    (change,) = changes(running, read_events(path, told))
    assert change.progress is not None and change.progress["step"] == 4
    assert (kept | {"learning_rate": 0.05}).items() <= change.progress.items()
