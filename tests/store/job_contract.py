"""What every job store does, whatever database is behind it.

A database's own tests subclass JobContract and provide the fixture `make_jobs`. What is said of
datasets and of changes has files of its own, for their length.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from store.job_records import (
    DatasetUnknown,
    EventKind,
    Intent,
    JobActive,
    JobChange,
    JobExists,
    JobRecord,
    JobState,
    JobUnknown,
    NewJob,
    QueueFull,
)
from store.jobs import JobStore
from store.records import NAME, InvalidName, RequestIdReused
from tests.store.dataset_contract import ACTIVE, FINAL, DatasetContract
from tests.store.device_use_contract import DeviceUseContract
from tests.store.job_change_contract import JobChangeContract
from tests.store.job_machine import JobMachine
from tests.store.job_steps import (
    EFFECTIVE_SPEC,
    FINGERPRINTS,
    PENDING,
    SPEC,
    MakeJobs,
    add_dataset,
    bring_to,
    create,
    new_job,
)
from tests.store.registry_steps import Ticks

NEW = NewJob(
    tenant="acme",
    name="nightly",
    adapter="sql",
    dataset="corpus",
    eval_dataset="held-out",
    spec={**SPEC, "modules": ("q_proj", "v_proj"), "rate": 1e-4, "note": "\ud800ü"},
    labels={"team": "data", "ünï": "\n"},
    priority=-3,
)
OF_ONE_JOB: dict[str, Callable[[JobStore, str, str], Awaitable[object]]] = {
    "job": lambda store, tenant, name: store.job(tenant, name),
    "intend": lambda store, tenant, name: store.intend(tenant, name, Intent.CANCEL),
    "delete": lambda store, tenant, name: store.delete_job(tenant, name),
    "events": lambda store, tenant, name: store.job_events(tenant, name, after=0, limit=9),
}


async def names(jobs: Awaitable[list[JobRecord]]) -> list[str]:
    return [job.name for job in await jobs]


class JobContract(JobChangeContract, DeviceUseContract, DatasetContract):
    """Tests of jobs and lists, and by inheritance all others."""

    async def test_a_job_begins_with_all_that_was_asked_for(self, make_jobs: MakeJobs) -> None:
        async with make_jobs(clock_ns=Ticks(70)) as store:
            await add_dataset(store)
            await add_dataset(store, "held-out")
            job = await create(store, NEW, request_id="r")
            assert job == JobRecord(
                tenant="acme",
                name="nightly",
                uid=job.uid,
                number=1,
                adapter="sql",
                dataset="corpus",
                eval_dataset="held-out",
                spec={
                    **SPEC,
                    "modules": ["q_proj", "v_proj"],
                    "rate": 1e-4,
                    "note": "\\ud800ü",
                },
                effective_spec=EFFECTIVE_SPEC,
                fingerprints=FINGERPRINTS,
                labels={"team": "data", "ünï": "\n"},
                priority=-3,
                state=JobState.VALIDATING,
                intent=Intent.RUN,
                epoch=1,
                attempt=0,
                device="",
                ingested_bytes=0,
                last_sequence=1,
                publication=PENDING,
                progress=None,
                manifest=None,
                error=None,
                notices=[],
                recovery={},
                create_time_ns=job.create_time_ns,
                queue_time_ns=None,
                device_time_ns=None,
                start_time_ns=None,
                end_time_ns=None,
            )
            assert job.create_time_ns > 70
            assert len(job.uid) == 32
            (event,) = await store.job_events("acme", "nightly", after=0, limit=9)
            assert (event.sequence, event.time_ns, event.attempt) == (1, job.create_time_ns, 0)
            assert event.kind is EventKind.STATE_CHANGED
            assert event.payload == {"previous_state": None, "state": "validating", "error": None}
        async with make_jobs() as again:
            assert await again.job("acme", "nightly") == job

    @pytest.mark.parametrize("adapter", ["sql", "a" * 63])
    async def test_a_name_is_made_from_the_adapters(
        self, make_jobs: MakeJobs, adapter: str
    ) -> None:
        async with make_jobs() as store:
            await add_dataset(store)
            one, two = [await create(store, new_job(adapter=adapter)) for _ in range(2)]
            assert one.name != two.name
            for job in (one, two):
                stem, _, suffix = job.name.rpartition("-")
                assert adapter.startswith(stem)
                assert stem[:3] == adapter[:3]
                assert len(suffix) == 6
                assert NAME.fullmatch(job.name)
                assert await store.job("acme", job.name) == job

    @pytest.mark.parametrize(
        "change", [{"tenant": "A"}, {"adapter": ""}, {"adapter": "a/b"}, {"name": "Nightly"}]
    )
    async def test_names_keep_to_the_rules_of_all_names(
        self, make_jobs: MakeJobs, change: dict[str, str]
    ) -> None:
        async with make_jobs() as store:
            await add_dataset(store)
            with pytest.raises(InvalidName, match="begin with a letter or a digit"):
                await create(store, replace(new_job(), **change))  # type: ignore[arg-type]

    @pytest.mark.parametrize("missing", ["dataset", "eval_dataset"])
    async def test_a_job_needs_its_datasets(self, make_jobs: MakeJobs, missing: str) -> None:
        async with make_jobs() as store:
            await add_dataset(store)
            with pytest.raises(DatasetUnknown, match="'none' is unknown"):
                await create(store, replace(new_job(), **{missing: "none"}))  # type: ignore[arg-type]
            assert await store.active_jobs() == []

    async def test_a_name_is_one_jobs_until_that_is_deleted(self, make_jobs: MakeJobs) -> None:
        async with make_jobs() as store:
            first = await bring_to(store, JobState.FAILED, new_job("nightly"))
            with pytest.raises(JobExists, match="take another job_id"):
                await create(store, new_job("nightly"))
            await add_dataset(store, tenant="other")
            await create(store, new_job("nightly", tenant="other"))
            assert await store.delete_job("acme", "nightly") == first
            second = await create(store, new_job("nightly"))
            assert second.uid != first.uid
            assert [
                e.sequence for e in await store.job_events("acme", "nightly", after=0, limit=9)
            ] == [1]

    async def test_no_more_jobs_wait_than_may(self, make_jobs: MakeJobs) -> None:
        async with make_jobs() as store:
            for state in JobState:
                await bring_to(store, state)
            await add_dataset(store, tenant="other")
            active = len(ACTIVE)
            with pytest.raises(QueueFull, match="try again later") as caught:
                await create(store, new_job(tenant="other"), max_active=active)
            assert caught.value.limit == active
            await create(store, new_job(tenant="other"), max_active=active + 1)

    # Repeats.

    @pytest.mark.parametrize("state", JobState)
    async def test_a_request_again_answers_with_its_job(
        self, make_jobs: MakeJobs, state: JobState
    ) -> None:
        async with make_jobs() as store:
            await add_dataset(store)
            await add_dataset(store, "held-out")
            job = await create(store, NEW, request_id="r")
            if state is not JobState.VALIDATING:
                way = {
                    JobState.CANCELLED: [JobState.CANCELLING, JobState.CANCELLED],
                    JobState.QUEUED: [JobState.QUEUED],
                }.get(state, [JobState.FAILED])
                for each in way:
                    job = await store.change_job(job, JobChange(state=each))
            assert await create(store, NEW, request_id="r", max_active=0) == job
            assert await names(store.jobs("acme", limit=9)) == ["nightly"]

    async def test_a_request_without_a_name_keeps_the_name_that_was_made(
        self, make_jobs: MakeJobs
    ) -> None:
        async with make_jobs() as store:
            await add_dataset(store)
            job = await create(store, request_id="r")
            assert await create(store, request_id="r") == job
            with pytest.raises(RequestIdReused):
                await create(store, new_job(job.name), request_id="r")

    @pytest.mark.parametrize(
        "change",
        [
            {"name": "other"},
            {"adapter": "other"},
            {"dataset": "held-out"},
            {"eval_dataset": ""},
            {"spec": SPEC},
            {"labels": {}},
            {"priority": 0},
        ],
    )
    async def test_a_request_id_stands_for_one_request(
        self, make_jobs: MakeJobs, change: dict[str, object]
    ) -> None:
        async with make_jobs() as store:
            await add_dataset(store)
            await add_dataset(store, "held-out")
            await create(store, NEW, request_id="r")
            with pytest.raises(RequestIdReused, match="take a new one"):
                await create(store, replace(NEW, **change), request_id="r")  # type: ignore[arg-type]
            await add_dataset(store, tenant="other")
            await create(store, new_job(tenant="other"), request_id="r")  # its own
            assert await names(store.jobs("acme", limit=9)) == ["nightly"]

    async def test_without_a_request_id_every_call_makes_a_job(self, make_jobs: MakeJobs) -> None:
        async with make_jobs() as store:
            await add_dataset(store)
            made = {(await create(store)).name for _ in range(3)}
            assert len(made) == 3

    async def test_the_job_of_a_request_is_found_by_it_alone(self, make_jobs: MakeJobs) -> None:
        async with make_jobs() as store:
            await add_dataset(store)
            assert await store.job_of_request(new_job("nightly"), "r") is None
            job = await create(store, new_job("nightly"), request_id="r")
            assert await store.job_of_request(new_job("nightly"), "r") == job
            assert await store.job_of_request(new_job("nightly"), "") is None
            assert await store.job_of_request(new_job("nightly", tenant="other"), "r") is None
            with pytest.raises(RequestIdReused, match="take a new one"):
                await store.job_of_request(new_job("other"), "r")

    async def test_repeats_at_once_make_one_job(self, make_jobs: MakeJobs) -> None:
        async with make_jobs() as store:
            await add_dataset(store)
            jobs = await asyncio.gather(*(create(store, request_id="r") for _ in range(8)))
            assert len({job.uid for job in jobs}) == 1

    # Lists.

    async def test_jobs_are_listed_from_the_newest_and_by_page(self, make_jobs: MakeJobs) -> None:
        async with make_jobs() as store:
            await add_dataset(store)
            await add_dataset(store, tenant="other")
            made = dict[str, int]()
            for name in ("b", "a", "c"):
                made[name] = (await create(store, new_job(name))).number
                await create(store, new_job(name, tenant="other"))
            assert await names(store.jobs("acme", limit=2)) == ["c", "a"]
            assert await names(store.jobs("acme", before=made["a"], limit=9)) == ["b"]
            assert await names(store.jobs("acme", before=made["b"], limit=9)) == []
            assert await names(store.jobs("acme", before=2**63 - 1, limit=1)) == ["c"]
            with pytest.raises(ValueError, match="at least 1"):
                await store.jobs("acme", limit=0)

    async def test_a_page_goes_on_where_the_last_job_of_the_one_before_was_deleted(
        self, make_jobs: MakeJobs
    ) -> None:
        async with make_jobs() as store:
            for name in ("a", "b", "c", "d"):
                await bring_to(store, JobState.FAILED, new_job(name))
            *_, last = await store.jobs("acme", limit=2)
            await store.delete_job("acme", last.name)
            assert await names(store.jobs("acme", before=last.number, limit=9)) == ["b", "a"]

    async def test_a_number_is_never_another_jobs(self, make_jobs: MakeJobs) -> None:
        numbers = []
        for name in ("a", "b", "c"):
            async with make_jobs() as store:  # nor after a restart
                job = await bring_to(store, JobState.FAILED, new_job(name))
                await store.delete_job("acme", name)
                numbers.append(job.number)
        assert numbers == sorted(set(numbers))

    async def test_a_list_can_be_narrowed(self, make_jobs: MakeJobs) -> None:
        async with make_jobs() as store:
            await bring_to(store, JobState.RUNNING, new_job("a"))
            await bring_to(store, JobState.FAILED, new_job("b", adapter="chat"))
            await bring_to(store, JobState.RUNNING, new_job("c", adapter="chat"))
            running, failed = JobState.RUNNING, JobState.FAILED
            assert await names(store.jobs("acme", limit=9, states=[running])) == ["c", "a"]
            both = store.jobs("acme", limit=9, states=[running, failed])
            assert await names(both) == ["c", "b", "a"]
            assert await names(store.jobs("acme", limit=9, adapter="chat")) == ["c", "b"]
            narrow = store.jobs("acme", limit=9, adapter="chat", states=[running], before=3)
            assert await names(narrow) == []
            assert await names(store.jobs("acme", limit=1, adapter="chat", before=3)) == ["b"]

    async def test_jobs_that_have_not_ended_are_listed_from_the_oldest(
        self, make_jobs: MakeJobs
    ) -> None:
        async with make_jobs() as store:
            jobs = [
                await bring_to(store, state, new_job(tenant=tenant))
                for state in JobState
                for tenant in ("zeta", "acme")
            ]
            assert await store.active_jobs() == [job.key for job in jobs if job.state in ACTIVE]

    async def test_all_jobs_of_all_tenants_are_counted(self, make_jobs: MakeJobs) -> None:
        async with make_jobs() as store:
            empty = await store.tally()
            assert empty.counts == dict.fromkeys(JobState, 0) and not empty.active
            jobs = [
                await bring_to(store, state, new_job(tenant=tenant))
                for state in JobState
                for tenant in ("zeta", "acme")
            ]
            tally = await store.tally()
            assert tally.counts == dict.fromkeys(JobState, 2)
            active = [job for job in jobs if job.state in ACTIVE]
            assert tally.active == [(job.uid, job.state, job.attempt) for job in active]

    # The end of a job.

    @pytest.mark.parametrize("call", OF_ONE_JOB.values(), ids=OF_ONE_JOB)
    async def test_a_job_that_is_not_there_is_unknown(
        self, make_jobs: MakeJobs, call: Callable[[JobStore, str, str], Awaitable[object]]
    ) -> None:
        async with make_jobs() as store:
            await bring_to(store, JobState.FAILED, new_job("nightly"))
            for tenant, name in (("acme", "other"), ("other", "nightly")):
                with pytest.raises(JobUnknown, match="list what there is"):
                    await call(store, tenant, name)

    @pytest.mark.parametrize("state", ACTIVE)
    async def test_a_job_has_to_end_before_it_is_deleted(
        self, make_jobs: MakeJobs, state: JobState
    ) -> None:
        async with make_jobs() as store:
            job = await bring_to(store, state)
            with pytest.raises(JobActive, match="cancel it") as caught:
                await store.delete_job("acme", job.name)
            assert (caught.value.job, caught.value.state) == (job.name, state)
            assert await store.job("acme", job.name) == job

    @pytest.mark.parametrize("state", FINAL)
    async def test_a_deleted_job_is_gone_and_no_other(
        self, make_jobs: MakeJobs, state: JobState
    ) -> None:
        async with make_jobs() as store:
            job = await bring_to(store, state)
            other = await bring_to(store, state)
            assert await store.delete_job("acme", job.name) == job
            with pytest.raises(JobUnknown):
                await store.job("acme", job.name)
            assert await store.jobs("acme", limit=9) == [other]
            events = await store.job_events("acme", other.name, after=0, limit=99)
            assert len(events) == other.last_sequence

    async def test_the_request_of_a_deleted_job_makes_another(self, make_jobs: MakeJobs) -> None:
        async with make_jobs() as store:
            await add_dataset(store)
            job = await create(store, new_job("nightly"), request_id="r")
            await store.change_job(job, JobChange(state=JobState.FAILED))
            await store.delete_job("acme", "nightly")
            assert (await create(store, new_job("nightly"), request_id="r")).uid != job.uid

    def test_any_course_of_jobs_goes_as_the_model_does(self, make_jobs: MakeJobs) -> None:
        class Machine(JobMachine):
            def __init__(self) -> None:
                super().__init__(make_jobs)

        course = settings(
            max_examples=20,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],  # each example makes a database
        )
        run_state_machine_as_test(Machine, settings=course)
