"""`gateway train`, against a real gRPC server in this process."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from gateway.first_prompt import first_prompt
from lora_gateway import ChatMessage
from lora_gateway.v1 import inference_pb2
from lora_gateway.v1 import training_pb2 as pb
from tests.client.fake_adapters import refusal
from tests.client.fake_inference import FakeInference
from tests.client.fake_training import FakeTraining, progress, served, states
from tests.gateway.adapters_command import SOON_S, ended, started
from tests.gateway.test_cli_jobs import REJECTED, SERVING
from tests.gateway.training_command import invoked, rows

ROW = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Where is my parcel?"},
        {"role": "assistant", "content": "On its way."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Bye"},
    ]
}
STEPS = [progress(step, 3, 2.0 / step) for step in range(1, 4)]


@pytest.fixture
def training() -> FakeTraining:
    training = FakeTraining()
    training.script = [*states("RUNNING"), *STEPS, SERVING, *states("SUCCEEDED")]
    return training


@pytest.fixture
def inference() -> FakeInference:
    return FakeInference()


@pytest.fixture
async def target(training: FakeTraining, inference: FakeInference) -> AsyncIterator[str]:
    async with served(training, inference) as target:
        yield target


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "support.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    return path


async def test_train_goes_from_a_file_to_two_answers(
    target: str, training: FakeTraining, inference: FakeInference, file: Path
) -> None:
    result = await invoked(
        *("train", str(file), "--adapter", "support", "--canary", "10"), target=target
    )
    assert (result.code, result.errors) == (0, "")
    shown = rows(result.output)
    (dataset,) = training.datasets
    assert dataset.startswith("support-")
    assert (shown["dataset"], shown["valid"], shown["steps"]) == (dataset, "yes", "3")
    assert shown["job"] == "support-1"
    assert "step 3/3, loss 0.6667" in result.output
    assert shown["published"] == "SERVING support@2 with 10 % of the traffic"
    assert shown["effect"] == "0.75 nats a token, 0.94 of the trainer's 0.8 (at least 0.5)"

    # The dataset's first question, asked of both as it was trained on.
    assert shown["prompt"] == "Where is my parcel?"
    assert (shown["base model"], shown["support@2"]) == ("Where is my parcel?",) * 2
    asked = sorted(inference.requests, key=lambda request: request.version)
    assert [(request.adapter, request.version) for request in asked] == [("", 0), ("support", 2)]
    for request in asked:
        roles = [message.role for message in request.chat.messages]
        assert roles == ["system", "user"]
        assert request.sampling.temperature == 0
        assert request.sampling.max_tokens == 128


async def test_options_land_in_the_spec(target: str, training: FakeTraining, file: Path) -> None:
    result = await invoked(
        *("train", str(file), "--adapter", "support", "--all-traffic", "--detach"),
        *("--r", "16", "--alpha", "32", "--dropout", "0", "--epochs", "1.5", "--max-steps", "7"),
        *("--lr", "0.001", "--batch", "1", "--accumulation", "8", "--seed", "0"),
        *("--eval-fraction", "0.1", "--max-sequence-tokens", "512", "--backend", "peft"),
        *("--quantization", "none", "--precision", "float32", "--format", "chat"),
        *("--name", "mine", "--dataset-name", "rows", "--label", "team=search"),
        *("--priority", "-2"),
        target=target,
    )
    assert (result.code, result.errors) == (0, "")
    assert result.output.endswith("follow it:  gateway jobs watch mine\n")
    spec = pb.JobSpec(
        dataset="rows",
        adapter="support",
        backend=pb.BACKEND_PEFT,
        lora=pb.LoraSpec(r=16, alpha=32, dropout=0),
        hyperparameters=pb.Hyperparameters(
            epochs=1.5,
            max_steps=7,
            learning_rate=0.001,
            micro_batch_size=1,
            gradient_accumulation=8,
            seed=0,
            quantization=pb.QUANTIZATION_NONE,
            precision=pb.PRECISION_FLOAT32,
        ),
        data=pb.DataSpec(format=pb.DATASET_FORMAT_CHAT, eval_fraction=0.1, max_sequence_tokens=512),
        publish=pb.PublishSpec(traffic_percent=100),
    )
    created = training.requests[-1]
    assert isinstance(created, pb.CreateJobRequest)
    assert created.spec == spec
    assert (created.job_id, dict(created.labels)) == ("mine", {"team": "search"})
    assert created.priority == -2
    # What is validated and estimated is what is trained.
    assert pb.ValidateDatasetRequest(dataset="rows", data=spec.data) in training.requests
    assert pb.EstimateJobRequest(spec=spec, priority=-2) in training.requests


async def test_without_options_a_version_gets_no_traffic_and_without_publishing_none_is_made(
    target: str, training: FakeTraining, inference: FakeInference, file: Path
) -> None:
    arguments = ("train", str(file), "--adapter", "support")
    await invoked(*arguments, "--detach", target=target)
    assert training.jobs["support-1"].spec.publish == pb.PublishSpec(traffic_percent=0)

    training.script = [
        *STEPS,
        pb.Publication(state=pb.PUBLICATION_STATE_NOT_REQUESTED),
        *states("SUCCEEDED"),
    ]
    result = await invoked(*arguments, "--no-publish", target=target)
    assert result.code == 0
    assert not training.jobs["support-2"].spec.HasField("publish")
    assert not inference.requests


async def test_a_prompt_of_ones_own_is_asked(
    target: str, inference: FakeInference, file: Path
) -> None:
    arguments = ("--prompt", "Who are you?", "--max-tokens", "5")
    result = await invoked("train", str(file), "--adapter", "support", *arguments, target=target)
    assert rows(result.output)["prompt"] == "Who are you?"
    for request in inference.requests:
        asked = [inference_pb2.ChatMessage(role="user", content="Who are you?")]
        assert list(request.chat.messages) == asked
        assert request.sampling.max_tokens == 5


async def test_answers_that_fail_do_not_fail_what_was_done(
    target: str, inference: FakeInference, file: Path
) -> None:
    inference.failures.append(refusal(grpc.StatusCode.INTERNAL, "INTERNAL", "out of luck"))
    result = await invoked("train", str(file), "--adapter", "support", target=target)
    assert result.code == 0
    assert rows(result.output)["published"].startswith("SERVING support@2")
    assert "base model" not in rows(result.output)
    assert result.errors.startswith("note: base model and version were not compared: INTERNAL")


async def test_a_file_is_read_in_the_format_that_was_named(
    target: str, inference: FakeInference, tmp_path: Path
) -> None:
    file = tmp_path / "both.jsonl"
    file.write_text(json.dumps({**ROW, "prompt": "Which?", "completion": "This."}) + "\n")
    arguments = ("--adapter", "support", "--format", "prompt_completion")
    result = await invoked("train", str(file), *arguments, target=target)
    assert rows(result.output)["prompt"] == "Which?"


async def test_json_is_an_object_a_line(target: str, file: Path) -> None:
    result = await invoked("train", str(file), "--adapter", "support", "--json", target=target)
    assert (result.code, result.errors) == (0, "")
    objects = [json.loads(line) for line in result.output.splitlines()]
    kinds = [next(iter(found)) for found in objects]
    assert kinds == [
        *("dataset", "report", "estimate", "job"),
        *["event"] * 7,
        *("job", "comparison"),
    ]
    assert all(len(found) == 1 for found in objects)
    assert objects[-2]["job"]["state"] == "JOB_STATE_SUCCEEDED"
    assert objects[-1]["comparison"]["name"] == "support@2"


# --- what goes wrong


async def test_a_dataset_that_is_not_valid_starts_nothing(
    target: str, training: FakeTraining, file: Path
) -> None:
    training.report = pb.DatasetReport(reasons=["6 % of the lines are bad"], total_lines=100)
    result = await invoked("train", str(file), "--adapter", "support", target=target)
    assert result.code == 1
    assert "not valid: 6 % of the lines are bad" in result.output
    assert "nothing was started" in result.errors
    assert not training.jobs


async def test_a_rejected_adapter_is_told_with_its_reasons(
    target: str, training: FakeTraining, inference: FakeInference, file: Path
) -> None:
    training.script = [*STEPS, REJECTED, *states("SUCCEEDED")]
    result = await invoked("train", str(file), "--adapter", "support", target=target)
    assert result.code == 1
    assert rows(result.output)["reason"] == REJECTED.reasons[0]
    assert "was not published" in result.errors
    assert not inference.requests


async def test_what_cannot_be_served_is_refused_before_it_is_trained(
    target: str, training: FakeTraining, file: Path
) -> None:
    text = "rank 512 is above 64"
    training.unservable = refusal(grpc.StatusCode.INVALID_ARGUMENT, "UNSERVABLE_ADAPTER", text)
    arguments = ("--adapter", "support", "--r", "512")
    result = await invoked("train", str(file), *arguments, target=target)
    assert result.code == 1
    assert f"UNSERVABLE_ADAPTER: {text}" in result.errors
    assert not training.jobs


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        (["--no-publish", "--canary", "5"], "--no-publish goes without"),
        (["--all-traffic", "--canary", "5"], "--all-traffic goes without --canary"),
        (["--canary", "101"], "equal to 100"),
        (["--priority", "11"], "equal to 10"),
        (["--label", "team"], "KEY=VALUE"),
        (["--backend", "jax"], "jax"),
    ],
)
async def test_options_that_make_no_sense_are_refused_unsent(
    target: str, training: FakeTraining, file: Path, arguments: list[str], cure: str
) -> None:
    result = await invoked("train", str(file), "--adapter", "support", *arguments, target=target)
    assert result.code == 2
    assert cure in result.errors
    assert not training.requests


# --- a terminal


async def test_at_a_terminal_it_asks_shows_the_curve_and_the_answers_side_by_side(
    target: str, training: FakeTraining, file: Path
) -> None:
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    process = await started(
        *(str(file), "--adapter", "support"),
        target=target,
        command=("train",),
        stdin=theirs,
        stdout=theirs,
    )
    os.close(theirs)
    screen = await shown(ours, "train? [Y/n]")
    assert not training.jobs
    os.write(ours, b"y\n")
    screen += await shown(ours, "support@2", after="effect")
    assert (await ended(process)).code == 0
    os.close(ours)
    assert "loss by step" in screen
    assert "base model" in screen


async def test_an_answer_of_no_begins_nothing(
    target: str, training: FakeTraining, file: Path
) -> None:
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    process = await started(
        *(str(file), "--adapter", "support"),
        target=target,
        command=("train",),
        stdin=theirs,
        stdout=theirs,
    )
    os.close(theirs)
    await shown(ours, "train? [Y/n]")
    os.write(ours, b"n\n")
    assert (await ended(process)).code != 0
    os.close(ours)
    assert not training.jobs


async def test_ctrl_c_while_it_trains_leaves_the_job_to_itself(
    target: str, training: FakeTraining, file: Path
) -> None:
    training.script = [*states("RUNNING"), STEPS[0]]
    process = await started(str(file), "--adapter", "support", target=target, command=("train",))
    assert process.stdout is not None
    async with asyncio.timeout(SOON_S):
        while b"step 1/3" not in await process.stdout.readline():
            pass
    process.send_signal(signal.SIGINT)
    result = await ended(process)
    assert result.code == 130
    assert "come back:  gateway jobs watch support-1" in result.errors
    assert "cancel it:  gateway jobs cancel support-1" in result.errors
    assert training.jobs["support-1"].state == pb.JOB_STATE_RUNNING


async def shown(terminal: int, text: str, after: str = "") -> str:
    """What the terminal shows up to `text`, which has to come soon, and behind `after`."""
    screen = ""
    async with asyncio.timeout(SOON_S):
        while text not in screen.partition(after)[2] if after else text not in screen:
            try:
                screen += os.read(terminal, 65536).decode(errors="replace")
            except BlockingIOError:
                await asyncio.sleep(0.05)
    return screen


# --- the dataset's first prompt


@pytest.mark.parametrize(
    ("lines", "prompt"),
    [
        ([json.dumps(ROW)], [("system", "Be kind."), ("user", "Where is my parcel?")]),
        (['{"prompt": "a", "completion": "b"}'], [("user", "a")]),
        (['{"instruction": "a", "input": "", "output": "b"}'], [("user", "a")]),
        (['{"instruction": "a", "input": "c", "output": "b"}'], [("user", "a\n\nc")]),
        (["", "no JSON", "[]", '{"messages": 3}', '{"messages": [4]}', '{"x": 1}'], []),
        (['{"messages": [{"role": "assistant", "content": "b"}]}'], []),
        (["[" * 100_000, '{"prompt": "a", "completion": "b"}'], [("user", "a")]),
        (
            ['{"prompt": "a", "completion": ""}', '{"prompt": "c", "completion": "d"}'],
            [("user", "c")],
        ),
        (["\ufeff" + json.dumps(ROW)], [("system", "Be kind."), ("user", "Where is my parcel?")]),
    ],
)
def test_the_first_prompt_is_what_precedes_the_first_answer(
    tmp_path: Path, lines: list[str], prompt: list[tuple[str, str]]
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    expected = [ChatMessage(role=role, content=content) for role, content in prompt]
    assert first_prompt(path) == expected


def test_a_file_that_is_gone_has_no_prompt(tmp_path: Path) -> None:
    assert first_prompt(tmp_path / "gone.jsonl") == []
