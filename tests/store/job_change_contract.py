"""What every job store does when a job changes, whatever database is behind it."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import pytest

from store.job_records import (
    MAX_NOTICES,
    TRANSITIONS,
    EventKind,
    Intent,
    JobChange,
    JobChanged,
    JobState,
    JobTransitionRefused,
    JobUnknown,
    NewEvent,
)
from tests.store.dataset_contract import ACTIVE, FINAL
from tests.store.job_steps import MakeJobs, bring_to, new_job
from tests.store.registry_steps import Ticks

FAILURE = {"reason": "OUT_OF_MEMORY", "message": "\ud800", "metadata": {"step": "3"}}


class JobChangeContract:
    """Tests of states, epochs, attempts and events."""

    @pytest.mark.parametrize("old", JobState)
    async def test_a_job_goes_by_the_transitions_alone(
        self, make_jobs: MakeJobs, old: JobState
    ) -> None:
        async with make_jobs() as store:
            for new in JobState:
                job = await bring_to(store, old)
                change = JobChange(state=new, attempt=9, events=[NewEvent(EventKind.NOTICE, {})])
                if new in TRANSITIONS[old]:
                    moved = await store.change_job(job, change)
                    assert (moved.state, moved.epoch) == (new, job.epoch + 1)
                    assert moved.last_sequence == job.last_sequence + 2
                else:
                    with pytest.raises(JobTransitionRefused, match="cannot go from") as caught:
                        await store.change_job(job, change)
                    assert (caught.value.job, caught.value.state) == (job.name, old)
                    assert await store.job("acme", job.name) == job
                    events = await store.job_events("acme", job.name, after=0, limit=99)
                    assert len(events) == job.last_sequence

    async def test_a_transition_is_told_before_what_else_happened(
        self, make_jobs: MakeJobs
    ) -> None:
        async with make_jobs(clock_ns=Ticks(1000)) as store:
            job = await bring_to(store, JobState.RUNNING)
            notice = {"code": "OUT_OF_MEMORY", "message": "at step 3"}
            failed = await store.change_job(
                job,
                JobChange(
                    state=JobState.FAILED,
                    error=FAILURE,
                    notices=[notice],
                    events=[NewEvent(EventKind.NOTICE, notice, time_ns=17)],
                ),
            )
            told = {**FAILURE, "message": "\\ud800"}
            assert (failed.error, failed.notices) == (told, [notice])
            *_, changed, noticed = await store.job_events("acme", job.name, after=0, limit=99)
            assert (changed.kind, noticed.kind) == (EventKind.STATE_CHANGED, EventKind.NOTICE)
            assert changed.payload == {
                "previous_state": "running",
                "state": "failed",
                "error": told,
            }
            assert (changed.time_ns, noticed.time_ns) == (failed.end_time_ns, 17)
            assert noticed.payload == notice

    async def test_a_cause_is_told_and_fails_no_job(self, make_jobs: MakeJobs) -> None:
        async with make_jobs() as store:
            job = await bring_to(store, JobState.RUNNING)
            change = JobChange(state=JobState.RECOVERING, cause=FAILURE)
            recovering = await store.change_job(job, change)
            assert (recovering.state, recovering.error) == (JobState.RECOVERING, None)
            *_, told = await store.job_events("acme", job.name, after=0, limit=99)
            assert told.payload == {
                "previous_state": "running",
                "state": "recovering",
                "error": {**FAILURE, "message": "\\ud800"},
            }

    async def test_times_are_those_of_the_first_start_and_the_end(
        self, make_jobs: MakeJobs
    ) -> None:
        async with make_jobs(clock_ns=Ticks()) as store:
            queued = await bring_to(store, JobState.QUEUED)
            assert (queued.start_time_ns, queued.end_time_ns) == (None, None)
            started = await store.change_job(queued, JobChange(state=JobState.PREPARING))
            assert started.start_time_ns is not None
            assert started.start_time_ns > queued.create_time_ns
            running = await store.change_job(started, JobChange(state=JobState.RUNNING))
            failed = await store.change_job(running, JobChange(state=JobState.FAILED))
            assert failed.start_time_ns == running.start_time_ns == started.start_time_ns
            assert running.end_time_ns is None
            assert failed.end_time_ns is not None
            assert failed.end_time_ns > started.start_time_ns

    async def test_what_is_not_mentioned_stays(self, make_jobs: MakeJobs) -> None:
        async with make_jobs() as store:
            job = await bring_to(store, JobState.PREPARING)
            change = JobChange(
                effective_spec={"seed": 8},
                attempt=1,
                device="3",
                ingested_bytes=40,
                publication={"state": "gating", "adapter": "sql"},
                progress={"step": 1, "loss": math.inf},
                manifest={"seed": 8},
                recovery={"spent": 1},
            )
            changed = await store.change_job(job, change)
            assert changed == replace(
                job,
                effective_spec={"seed": 8},
                attempt=1,
                device="3",
                ingested_bytes=40,
                publication={"state": "gating", "adapter": "sql"},
                progress={"step": 1, "loss": math.inf},
                manifest={"seed": 8},
                recovery={"spent": 1},
            )
            assert await store.change_job(changed, JobChange()) == changed
        async with make_jobs() as again:
            assert await again.job("acme", job.name) == changed

    async def test_a_new_attempt_reads_its_events_from_the_begin(self, make_jobs: MakeJobs) -> None:
        async with make_jobs() as store:
            job = await bring_to(store, JobState.RUNNING)
            job = await store.change_job(job, JobChange(attempt=1, ingested_bytes=70))
            assert (job.attempt, job.ingested_bytes) == (1, 70)
            job = await store.change_job(job, JobChange(attempt=2))
            assert (job.attempt, job.ingested_bytes) == (2, 0)

    async def test_events_say_of_which_attempt_they_are(self, make_jobs: MakeJobs) -> None:
        async with make_jobs() as store:
            job = await bring_to(store, JobState.QUEUED)
            job = await store.change_job(job, JobChange(state=JobState.PREPARING, attempt=1))
            one = NewEvent(EventKind.PROGRESS, {"step": 1})
            job = await store.change_job(job, JobChange(events=[one]))
            await store.change_job(job, JobChange(attempt=2, events=[one]))
            events = await store.job_events("acme", job.name, after=0, limit=99)
            assert [event.attempt for event in events] == [0, 0, 1, 1, 2]

    async def test_a_change_of_what_was_not_seen_is_refused(self, make_jobs: MakeJobs) -> None:
        async with make_jobs() as store:
            seen = await bring_to(store, JobState.QUEUED)
            now = await store.change_job(seen, JobChange(state=JobState.PREPARING))
            with pytest.raises(JobChanged, match=r"changed since epoch 2") as caught:
                await store.change_job(seen, JobChange(progress={"step": 1}))
            assert caught.value.job == seen.name
            with pytest.raises(JobChanged):
                await store.change_job(seen, JobChange(state=JobState.FAILED))
            assert await store.job("acme", seen.name) == now

    async def test_a_change_without_a_state_leaves_the_epoch(self, make_jobs: MakeJobs) -> None:
        async with make_jobs() as store:
            seen = await bring_to(store, JobState.RUNNING)
            for step in (1, 2):
                changed = await store.change_job(seen, JobChange(progress={"step": step}))
            assert changed == replace(seen, progress={"step": 2})

    async def test_a_job_that_was_deleted_and_made_again_is_another(
        self, make_jobs: MakeJobs
    ) -> None:
        async with make_jobs() as store:
            seen = await bring_to(store, JobState.FAILED)
            await store.delete_job("acme", seen.name)
            with pytest.raises(JobChanged):
                await store.change_job(seen, JobChange(progress={}))
            again = await bring_to(store, JobState.FAILED, new_job(seen.name))
            assert again.epoch == seen.epoch
            with pytest.raises(JobChanged):
                await store.change_job(seen, JobChange(progress={}))

    async def test_of_two_who_saw_the_same_one_changes_the_state(self, make_jobs: MakeJobs) -> None:
        async with make_jobs() as store:
            seen = await bring_to(store, JobState.RUNNING)
            results = await asyncio.gather(
                store.change_job(seen, JobChange(state=JobState.CANCELLING)),
                store.change_job(seen, JobChange(state=JobState.FINALIZING)),
                return_exceptions=True,
            )
            assert [type(result) for result in results].count(JobChanged) == 1

    async def test_events_are_numbered_without_a_gap(self, make_jobs: MakeJobs) -> None:
        async with make_jobs(clock_ns=Ticks(5)) as store:
            job = await bring_to(store, JobState.RUNNING)
            other = await bring_to(store, JobState.RUNNING)
            steps = [
                NewEvent(EventKind.PROGRESS, {"step": step, "loss": math.nan if step == 9 else 1.5})
                for step in range(100)
            ]
            job = await store.change_job(job, JobChange(events=steps[:60]))
            await store.change_job(other, JobChange(events=steps))
            job = await store.change_job(job, JobChange(events=steps[60:]))
            assert job.last_sequence == 104

            events = await store.job_events("acme", job.name, after=4, limit=1000)
            assert [event.sequence for event in events] == list(range(5, 105))
            assert [event.payload["step"] for event in events] == list(range(100))
            assert math.isnan(events[9].payload["loss"])
            assert len({event.time_ns for event in events}) == 2  # two changes

    async def test_events_of_one_kind_are_read_without_the_others(
        self, make_jobs: MakeJobs
    ) -> None:
        async with make_jobs() as store:
            job = await bring_to(store, JobState.RUNNING)
            kinds = [EventKind.PROGRESS, EventKind.CHECKPOINT, EventKind.NOTICE]
            job = await store.change_job(
                job, JobChange(events=[NewEvent(kind, {}) for kind in kinds * 3])
            )

            async def read(after: int, limit: int, *kinds: EventKind) -> list[int]:
                events = await store.job_events(
                    "acme", job.name, after=after, limit=limit, kinds=kinds
                )
                assert {event.kind for event in events} <= set(kinds)
                return [event.sequence for event in events]

            assert await read(0, 99, EventKind.CHECKPOINT) == [6, 9, 12]
            assert await read(6, 1, EventKind.CHECKPOINT) == [9]
            assert await read(9, 99, EventKind.CHECKPOINT, EventKind.NOTICE) == [10, 12, 13]

    async def test_events_are_those_of_the_job_that_was_meant(self, make_jobs: MakeJobs) -> None:
        async with make_jobs() as store:
            first = await bring_to(store, JobState.FAILED, new_job("nightly"))
            await store.delete_job("acme", "nightly")
            second = await bring_to(store, JobState.FAILED, new_job("nightly"))
            with pytest.raises(JobUnknown):
                await store.job_events("acme", "nightly", after=0, limit=9, uid=first.uid)
            events = await store.job_events("acme", "nightly", after=0, limit=9, uid=second.uid)
            assert len(events) == second.last_sequence

    async def test_events_are_read_page_by_page(self, make_jobs: MakeJobs) -> None:
        async with make_jobs() as store:
            job = await bring_to(store, JobState.SUCCEEDED)

            async def page(after: int, limit: int) -> list[int]:
                events = await store.job_events("acme", job.name, after=after, limit=limit)
                return [event.sequence for event in events]

            assert await page(0, 4) == [1, 2, 3, 4]
            assert await page(4, 4) == [5, 6]
            assert await page(6, 4) == []
            assert await page(2**64 - 1, 4) == []
            with pytest.raises(ValueError, match="at least 1"):
                await page(0, 0)

    async def test_the_first_notices_stay(self, make_jobs: MakeJobs) -> None:
        async with make_jobs() as store:
            job = await bring_to(store, JobState.RUNNING)
            notices = [{"code": f"N{number}", "message": ""} for number in range(MAX_NOTICES + 9)]
            job = await store.change_job(job, JobChange(notices=notices[:3]))
            assert job.notices == notices[:3]
            job = await store.change_job(job, JobChange(notices=notices[3:]))
            assert job.notices == notices[:MAX_NOTICES]

    # What is wanted of it.

    @pytest.mark.parametrize("state", ACTIVE)
    async def test_what_is_wanted_is_apart_from_where_it_stands(
        self, make_jobs: MakeJobs, state: JobState
    ) -> None:
        async with make_jobs() as store:
            job = await bring_to(store, state)
            for intent in (Intent.PAUSE, Intent.RUN, Intent.CANCEL, Intent.DISCARD):
                wanted = await store.intend("acme", job.name, intent)
                assert wanted == replace(job, intent=intent)
                assert await store.job("acme", job.name) == wanted
                if intent is Intent.CANCEL:
                    for weaker in (Intent.PAUSE, Intent.RUN):
                        assert await store.intend("acme", job.name, weaker) == wanted
            for intent in Intent:  # is not taken back
                assert await store.intend("acme", job.name, intent) == wanted
                assert await store.change_job(job, JobChange(intent=intent)) == wanted
            for next_state in TRANSITIONS[state]:
                changed = await store.change_job(job, JobChange(state=next_state))
                assert changed.intent is Intent.DISCARD
                break

    async def test_what_is_wanted_may_change_with_the_state(self, make_jobs: MakeJobs) -> None:
        async with make_jobs() as store:
            job = await bring_to(store, JobState.RUNNING)
            change = JobChange(state=JobState.PAUSING, intent=Intent.PAUSE)
            pausing = await store.change_job(job, change)
            assert (pausing.state, pausing.intent) == (JobState.PAUSING, Intent.PAUSE)
            with pytest.raises(JobChanged):
                await store.change_job(job, JobChange(intent=Intent.RUN))
            assert (await store.job("acme", job.name)).intent is Intent.PAUSE

    @pytest.mark.parametrize("state", FINAL)
    async def test_of_a_job_that_has_ended_nothing_can_be_wanted(
        self, make_jobs: MakeJobs, state: JobState
    ) -> None:
        async with make_jobs() as store:
            job = await bring_to(store, state)
            assert await store.intend("acme", job.name, Intent.DISCARD) == job
            assert await store.job("acme", job.name) == job
