"""`gateway jobs`, against a real gRPC server in this process."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.curves import EVALUATION
from gateway.training_options import (
    BackendName,
    FormatName,
    PrecisionName,
    QuantizationName,
    StateName,
)
from lora_gateway import Backend, DatasetFormat, ErrorReason, JobState, Precision, Quantization
from lora_gateway.v1 import training_pb2 as pb
from tests.client.fake_training import FakeTraining, progress, served, states
from tests.gateway.adapters_command import SOON_S, ended, started
from tests.gateway.training_command import invoked, printed, rows

REPLACED = "\N{REPLACEMENT CHARACTER}"

GATE = pb.GateReport(
    rows=8,
    tokens=200,
    logprob_delta_mean=0.012,
    logprob_delta_max=0.5,
    eval_loss=1.25,
    base_eval_loss=2.5,
    effect_mean=0.75,
    trained_effect_mean=0.8,
    effect_ratio=0.9375,
    limits=pb.GateSpec(max_logprob_delta_mean=0.2, max_eval_loss_ratio=1, min_effect_ratio=0.5),
    trained_as="nf4/bfloat16",
    served_as="bfloat16",
)
SERVING = pb.Publication(
    state=pb.PUBLICATION_STATE_SERVING,
    adapter="support",
    version=2,
    traffic_percent=10,
    gate=GATE,
)
REJECTED = pb.Publication(
    state=pb.PUBLICATION_STATE_REJECTED,
    adapter="support",
    reasons=["eval loss 2.6 is above the base model's 2.5"],
)


@pytest.fixture
def training() -> FakeTraining:
    training = FakeTraining()
    training.add_dataset("data")
    return training


@pytest.fixture
async def target(training: FakeTraining) -> AsyncIterator[str]:
    async with served(training) as target:
        yield target


async def ran(training: FakeTraining, *after: pb.Publication, end: str = "SUCCEEDED") -> None:
    """A job of three steps that has ended."""
    await training.add_job("run")
    steps = [progress(step, 3, 2.0 / step) for step in range(1, 4)]
    evaluated = pb.Progress(step=3, total_steps=3, eval_loss=0.7)
    await training.tell("run", *states("RUNNING"), *steps, evaluated, *after, *states(end))


# --- looking


async def test_list_and_show_are_tables_or_json(target: str, training: FakeTraining) -> None:
    await ran(training, SERVING)
    await training.add_job("other", pb.JobSpec(dataset="data", adapter="other"))
    await training.add_job("next", pb.JobSpec(dataset="data", adapter="next"))
    training.jobs["next"].MergeFrom(pb.Job(queue_position=7, priority=-3))
    training.jobs["run"].notices.add(code="OPTIMIZER_MAPPED", message="to \x1b[31mADAMW\n")

    header, *lines = (await printed("jobs", "list", target=target)).splitlines()
    assert header.split()[:5] == ["job", "state", "queue", "priority", "adapter"]
    assert header.split()[5:8] == ["dataset", "step", "loss"]
    assert lines[0].split()[2:5] == ["7", "-3", "next"]
    assert [line.split()[:3] for line in lines[1:]] == [
        ["other", "VALIDATING", "other"],
        ["run", "SUCCEEDED", "support"],
    ]
    assert lines[2].split()[4:6] == ["3/3", "0.6667"], "of the step before the evaluation"
    only = await printed("jobs", "list", "--state", "succeeded", "--json", target=target)
    assert [job["name"] for job in json.loads(only)["jobs"]] == ["run"]
    only = await printed("jobs", "list", "--adapter", "other", "--json", target=target)
    assert [job["name"] for job in json.loads(only)["jobs"]] == ["other"]

    shown = rows(await printed("jobs", "show", "next", target=target))
    assert (shown["queue_position"], shown["priority"]) == ("7", "-3")
    shown = rows(await printed("jobs", "show", "run", target=target))
    assert shown["state"] == "SUCCEEDED"
    assert not {"queue_position", "priority"} & set(shown)
    assert shown["progress"].startswith("step 3/3, loss 0.6667, eval loss 0.7")
    assert shown["published"] == "SERVING support@2 with 10 % of the traffic"
    assert shown["logprob difference"].startswith("mean 0.012 (at most 0.2), worst 0.5 (trainer")
    assert shown["effect"] == "0.75 nats a token, 0.94 of the trainer's 0.8 (at least 0.5)"
    assert shown["eval loss"] == "1.25, the base model has 2.5 (at most 1 of it)"
    assert shown["notice"] == f"OPTIMIZER_MAPPED: to {REPLACED}[31mADAMW"
    document = json.loads(await printed("jobs", "show", "run", "--json", target=target))
    assert document["publication"]["version"] == 2


async def test_a_job_that_is_unknown_is_one_line(target: str) -> None:
    result = await invoked("jobs", "show", "nobody", target=target)
    assert (result.code, result.output) == (1, "")
    assert result.errors == "error: NOT_FOUND JOB_NOT_FOUND: job 'nobody' is unknown\n"


# --- watching


async def test_watch_in_a_pipe_is_a_line_an_event_but_not_a_line_a_step(
    target: str, training: FakeTraining
) -> None:
    await ran(training, SERVING)
    output = await printed("jobs", "watch", "run", target=target)
    lines = output.splitlines()
    assert lines[0] == "1 2026-01-02T03:04:05Z VALIDATING"
    assert [line.split()[0] for line in lines[:7]] == ["1", "2", "3", "5", "6", "7", "8"]
    assert "step 1/3, loss 2, lr 0.0001333, 123 tokens/s, ETA 0:00:02" in lines[2]
    assert "publication SERVING support@2" in lines[5]
    assert lines[-1] == "job run SUCCEEDED"


async def test_watch_prints_json_a_line_and_the_job_at_the_end(
    target: str, training: FakeTraining
) -> None:
    await ran(training)
    output = await printed("jobs", "watch", "run", "--after", "2", "--json", target=target)
    *events, end = [json.loads(line) for line in output.splitlines()]
    assert [int(event["event"]["sequence"]) for event in events] == [3, 4, 5, 6, 7]
    assert end["job"]["state"] == "JOB_STATE_SUCCEEDED"


async def test_watch_says_by_its_code_what_became_of_the_job(
    target: str, training: FakeTraining
) -> None:
    await ran(training, REJECTED)
    result = await invoked("jobs", "watch", "run", target=target)
    assert result.code == 1
    assert "reason" in result.output
    assert rows(result.output)["reason"] == REJECTED.reasons[0]
    assert "was not published" in result.errors

    failed = pb.StateChanged(state=pb.JOB_STATE_FAILED)
    failed.error.message = "the loss is NaN; lower the learning rate"
    failed.error.reason = ErrorReason.ERROR_REASON_LOSS_DIVERGED
    await training.add_job("nan")
    await training.tell("nan", failed)
    result = await invoked("jobs", "watch", "nan", target=target)
    assert result.code == 1
    assert "FAILED LOSS_DIVERGED: the loss is NaN" in result.output
    assert result.errors.startswith("error: LOSS_DIVERGED: the loss is NaN; lower")
    assert "gateway jobs logs nan" in result.errors

    await training.add_job("gone")
    await training.tell("gone", *states("CANCELLING", "CANCELLED"))
    assert (await invoked("jobs", "watch", "gone", target=target)).code == 1


async def test_ctrl_c_leaves_the_job_to_itself(target: str, training: FakeTraining) -> None:
    await training.add_job("run")
    process = await started("run", target=target, command=("jobs", "watch"))
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), SOON_S)
    assert line == b"1 2026-01-02T03:04:05Z VALIDATING\n"
    process.send_signal(signal.SIGINT)
    result = await ended(process)
    assert (result.code, result.output) == (130, "")
    assert "come back:  gateway jobs watch run" in result.errors
    assert "cancel it:  gateway jobs cancel run" in result.errors
    assert training.jobs["run"].state == pb.JOB_STATE_VALIDATING


async def test_watch_at_a_terminal_has_a_bar_and_ends_with_the_curve(
    target: str, training: FakeTraining
) -> None:
    await training.add_job("run")
    await training.tell("run", *states("RUNNING"), progress(1, 3, 2.0))
    ours, theirs = pty.openpty()
    process = await started("run", target=target, command=("jobs", "watch"), stdout=theirs)
    os.close(theirs)
    os.set_blocking(ours, False)
    screen = ""

    async def shows(text: str) -> None:
        nonlocal screen
        async with asyncio.timeout(SOON_S):
            while text not in screen:
                try:
                    screen += os.read(ours, 65536).decode(errors="replace")
                except BlockingIOError:
                    await asyncio.sleep(0.05)

    await shows("loss 2.0000")
    await shows("1/3")
    last = progress(3, 3, 0.5)
    last.eval_loss = 0.7
    await training.tell("run", progress(2, 3, 1.0), last, SERVING, *states("SUCCEEDED"))
    await shows("job run SUCCEEDED")
    os.close(ours)
    assert (await ended(process)).code == 0
    assert "123 tokens/s" in screen
    assert f"loss by step  {EVALUATION} eval loss" in screen
    assert screen.index("loss by step") < screen.index("gate rows")


# --- ending, publishing


async def test_pause_and_resume(target: str, training: FakeTraining) -> None:
    await training.add_job("run")
    shown = rows(await printed("jobs", "pause", "run", target=target))
    assert shown["state"] == "PAUSING"
    training.jobs["run"].attempt, training.jobs["run"].attempts_left = 2, 1
    training.jobs["run"].resumed_from.step = 7
    training.jobs["run"].lost_steps = 3
    shown = rows(await printed("jobs", "resume", "run", target=target))
    assert (shown["state"], shown["attempt"]) == ("QUEUED", "2, 1 left")
    assert (shown["resumed_from"], shown["lost_steps"]) == ("step 7", "3")
    await training.tell("run", *states("FAILED"))
    for word in ("pause", "resume"):
        refused = await invoked("jobs", word, "run", target=target)
        assert (refused.code, "JOB_NOT_" in refused.errors) == (1, True)


async def test_cancel_delete_checkpoints_and_publish(target: str, training: FakeTraining) -> None:
    await training.add_job("run")
    await training.tell("run", pb.Checkpoint(step=5, size_bytes=2048, eval_loss=0.5, final=True))
    cancelled = rows(await printed("jobs", "cancel", "run", "--discard", target=target))
    assert cancelled["state"] == "CANCELLING"
    assert training.requests[-1] == pb.CancelJobRequest(name="run", discard=True)

    refused = await invoked("jobs", "delete", "run", target=target)
    assert (refused.code, "JOB_ACTIVE" in refused.errors) == (1, True)

    _, line = (await printed("jobs", "checkpoints", "run", target=target)).splitlines()
    assert line.split()[:4] == ["5", "2.0", "KiB", "0.5"]

    arguments = ("--step", "5", "--adapter", "other", "--canary", "10")
    published = rows(await printed("jobs", "publish", "run", *arguments, target=target))
    assert published["published"] == "SERVING other@7 with 10 % of the traffic"
    assert training.requests[-1] == pb.PublishCheckpointRequest(
        name="run", step=5, adapter="other", publish=pb.PublishSpec(traffic_percent=10)
    )
    await printed("jobs", "publish", "run", target=target)
    assert training.requests[-1] == pb.PublishCheckpointRequest(name="run")

    both = await invoked("jobs", "publish", "run", "--canary", "1", "--all-traffic", target=target)
    assert (both.code, "goes without --canary" in both.errors) == (2, True)

    await training.tell("run", *states("CANCELLED"))
    assert await printed("jobs", "delete", "run", target=target) == "deleted job run\n"


# --- logs, plots


async def test_logs_are_whole_characters_without_control(
    target: str, training: FakeTraining
) -> None:
    await ran(training)
    for data in (b"10%\r20%\n", "Stü".encode()[:3], "ü".encode()[1:] + b"ck\x1b[31m\t!\n", b"\xff"):
        await training.log("run", data)
    output = await printed("jobs", "logs", "run", target=target)
    assert output == f"10%\n20%\nStück{REPLACED}[31m\t!\n{REPLACED}"
    assert (await printed("jobs", "logs", "run", "--offset", "4", target=target))[:4] == "20%\n"


async def test_plot_writes_a_png_of_a_job_that_still_runs(
    target: str, training: FakeTraining, tmp_path: Path
) -> None:
    await training.add_job("run")
    steps = [progress(step, 90, 2.0 / step) for step in range(1, 30)]
    steps[9].loss = float("nan")
    steps[9].eval_loss = 0.7
    await training.tell("run", *steps)
    path = tmp_path / "run.png"
    output = await printed("jobs", "plot", "run", "--output", str(path), target=target)
    assert output == f"{path}\n"
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (1080, 1080)


@pytest.mark.parametrize(
    ("name", "text"), [("missing/run.png", "cannot be written"), ("run.txt", "not supported")]
)
async def test_a_plot_that_cannot_be_written_is_one_line(
    target: str, training: FakeTraining, tmp_path: Path, name: str, text: str
) -> None:
    await ran(training)
    result = await invoked("jobs", "plot", "run", "-o", str(tmp_path / name), target=target)
    assert (result.code, result.output) == (1, "")
    assert text in result.errors


async def test_a_job_without_steps_has_no_plot(
    target: str, training: FakeTraining, tmp_path: Path
) -> None:
    await training.add_job("run")
    result = await invoked("jobs", "plot", "run", "-o", str(tmp_path / "run.png"), target=target)
    assert (result.code, "no step yet" in result.errors) == (1, True)
    assert not os.listdir(tmp_path)


def test_each_value_of_the_contract_can_be_typed() -> None:
    assert {name.message for name in FormatName} == set(DatasetFormat.values()) - {0}
    assert {name.message for name in BackendName} == set(Backend.values()) - {0}
    assert {name.message for name in QuantizationName} == set(Quantization.values()) - {0}
    assert {name.message for name in PrecisionName} == set(Precision.values()) - {0}
    assert {name.message for name in StateName} == set(JobState.values()) - {0}
