"""What every job store does with datasets, whatever database is behind it."""

from __future__ import annotations

import pytest

from store.job_records import (
    DatasetExists,
    DatasetInUse,
    DatasetRecord,
    DatasetUnknown,
    JobState,
)
from store.records import InvalidName
from tests.store.job_steps import MakeJobs, add_dataset, bring_to, create, new_job
from tests.store.registry_steps import ONE, TWO, Ticks

FINAL = [state for state in JobState if state.is_final]
ACTIVE = [state for state in JobState if not state.is_final]


class DatasetContract:
    """Tests of datasets alone, and of jobs that need them."""

    async def test_a_dataset_is_kept_as_it_was_told(self, make_jobs: MakeJobs) -> None:
        async with make_jobs(clock_ns=Ticks(70)) as store:
            record = await add_dataset(store)
            assert record == DatasetRecord("acme", "corpus", ONE, 12, "chat", record.create_time_ns)
            assert record.create_time_ns > 70
            assert await store.dataset("acme", "corpus") == record
        async with make_jobs() as again:
            assert await again.dataset("acme", "corpus") == record

    async def test_the_same_bytes_again_are_the_same_dataset(self, make_jobs: MakeJobs) -> None:
        async with make_jobs(clock_ns=Ticks()) as store:
            record = await add_dataset(store)
            assert await add_dataset(store) == record
            asked = await store.add_dataset("acme", "corpus", sha256=ONE, size_bytes=12, format="")
            assert asked == record, "no format is asked for, so it is as it was"
            assert await store.datasets("acme", limit=9) == [record]

    @pytest.mark.parametrize(("sha256", "format"), [(TWO, "chat"), (TWO, ""), (ONE, "alpaca")])
    async def test_a_name_stands_for_its_first_bytes(
        self, make_jobs: MakeJobs, sha256: str, format: str
    ) -> None:
        async with make_jobs() as store:
            record = await add_dataset(store)
            with pytest.raises(DatasetExists, match="take another name"):
                await store.add_dataset(
                    "acme", "corpus", sha256=sha256, size_bytes=12, format=format
                )
            assert await store.datasets("acme", limit=9) == [record]

    @pytest.mark.parametrize(("tenant", "name"), [("acme", "Corpus"), ("..", "a"), ("acme", "")])
    async def test_names_keep_to_the_rules(
        self, make_jobs: MakeJobs, tenant: str, name: str
    ) -> None:
        async with make_jobs() as store:
            with pytest.raises(InvalidName):
                await add_dataset(store, name, tenant=tenant)

    async def test_what_is_no_digest_is_refused(self, make_jobs: MakeJobs) -> None:
        async with make_jobs() as store:
            with pytest.raises(ValueError, match="not a SHA-256"):
                await add_dataset(store, sha256="../../etc")

    async def test_datasets_are_listed_by_name_and_page(self, make_jobs: MakeJobs) -> None:
        async with make_jobs() as store:
            for name in ("c", "a", "d", "b"):
                await add_dataset(store, name)
            await add_dataset(store, "bb", tenant="other")

            async def names(after: str, limit: int) -> list[str]:
                return [
                    found.name for found in await store.datasets("acme", after=after, limit=limit)
                ]

            assert await names("", 2) == ["a", "b"]
            assert await names("b", 9) == ["c", "d"]
            assert await names("d", 9) == []
            with pytest.raises(ValueError, match="at least 1"):
                await store.datasets("acme", limit=0)

    async def test_a_tenant_sees_its_own_alone(self, make_jobs: MakeJobs) -> None:
        async with make_jobs() as store:
            await add_dataset(store)
            assert await store.datasets("other", limit=9) == []
            for call in (store.dataset, store.remove_dataset):
                with pytest.raises(DatasetUnknown, match="upload it"):
                    await call("other", "corpus")
            with pytest.raises(DatasetUnknown):
                await create(store, new_job(tenant="other"))

    async def test_bytes_are_in_use_until_their_last_name_is_gone(
        self, make_jobs: MakeJobs
    ) -> None:
        async with make_jobs() as store:
            await add_dataset(store, "a")
            await add_dataset(store, "b")
            await add_dataset(store, "a", tenant="other")
            await add_dataset(store, "c", sha256=TWO)
            assert await store.dataset_digests() == {ONE, TWO}
            assert await store.remove_dataset("acme", "a") is False
            assert await store.remove_dataset("other", "a") is False
            assert await store.remove_dataset("acme", "b") is True
            assert await store.dataset_digests() == {TWO}
            with pytest.raises(DatasetUnknown):
                await store.dataset("acme", "b")

    @pytest.mark.parametrize("state", ACTIVE)
    async def test_a_dataset_stays_while_a_job_needs_it(
        self, make_jobs: MakeJobs, state: JobState
    ) -> None:
        async with make_jobs() as store:
            await add_dataset(store, "held-out", sha256=TWO)
            job = await bring_to(store, state, new_job(eval_dataset="held-out"))
            for dataset in ("corpus", "held-out"):
                with pytest.raises(DatasetInUse, match="cancel it, or wait") as caught:
                    await store.remove_dataset("acme", dataset)
                assert (caught.value.dataset, caught.value.job) == (dataset, job.name)
            await add_dataset(store, tenant="other")
            assert await store.remove_dataset("other", "corpus") is False  # another's

    @pytest.mark.parametrize("state", FINAL)
    async def test_a_dataset_may_go_once_its_job_has_ended(
        self, make_jobs: MakeJobs, state: JobState
    ) -> None:
        async with make_jobs() as store:
            job = await bring_to(store, state)
            assert await store.remove_dataset("acme", "corpus") is True
            assert await store.job("acme", job.name) == job
