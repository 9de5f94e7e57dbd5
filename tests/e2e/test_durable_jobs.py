"""Jobs of a real gateway outlive what kills their processes, and what kills the gateway."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from lora_gateway.v1 import errors_pb2
from lora_gateway.v1 import training_pb2 as pb
from tests.e2e import training
from tests.e2e.scripted_gateway import ScriptedGateway, Watch, scripted_gateway
from tests.trainer.scripted_worker import Script
from trainer.events import FailureReason

STEPS = 30
RUNS = Script(steps=STEPS, step_s=0.1, load_s=1.0, save_at=2, save_s=0.5)
STALL_TIMEOUT_S = 5

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]  # three minutes


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ScriptedGateway]:
    folder = tmp_path_factory.mktemp("durable")
    with scripted_gateway(folder, ["--training-stall-timeout-s", str(STALL_TIMEOUT_S)]) as found:
        async with found.channel() as channel:
            await training.upload(channel, "facts", training.facts())
            await training.upload(channel, "many", training.facts(200))
        yield found


def whole(watch: Watch, job: pb.Job, steps: int = STEPS) -> None:
    """Every step was told, and after a loss from the checkpoint on once more."""
    assert job.state == pb.JOB_STATE_SUCCEEDED, job.error
    # An evaluation tells the step that it comes after once more, and no loss of that step.
    told = [event.progress.step for event in watch.events if event.progress.HasField("loss")]
    assert set(told) == set(range(1, steps + 1))
    back = [(before, step) for before, step in itertools.pairwise(told) if step <= before]
    assert sum(before - step + 1 for before, step in back) == job.lost_steps


def kill_training(gateway: ScriptedGateway) -> int:
    killed = gateway.training()
    for process in killed:
        process.kill()
    return len(killed)


@pytest.mark.parametrize("moment", ["preparing", "running", "pausing", "cancelling"])
async def test_kill_job_process(gateway: ScriptedGateway, moment: str) -> None:
    name = f"process-{moment}"
    await gateway.create(name, RUNS)
    watch = Watch(gateway, name)
    await watch.until(pb.JOB_STATE_PREPARING)
    if moment != "preparing":
        await watch.until(step=3)
    if moment == "pausing":
        assert (await gateway.wish("Pause", name)).state == pb.JOB_STATE_PAUSING
    if moment == "cancelling":
        await gateway.wish("Cancel", name)
    async with asyncio.timeout(120):
        while not kill_training(gateway):
            await asyncio.sleep(0.02)
    if moment == "pausing":
        await watch.until(pb.JOB_STATE_PAUSED)
        assert (await gateway.wish("Resume", name)).state == pb.JOB_STATE_QUEUED
    job = await watch.end()
    if moment == "cancelling":
        assert job.state == pb.JOB_STATE_CANCELLED
    else:
        whole(watch, job)
        assert job.attempt == 2
    print(f"1 kill point: {name}, {len(watch.events)} events, {watch.states}")


async def test_kill_job_process_loses_no_more_than_the_checkpoint_interval(
    gateway: ScriptedGateway,
) -> None:
    """With real training, all of it within one epoch: what is saved is saved by time."""
    interval_s = 1
    await gateway.create("interval", dataset="many", epochs=1, checkpoint_interval_s=interval_s)
    watch = Watch(gateway, "interval")
    step = 0
    while sum(event.HasField("checkpoint") for event in watch.events) < 2:
        step += 3
        await watch.until(step=step)
    assert kill_training(gateway)
    job = await watch.end()
    whole(watch, job, job.progress.total_steps)

    assert job.attempt == 2 and job.resumed_from.step
    first = [event for event in watch.events if event.attempt == 1]
    told = [event for event in first if event.progress.HasField("loss")]
    assert job.lost_steps == told[-1].progress.step - job.resumed_from.step
    times_s = [event.time.ToNanoseconds() / 1e9 for event in told]
    longest_s = max(after - before for before, after in itertools.pairwise(times_s))
    saved_s = job.resumed_from.create_time.ToNanoseconds() / 1e9
    lost_s = times_s[-1] - saved_s
    assert lost_s <= interval_s + longest_s, "the step that runs may take longer than the last"
    print(
        f"1 kill point: {job.lost_steps} steps and {max(0.0, lost_s):.2f} s were lost, of "
        f"{times_s[-1] - times_s[0]:.1f} s; the interval is {interval_s} s, a step took at most "
        f"{longest_s:.2f} s"
    )


async def test_pause_saves_and_resume_goes_on_with_real_training(
    gateway: ScriptedGateway,
) -> None:
    await gateway.create("pause", epochs=40)
    watch = Watch(gateway, "pause")
    await watch.until(step=2)
    assert (await gateway.wish("Pause", "pause")).state == pb.JOB_STATE_PAUSING
    await watch.until(pb.JOB_STATE_PAUSED)
    assert not gateway.training(), "the device is free"
    told = watch.steps[-1]
    await gateway.wish("Resume", "pause")
    job = await watch.end()
    assert job.state == pb.JOB_STATE_SUCCEEDED, job.error
    assert (job.attempt, job.lost_steps, job.attempts_left) == (2, 0, 3)
    assert job.resumed_from.step == told
    steps = [e.progress.step for e in watch.events if e.progress.HasField("loss")]
    assert steps == list(range(1, job.progress.total_steps + 1))


async def test_oom_halves_what_is_computed_at_once(gateway: ScriptedGateway) -> None:
    script = RUNS.model_copy(update={"memory_rows": 2})
    await gateway.create("oom", script, micro_batch_size=8, gradient_accumulation=1)
    watch = Watch(gateway, "oom")
    job = await watch.end()
    whole(watch, job)
    shape = job.effective_spec.hyperparameters
    assert (shape.micro_batch_size, shape.gradient_accumulation) == (2, 4)
    assert (job.attempt, job.attempts_left) == (3, 3)
    assert [notice.code for notice in job.notices] == ["MICRO_BATCH_HALVED"] * 2


async def test_diverge_stops_the_job_and_is_not_tried_again(gateway: ScriptedGateway) -> None:
    script = Script(steps=3, save_each=True, fail=FailureReason.LOSS_DIVERGED)
    await gateway.create("diverge", script)
    job = await Watch(gateway, "diverge").end()
    assert (job.state, job.attempt) == (pb.JOB_STATE_FAILED, 1)
    assert job.error.reason == errors_pb2.ERROR_REASON_LOSS_DIVERGED
    assert not job.publication.version


async def test_hang_is_ended_and_followed_by_another_attempt(gateway: ScriptedGateway) -> None:
    await gateway.create("hang", RUNS.model_copy(update={"hang_at": 5, "well_from": 2}))
    watch = Watch(gateway, "hang")
    job = await watch.end()
    whole(watch, job)
    [recovering] = [e for e in watch.events if e.state_changed.state == pb.JOB_STATE_RECOVERING]
    assert "did not get on for" in recovering.state_changed.error.message


async def test_kill_job_host_with_jobs_in_several_states(gateway: ScriptedGateway) -> None:
    """Last: it is another process after that."""
    waits = RUNS.model_copy(update={"wait_for": "go"})
    await gateway.create("host-paused", RUNS)
    watches = {"host-paused": Watch(gateway, "host-paused")}
    await watches["host-paused"].until(step=3)
    await gateway.wish("Pause", "host-paused")
    await watches["host-paused"].until(pb.JOB_STATE_PAUSED)
    for name in ("host-running", "host-queued"):
        await gateway.create(name, waits)
        watches[name] = Watch(gateway, name)
    await watches["host-running"].until(step=3)
    await watches["host-queued"].until(pb.JOB_STATE_QUEUED)
    [process] = gateway.training()
    gateway.kill_and_start()
    assert [found.pid for found in gateway.training()] == [process.pid], "it went on"
    (gateway.state / "go").touch()
    assert (await gateway.get("host-paused")).state == pb.JOB_STATE_PAUSED
    await gateway.wish("Resume", "host-paused")
    for name, watch in watches.items():
        job = await watch.end()
        whole(watch, job)
        assert job.attempt == (2 if name == "host-paused" else 1)
        assert job.lost_steps == 0
    print(f"3 kill points: {', '.join(watches)}")


KILLED = {
    "validating": "VALIDATING",
    "queued": "QUEUED",
    "preparing": "PREPARING",
    "running": "RUNNING",
    "pausing": "PAUSING",
    "paused": "PAUSED",
    "recovering": "RECOVERING",
    "cancelling": "CANCELLING",
    "finalizing": "FINALIZING",
}


@pytest.mark.parametrize("moment", KILLED)
async def test_kill_job_host_at_each_state(gateway: ScriptedGateway, moment: str) -> None:
    """Killed as soon as a watcher hears of the state."""
    name, state = f"host-at-{moment}", KILLED[moment]
    script = RUNS
    if moment == "recovering":
        script = RUNS.model_copy(update={"die_at": 4, "well_from": 2})
    await gateway.create(name, script, publish=moment == "finalizing")
    watch = Watch(gateway, name)
    if moment in ("pausing", "paused", "cancelling"):
        await watch.until(step=3)
        await gateway.wish("Cancel" if moment == "cancelling" else "Pause", name)
    await watch.until(pb.JobState.Value(f"JOB_STATE_{state}"))
    gateway.kill_and_start()
    if moment in ("pausing", "paused"):
        await watch.until(pb.JOB_STATE_PAUSED)
        await gateway.wish("Resume", name)
    job = await watch.end()
    if moment == "cancelling":
        assert job.state == pb.JOB_STATE_CANCELLED
    else:
        whole(watch, job)
    print(f"1 kill point: host at {state}, {len(watch.events)} events, {watch.states}")
