from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.job_stage import TENANT, Stage, stage
from tests.trainer.training_run import start, write_rows
from trainer.devices import CPU
from trainer.devices import Device as Named
from trainer.events import Notice
from trainer.memory import memory_of
from trainer.micro_batch import Probe, Shape, divisors, fit, fitted
from trainer.recipe import Recipe
from trainer.run_folder import RunFolder, RunPlan
from trainer.spec import Backend, GradientCheckpointing, Hyperparameters

OFF, UNSLOTH = GradientCheckpointing.OFF, GradientCheckpointing.UNSLOTH
GIB = 1024**3
ROW_BYTES = {OFF: 8 * GIB, UNSLOTH: 1 * GIB}
BASE_BYTES = 6 * GIB


class Device:
    """Takes memory by rows, and is a little faster with more of them."""

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self.tried: list[Shape] = []

    def __call__(self, shape: Shape) -> Probe | None:
        self.tried.append(shape)
        peak = BASE_BYTES + shape.micro_batch_size * ROW_BYTES[shape.checkpointing]
        if peak > self.memory_bytes:
            return None
        speed = (1.4 if shape.checkpointing is OFF else 1.0) * (1 - 0.2 / shape.micro_batch_size)
        return Probe(peak, speed)

    def fit(self, asked: Hyperparameters) -> Shape | None:
        return fit(asked, self.memory_bytes, BASE_BYTES, self)


def asked(rows: int = 2, times: int = 4, mode: GradientCheckpointing = UNSLOTH) -> Hyperparameters:
    return Hyperparameters(
        micro_batch_size=rows, gradient_accumulation=times, gradient_checkpointing=mode
    )


@pytest.mark.parametrize(
    ("memory_gib", "shape"),
    [
        (80, Shape(8, OFF)),
        (50, Shape(4, OFF)),
        (25, Shape(2, OFF)),
        (20, Shape(8, UNSLOTH)),
        (12, Shape(4, UNSLOTH)),
        (9, Shape(2, UNSLOTH)),
        (8, Shape(1, UNSLOTH)),
        (6, None),
    ],
)
def test_the_fastest_that_fits_is_taken(memory_gib: int, shape: Shape | None) -> None:
    assert Device(memory_gib * GIB).fit(asked()) == shape


def test_what_would_not_fit_by_what_was_seen_is_not_tried() -> None:
    device = Device(50 * GIB)
    device.fit(asked())
    assert device.tried == [Shape(2, OFF), Shape(4, OFF)]


def test_checkpointing_that_was_not_asked_for_is_not_turned_on() -> None:
    device = Device(9 * GIB)
    assert device.fit(asked(mode=OFF)) is None
    assert {shape.checkpointing for shape in device.tried} == {OFF}


def test_more_rows_that_are_slower_are_not_taken() -> None:
    def probe(shape: Shape) -> Probe:
        return Probe(GIB, 1 / shape.micro_batch_size)

    assert fit(asked(), 80 * GIB, 0, probe) == Shape(2, OFF)


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 12])
def test_pitfalls_rows_a_step_stay(rows: int) -> None:
    changed, notices = fitted(asked(3, 4), Shape(rows, UNSLOTH))
    assert changed.micro_batch_size and changed.gradient_accumulation
    assert changed.micro_batch_size * changed.gradient_accumulation == 12
    assert len(notices) == (rows != 3)


def test_divisors_are_all_of_them() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(1) == [1]


@pytest.mark.slow
@pytest.mark.parametrize("backend", list(Backend))
def test_a_fitted_run_learns_the_same(backend: Backend, tiny: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows")
    # In float32 and without dropout, where the shape of a batch matters least.
    base = {"precision": "float32", "max_steps": 3, "gradient_checkpointing": "standard"}
    lora = {"dropout": 0.0}
    plain = start(
        tmp_path / "plain", tiny, rows, {"hyperparameters": base, "lora": lora}, backend=backend
    ).wait()
    fields = {"hyperparameters": base | {"fit_micro_batch": True}, "lora": lora}
    fitted_run = start(
        tmp_path / "fitted", tiny, rows, fields, backend=backend, memory_bytes=16 * GIB
    ).wait()
    assert fitted_run.code == 0, fitted_run.log[-3000:]
    effective = fitted_run.effective.hyperparameters
    assert effective.micro_batch_size and effective.gradient_accumulation
    assert effective.micro_batch_size * effective.gradient_accumulation == 8
    assert effective.gradient_checkpointing is OFF
    assert "MICRO_BATCH_FITTED" in fitted_run.notices
    assert fitted_run.losses == pytest.approx(plain.losses, abs=1e-4)


@pytest.mark.slow
def test_pitfalls_too_little_memory_is_told_with_the_numbers(
    tiny: Path, rows: Path, tmp_path: Path
) -> None:
    fields = {"hyperparameters": {"fit_micro_batch": True}}
    ended = start(tmp_path / "run", tiny, rows, fields, memory_bytes=GIB // 16).wait()
    assert ended.exit.failure is not None
    assert ended.exit.failure.metadata == {
        "micro_batch_size": "1",
        "max_sequence_tokens": "512",
        "memory_bytes": str(GIB // 16),
    }
    assert "reduce data.max_sequence_tokens" in ended.exit.failure.message
    assert ended.exit.failure.reason.name == "OUT_OF_MEMORY"


@pytest.mark.slow
def test_without_a_limit_a_cpu_keeps_what_was_asked_for(
    tiny: Path, rows: Path, tmp_path: Path
) -> None:
    fields = {"hyperparameters": {"fit_micro_batch": True, "max_steps": 1}}
    ended = start(tmp_path / "run", tiny, rows, fields).wait()
    assert ended.code == 0 and "MICRO_BATCH_NOT_FITTED" in ended.notices
    assert ended.effective.hyperparameters.micro_batch_size == 2


async def plan_of_the_host(s: Stage, device: str) -> RunPlan:
    """What a job that asks for the most rows at once is started with."""
    asked = Hyperparameters(fit_micro_batch=True)
    spec = s.spec().model_copy(update={"hyperparameters": asked})
    job = await s.jobs.create(TENANT, spec, name="one")
    return await s.jobs._means.plan(job, Named(device))


async def test_a_cpu_is_never_tried_for_memory_that_serving_needs(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        plan = await plan_of_the_host(s, CPU)
    assert plan.spec.hyperparameters.fit_micro_batch is True
    told: list[Notice] = []

    class Events:
        def notice(self, notice: Notice) -> None:
            told.append(notice)

    events: Any = Events()
    nothing: Any = None
    recipe = Recipe(plan, RunFolder(tmp_path), nothing, nothing, nothing, events)
    recipe._fit(nothing, nothing, memory_of(on_gpu=False, limit_bytes=plan.memory_bytes))
    assert [notice.code for notice in told] == ["MICRO_BATCH_NOT_FITTED"]


async def test_a_gpu_is_tried_for_what_was_free_when_the_run_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 81559, 70000, 9.0\n")
    smi.chmod(smi.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    async with stage(tmp_path) as s:
        plan = await plan_of_the_host(s, "0")
    assert 0.9 * 70000 * 2**20 < plan.memory_bytes < 70000 * 2**20
