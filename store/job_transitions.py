"""What a change makes of a job, by TRANSITIONS of the records. Pure: every job store has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from store.job_records import (
    HAS_PROCESS,
    MAX_NOTICES,
    TRANSITIONS,
    EventKind,
    JobChange,
    JobRecord,
    JobState,
    JobTransitionRefused,
    NewEvent,
)

T = TypeVar("T")


def changed(record: JobRecord, change: JobChange, now_ns: int) -> tuple[JobRecord, list[NewEvent]]:
    """The job as it is after a change, and the events of that, a change of state first.

    Raises JobTransitionRefused.
    """
    after = _with_fields(record, change)
    events = list(change.events)
    if change.state is not None:
        after = _moved(after, change.state, now_ns)
        events.insert(0, state_changed(record.state, change.state, change.error or change.cause))
    return after, events


def state_changed(
    previous: JobState | None, state: JobState, error: Mapping[str, Any] | None = None
) -> NewEvent:
    """The event of a transition; `previous` is None for the first state of a job."""
    payload = {
        "previous_state": None if previous is None else previous.value,
        "state": state.value,
        "error": error,
    }
    return NewEvent(EventKind.STATE_CHANGED, payload)


def _moved(record: JobRecord, state: JobState, now_ns: int) -> JobRecord:
    if state not in TRANSITIONS[record.state]:
        raise JobTransitionRefused(record, state)
    start_time_ns = record.start_time_ns
    device_time_ns = record.device_time_ns if state in HAS_PROCESS else None
    if state is JobState.PREPARING:
        device_time_ns = now_ns
        start_time_ns = now_ns if start_time_ns is None else start_time_ns
    return replace(
        record,
        state=state,
        epoch=record.epoch + 1,
        queue_time_ns=now_ns if state is JobState.QUEUED else record.queue_time_ns,
        device_time_ns=device_time_ns,
        start_time_ns=start_time_ns,
        end_time_ns=now_ns if state.is_final else None,
    )


def _with_fields(record: JobRecord, change: JobChange) -> JobRecord:
    """The record with what the change says, but for its state."""
    ingested_bytes = record.ingested_bytes if change.attempt is None else 0
    return replace(
        record,
        intent=record.intent.then(_or(change.intent, record.intent)),
        effective_spec=_or(change.effective_spec, record.effective_spec),
        attempt=_or(change.attempt, record.attempt),
        device=_or(change.device, record.device),
        ingested_bytes=_or(change.ingested_bytes, ingested_bytes),
        publication=_or(change.publication, record.publication),
        progress=_or(change.progress, record.progress),
        manifest=_or(change.manifest, record.manifest),
        error=_or(change.error, record.error),
        notices=[*record.notices, *change.notices][:MAX_NOTICES],
        recovery=_or(change.recovery, record.recovery),
    )


def _or(new: T | None, old: T) -> T:
    return old if new is None else new
