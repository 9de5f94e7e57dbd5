"""Jobs whose device is lent: when they borrow it, when they give it back, and what they tell."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from store.job_records import EventKind, Intent, JobState
from tests.trainer.job_stage import TENANT, Stage, gone, stage
from tests.trainer.scripted_worker import Script
from trainer import admission
from trainer.devices import CPU, Device, DeviceFacts
from trainer.events import FailureReason, Notice
from trainer.jobs import JOBS_FOLDER
from trainer.model_size import ModelSize
from trainer.reclaim import reclaim
from trainer.recovery import recovery_of

RUNS_ON = Script(steps=20, step_s=0.05, wait_for="go")


class ScriptedLender:
    """Lends the CPU when a test allows it, and notes who has it."""

    def __init__(self) -> None:
        self.may_lend = asyncio.Event()
        self.may_lend.set()
        self.serves = asyncio.Event()
        self.serves.set()
        """Cleared: what was given back does not serve again yet."""
        self.asked: list[str] = []
        self.has_it: dict[str, Callable[[], None]] = {}
        """How to recall it, by uid."""
        self.given_back: list[bool] = []
        """Whether the job was to publish."""
        self.over: set[str] = set()
        """Jobs that were not told of it yet."""
        self.entered = 0

    def lends(self, device: Device) -> bool:
        return device.name == CPU

    async def borrow(
        self,
        device: Device,
        uid: str,
        tell: Callable[[Notice], Awaitable[object]],
        recall: Callable[[], None],
    ) -> None:
        if uid in self.has_it:
            return
        self.asked.append(uid)
        await self.may_lend.wait()
        await tell(Notice(code="DEVICE_LENT", message="now"))
        assert not self.has_it, "one job at a time"
        self.has_it[uid] = recall

    def give_back(self, device: Device, uid: str, *, publishes: bool = False) -> None:
        if self.has_it.pop(uid, None) is not None:
            self.given_back.append(publishes)
            self.over.add(uid)

    def outage(self, uid: str) -> Notice | None:
        if uid not in self.over or not self.serves.is_set():
            return None
        self.over.remove(uid)
        return Notice(code="DEVICE_RETURNED", message="after 3.0 s")

    async def returned(self, uid: str) -> None:
        await self.serves.wait()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        await self.serves.wait()
        self.entered += 1
        yield


@contextlib.asynccontextmanager
async def lent(root: Path, **options: object) -> AsyncIterator[tuple[Stage, ScriptedLender]]:
    lender = ScriptedLender()
    async with stage(root, lender=lender, **options) as s:
        yield s, lender


async def story(s: Stage, name: str) -> list[str]:
    """States and codes of notices, in their order."""
    return [
        str(event.payload["state" if event.kind is EventKind.STATE_CHANGED else "code"])
        for event in await s.events(name)
        if event.kind in (EventKind.STATE_CHANGED, EventKind.NOTICE)
    ]


async def test_a_job_waits_for_its_device_and_is_published_when_that_serves_again(
    tmp_path: Path,
) -> None:
    async with lent(tmp_path) as (s, lender):
        lender.may_lend.clear()
        await s.create("one", RUNS_ON)
        await s.until("one", JobState.QUEUED)
        await asyncio.sleep(0.2)
        assert (await s.job("one")).state is JobState.QUEUED and len(lender.asked) == 1
        lender.may_lend.set()
        job = await s.until_step("one", 1)
        assert s.run_folder(job).borrowed.exists() and lender.has_it
        lender.serves.clear()
        (tmp_path / "go").touch()
        await s.until("one", JobState.FINALIZING)
        await asyncio.sleep(0.2)
        assert lender.given_back == [True] and not s.publisher.published
        lender.serves.set()
        assert (await s.ended("one")).state is JobState.SUCCEEDED
        assert lender.entered == 1 and len(s.publisher.published) == 1
        assert await story(s, "one") == [
            *("validating", "queued", "DEVICE_LENT", "preparing", "running", "finalizing"),
            *("DEVICE_RETURNED", "succeeded"),
        ]


async def test_an_estimate_tells_of_a_loan_and_counts_with_what_it_frees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lent(tmp_path, devices=[Device("0")]) as (s, lender):
        facts = DeviceFacts(80 * 1024**3, 5 * 1024**3, bfloat16=True)
        monkeypatch.setattr(admission, "device_facts", lambda device: facts)
        size = ModelSize(1000, 1000, 4, 8, 16, 64, (("q_proj", 8, 8),))
        monkeypatch.setattr(admission, "model_size", lambda path: size)
        lender.lends = lambda device: True  # type: ignore[method-assign]
        found = await s.jobs.estimate(TENANT, s.spec())
        assert found.memory_available_bytes == int(0.9 * facts.memory_bytes)
        assert any("lends device 0" in warning for warning in found.warnings)
        lender.lends = lambda device: False  # type: ignore[method-assign]
        found = await s.jobs.estimate(TENANT, s.spec())
        assert found.memory_available_bytes == facts.memory_available_bytes
        assert not any("lends" in warning for warning in found.warnings)


@pytest.mark.parametrize("wish", ["pause", "cancel"])
async def test_a_device_goes_back_before_it_was_lent_when_its_job_is_wanted_no_more(
    tmp_path: Path, wish: str
) -> None:
    async with lent(tmp_path) as (s, lender):
        lender.may_lend.clear()
        await s.create("one", RUNS_ON)
        async with asyncio.timeout(10):
            while not lender.asked:
                await asyncio.sleep(0.01)
        if wish == "pause":
            await s.jobs.pause(TENANT, "one")
        else:
            await s.jobs.cancel(TENANT, "one", discard=False)
        await s.until("one", JobState.PAUSED, JobState.CANCELLED)
        lender.may_lend.set()
        await s.create("two", Script())
        assert (await s.ended("two")).state is JobState.SUCCEEDED, "it has the device"
        assert not lender.has_it


async def test_a_device_goes_back_on_pause_and_failure_and_while_a_job_waits_to_recover(
    tmp_path: Path,
) -> None:
    async with lent(tmp_path) as (s, lender):
        await s.create("paused", RUNS_ON)
        await s.until_step("paused", 2)
        await s.jobs.pause(TENANT, "paused")
        await s.until("paused", JobState.PAUSED)
        assert not lender.has_it and lender.given_back == [False]
        await s.create("fails", Script(fail=FailureReason.LOSS_DIVERGED))
        assert (await s.ended("fails")).state is JobState.FAILED
        assert not lender.has_it and lender.given_back == [False] * 2
        await s.create("dies", Script(die_at=1, well_from=2, save_each=True))
        await s.until("dies", JobState.RECOVERING)
        assert not lender.has_it and lender.given_back == [False] * 3
        job = await s.ended("dies")
        assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2), job.error
        told = await story(s, "dies")
        assert told.count("DEVICE_LENT") == 2 and told.count("DEVICE_RETURNED") == 2
        assert (await story(s, "paused"))[-2:] == ["paused", "DEVICE_RETURNED"]


async def test_a_job_that_is_recalled_saves_gives_back_and_goes_on_by_itself(
    tmp_path: Path,
) -> None:
    async with lent(tmp_path) as (s, lender):
        await s.create("one", RUNS_ON)
        job = await s.until_step("one", 3)
        lender.may_lend.clear()
        lender.has_it[job.uid]()
        async with asyncio.timeout(20):
            while "queued" not in (await story(s, "one"))[3:]:
                await asyncio.sleep(0.02)
        assert not lender.has_it and not s.processes(job)
        lender.may_lend.set()
        (tmp_path / "go").touch()
        job = await s.ended("one")
        assert (job.state, job.attempt, job.intent) == (JobState.SUCCEEDED, 2, Intent.RUN), (
            job.error
        )
        assert recovery_of(job).spent == 0 and recovery_of(job).lost_steps == 0
        steps = await s.steps("one")
        assert steps == list(range(1, 21)), "each once"
        told = await story(s, "one")
        begin = told.index("pausing")
        assert told[begin : begin + 6] == [
            *("pausing", "DEVICE_RECALLED", "paused", "queued", "DEVICE_RETURNED", "DEVICE_LENT")
        ]


async def test_a_job_that_is_recalled_before_it_has_begun_waits_again(tmp_path: Path) -> None:
    """The lender wants the device back while the attempt is being written down."""
    async with lent(tmp_path) as (s, lender):
        recalls: list[str] = []
        borrow = lender.borrow

        async def borrow_and_recall(
            device: Device,
            uid: str,
            tell: Callable[[Notice], Awaitable[object]],
            recall: Callable[[], None],
        ) -> None:
            await borrow(device, uid, tell, recall)
            if not recalls:
                recalls.append(uid)
                recall()

        lender.borrow = borrow_and_recall  # type: ignore[method-assign]
        await s.create("one", Script())
        assert (await s.ended("one")).state is JobState.SUCCEEDED
        assert recalls and lender.given_back == [False, True]


async def test_what_was_lent_when_the_gateway_ended_is_taken_back_before_the_next_serves(
    tmp_path: Path,
) -> None:
    async with lent(tmp_path) as (s, lender):
        await s.create("one", RUNS_ON)
        job = await s.until_step("one", 3)
        processes = s.processes(job)
        await s.stop()
        assert await reclaim(s.store, tmp_path / JOBS_FOLDER) == 1
        assert gone(processes)
        job = await s.job("one")
        assert (job.state, job.intent) == (JobState.PAUSING, Intent.RUN)
        assert await reclaim(s.store, tmp_path / JOBS_FOLDER) == 0, "nothing runs"
        lender.has_it.clear()  # another process lends now
        s.jobs = s._make()
        await s.start()
        (tmp_path / "go").touch()
        job = await s.ended("one")
        assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2), job.error
        assert recovery_of(job).spent == 0 and await s.steps("one") == list(range(1, 21))
        told = await story(s, "one")
        assert told[told.index("pausing") + 1] == "DEVICE_RECLAIMED"


async def test_what_was_not_lent_goes_on_without_the_gateway(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.create("one", RUNS_ON)
        job = await s.until_step("one", 3)
        processes = s.processes(job)
        await s.stop()
        assert await reclaim(s.store, tmp_path / JOBS_FOLDER) == 0
        assert s.processes(job) == processes
        assert (await s.job("one")).state is JobState.RUNNING
