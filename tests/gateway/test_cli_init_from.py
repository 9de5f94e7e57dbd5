"""`gateway train --init-from`, and what `gateway jobs show` tells of it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from lora_gateway import AdapterVersionSource, CheckpointSource, InitFrom
from tests.client.fake_training import FakeTraining, served
from tests.gateway.training_command import invoked, printed, rows


@pytest.fixture
def training() -> FakeTraining:
    return FakeTraining()


@pytest.fixture
async def target(training: FakeTraining) -> AsyncIterator[str]:
    async with served(training) as target:
        yield target


@pytest.fixture
def command(tmp_path: Path) -> tuple[str, ...]:
    path = tmp_path / "support.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    return "train", str(path), "--adapter", "support", "--name", "on", "--detach"


def version(**fields: Any) -> InitFrom:
    return InitFrom(adapter_version=AdapterVersionSource(adapter="support", **fields))


def checkpoint(**fields: Any) -> InitFrom:
    return InitFrom(checkpoint=CheckpointSource(job="s-1", **fields))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--init-from", "support"], version()),
        (["--init-from", "support@3"], version(version=3)),
        (["--init-from-checkpoint", "s-1"], checkpoint()),
        (["--init-from-checkpoint", "s-1/40"], checkpoint(step=40)),
        ([], InitFrom()),
    ],
)
async def test_train_goes_on_from_what_is_named(
    target: str,
    training: FakeTraining,
    command: tuple[str, ...],
    options: list[str],
    expected: InitFrom,
) -> None:
    result = await invoked(*command, *options, target=target)
    assert (result.code, result.errors) == (0, "")
    assert training.jobs["on"].spec.init_from == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--init-from", "support@three"], "is not ADAPTER[@VERSION]"),
        (["--init-from", "support@"], "is not ADAPTER[@VERSION]"),
        (["--init-from-checkpoint", "s-1/-4"], "is not JOB[/STEP]"),
        (["--init-from", "support", "--init-from-checkpoint", "s-1"], "goes without"),
    ],
)
async def test_train_refuses_what_names_nothing_before_it_uploads(
    target: str,
    training: FakeTraining,
    command: tuple[str, ...],
    options: list[str],
    said: str,
) -> None:
    result = await invoked(*command, *options, target=target)
    assert result.code == 2 and said in result.errors
    assert not training.datasets


async def test_a_job_shows_what_it_began_with(
    target: str, training: FakeTraining, command: tuple[str, ...]
) -> None:
    await invoked(*command, "--init-from", "support", target=target)
    job = training.jobs["on"]
    assert "init_from" not in rows(await printed("jobs", "show", "on", target=target))
    for effective, text in [(version(version=3), "support@3"), (checkpoint(step=40), "s-1/40")]:
        job.effective_spec.init_from.CopyFrom(effective)
        shown = rows(await printed("jobs", "show", "on", target=target))
        assert shown["init_from"] == text
