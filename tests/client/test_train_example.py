"""The program examples/train.py, against a real gRPC server in this process."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lora_gateway.v1 import training_pb2 as pb
from tests.client.fake_inference import FakeInference
from tests.client.fake_training import FakeTraining, progress, served, states

PROGRAM = Path(__file__).parents[2] / "examples" / "train.py"
TIMEOUT_S = 60.0


@pytest.fixture
def training() -> FakeTraining:
    return FakeTraining()


@pytest.fixture
async def target(training: FakeTraining) -> AsyncIterator[str]:
    async with served(training, FakeInference()) as target:
        yield target


async def run(target: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the program."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(PROGRAM), target),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


def publication(state: pb.PublicationState.ValueType, *reasons: str) -> pb.Publication:
    return pb.Publication(state=state, adapter="support", version=3, reasons=reasons)


async def test_it_tells_each_step_and_then_asks_the_new_version(
    target: str, training: FakeTraining
) -> None:
    training.script = [
        *states("RUNNING"),
        pb.Notice(code="OPTIMIZER_MAPPED", message="on a CPU"),
        progress(1, 2, 2.5),
        pb.Progress(step=1, total_steps=2, eval_loss=1.25),
        publication(pb.PUBLICATION_STATE_SERVING),
        *states("SUCCEEDED"),
    ]
    code, output, errors = await run(target)
    assert (code, errors) == (0, "")
    (job,) = training.jobs.values()
    assert job.spec.publish.traffic_percent == 10
    assert job.spec.dataset in training.datasets
    for line in (
        "1 JOB_STATE_VALIDATING",
        "3 OPTIMIZER_MAPPED: on a CPU",
        "4 step 1/2 loss 2.500",
        "5 step 1/2 eval loss 1.250",
        "7 JOB_STATE_SUCCEEDED",
    ):
        assert f"   {line}\n" in output
    assert "support@3: " in output


async def test_it_fails_with_the_reasons_of_the_gate(target: str, training: FakeTraining) -> None:
    training.script = [
        *states("RUNNING"),
        publication(pb.PUBLICATION_STATE_REJECTED, "it changes nothing"),
        *states("SUCCEEDED"),
    ]
    code, output, errors = await run(target)
    assert code == 1
    assert "it changes nothing" in errors
    assert "support@3" not in output
