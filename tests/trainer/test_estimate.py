"""Estimates: the numbers that can be known exactly are, and the rest is of the right size."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from trainer.devices import DeviceFacts
from trainer.errors import TrainingUnavailable
from trainer.estimate import (
    Estimate,
    Pace,
    Price,
    estimate,
    pace_of,
)
from trainer.footprint import LIBRARIES_GPU_BYTES
from trainer.model_size import ModelSize, model_size
from trainer.report import DatasetReport, TokenStatistics
from trainer.spec import (
    Backend,
    DataSpec,
    GradientCheckpointing,
    Hyperparameters,
    JobSpec,
    LoraSpec,
    Quantization,
)

UNSLOTH, STANDARD, OFF = (
    GradientCheckpointing.UNSLOTH,
    GradientCheckpointing.STANDARD,
    GradientCheckpointing.OFF,
)
GIB = 1024**3
LLAMA = ModelSize(  # Llama-3.1-8B
    linear=6_979_321_856,
    other=1_050_939_392,
    layers=32,
    hidden=4096,
    intermediate=14336,
    vocabulary=128_256,
    matrices=tuple(
        matrix
        for _ in range(32)
        for matrix in (
            ("q_proj", 4096, 4096),
            ("k_proj", 1024, 4096),
            ("v_proj", 1024, 4096),
            ("o_proj", 4096, 4096),
            ("gate_proj", 14336, 4096),
            ("up_proj", 14336, 4096),
            ("down_proj", 4096, 14336),
        )
    ),
)
REPORT = DatasetReport(
    valid=True,
    rows=1000,
    tokens=TokenStatistics(total=1_500_000, trained=500_000, mean=1500.0, max=2048),
)


def as_asked(**fields: Any) -> Hyperparameters:
    """Of a trainer that does not fit rows into memory."""
    return Hyperparameters(fit_micro_batch=False, **fields)


def resolved(**parts: object) -> JobSpec:
    spec = JobSpec.model_validate({"dataset": "d", "adapter": "a", **parts})
    return spec.resolved(
        base_model="m",
        max_model_len=2048,
        served_dtype="bfloat16",
        backend=Backend.UNSLOTH,
        on_gpu=True,
    )


def of(
    spec: JobSpec,
    *,
    report: DatasetReport = REPORT,
    pace: Pace | None = None,
    price: Price | None = None,
    available_bytes: int = 80 * GIB,
    max_model_len: int = 2048,
    on_gpu: bool = True,
) -> Estimate:
    return estimate(
        spec,
        report,
        LLAMA,
        DeviceFacts(80 * GIB, available_bytes, True),
        on_gpu=on_gpu,
        served_width_bytes=2,
        max_model_len=max_model_len,
        max_lora_rank=64,
        pace=pace,
        price=price,
    )


def test_steps_tokens_and_the_adapter_are_exact() -> None:
    found = of(resolved())
    assert found.rows == 950  # 5 % of 1000 are held out
    assert found.steps == 3 * 119  # 475 micro-batches of 2, 4 a step
    assert found.tokens == round(1_500_000 * 0.95 * 3)
    assert found.adapter_bytes == 83_886_080 * 2  # the known size of r=32 on seven modules
    assert found.lora_scale == pytest.approx(11.3, abs=0.02)


def test_max_steps_end_a_run_earlier_and_never_later() -> None:
    whole = of(resolved())
    assert of(resolved(hyperparameters=Hyperparameters(max_steps=1_000_000))) == whole
    tenth = of(resolved(hyperparameters=Hyperparameters(max_steps=119)))
    assert (tenth.steps, tenth.tokens) == (119, whole.tokens / 3)
    nothing = of(resolved(), report=DatasetReport(valid=False))
    assert (nothing.steps, nothing.tokens) == (0, 0)


@pytest.mark.parametrize(
    ("backend", "rows", "checkpointing", "measured_gib"),
    [
        (Backend.UNSLOTH, 2, UNSLOTH, 7.4),
        (Backend.UNSLOTH, 8, UNSLOTH, 11.1),
        (Backend.UNSLOTH, 4, OFF, 44.0),
        (Backend.PEFT, 2, STANDARD, 17.0),
        (Backend.PEFT, 4, STANDARD, 25.0),
        (Backend.PEFT, 8, STANDARD, 40.5),
    ],
)
def test_memory_of_an_8b_model_in_4_bits_is_what_was_measured(
    backend: Backend, rows: int, checkpointing: GradientCheckpointing, measured_gib: float
) -> None:
    """In docs/benchmarks.md; there without the CUDA context."""
    asked = as_asked(micro_batch_size=rows, gradient_checkpointing=checkpointing)
    found = of(resolved(hyperparameters=asked, backend=backend))
    measured_bytes = measured_gib * GIB + LIBRARIES_GPU_BYTES
    assert found.memory_bytes == pytest.approx(measured_bytes, rel=0.2)
    asked = asked.model_copy(update={"quantization": Quantization.NONE})
    sixteen = of(resolved(hyperparameters=asked, backend=backend))
    assert sixteen.memory_bytes - found.memory_bytes > 8 * GIB


@pytest.mark.parametrize(
    ("backend", "free_gib", "shape"),
    [
        (Backend.UNSLOTH, 80, "4 rows at once and 2 times a step, with gradient checkpointing off"),
        (Backend.UNSLOTH, 40, "2 rows at once and 4 times a step, with gradient checkpointing off"),
        (Backend.UNSLOTH, 16, "8 rows at once and 1 times a step, with gradient checkpointing uns"),
        (Backend.UNSLOTH, 8.5, "1 rows at once and 8 times a step, with gradient checkpointing un"),
        (Backend.PEFT, 80, "2 rows at once and 4 times a step, with gradient checkpointing off"),
        (Backend.PEFT, 40, "4 rows at once and 2 times a step, with gradient checkpointing stan"),
    ],
)
def test_where_the_trainer_fits_rows_its_likely_choice_is_what_is_told_of(
    backend: Backend, free_gib: float, shape: str
) -> None:
    available = int(free_gib * GIB)
    found = of(resolved(backend=backend), available_bytes=available)
    assert any(f"memory and time are of {shape}" in warning for warning in found.warnings)
    assert found.memory_bytes < available
    rows, times = int(shape[0]), int(shape.split(" and ")[1][0])
    checkpointing = OFF if shape.endswith("off") else UNSLOTH
    same = as_asked(
        micro_batch_size=rows, gradient_accumulation=times, gradient_checkpointing=checkpointing
    )
    asked_for = of(resolved(hyperparameters=same, backend=backend), available_bytes=available)
    assert dataclasses.replace(found, warnings=()) == dataclasses.replace(asked_for, warnings=())


def test_a_choice_that_is_what_was_asked_for_is_not_told_of() -> None:
    found = of(resolved(), available_bytes=10 * GIB)
    asked = as_asked(micro_batch_size=2, gradient_checkpointing=UNSLOTH)
    assert found == of(resolved(hyperparameters=asked), available_bytes=10 * GIB)


def test_on_a_cpu_nothing_is_fitted_and_too_much_is_told() -> None:
    fit = resolved(hyperparameters=Hyperparameters(fit_micro_batch=True))
    asked = resolved(hyperparameters=as_asked())
    for available_bytes in (80 * GIB, GIB):
        found = of(fit, available_bytes=available_bytes, on_gpu=False)
        assert found == of(asked, available_bytes=available_bytes, on_gpu=False)
        told = any("reduce micro_batch_size" in warning for warning in found.warnings)
        assert told == (available_bytes == GIB)


def test_keeping_activations_takes_less_time() -> None:
    fitted, asked = of(resolved()), of(resolved(hyperparameters=as_asked()))
    assert fitted.duration_s < asked.duration_s and fitted.memory_bytes > asked.memory_bytes
    assert (fitted.steps, fitted.tokens) == (asked.steps, asked.tokens)


def test_time_and_money_come_from_earlier_runs_if_there_are_any() -> None:
    guessed = of(resolved())
    assert not guessed.measured and guessed.duration_s > 60
    assert guessed.cost is None and guessed.currency == ""
    pace = pace_of([(100_000, 20.0, 10.0), (300_000, 60.0, 30.0)])
    assert pace == Pace(5000.0, 20.0)
    found = of(resolved(), pace=pace, price=Price(3.6, "USD"))
    assert found.measured
    assert found.duration_s == pytest.approx(20.0 + found.tokens / 5000.0)
    assert found.cost == pytest.approx(found.duration_s / 1000)
    assert found.currency == "USD"
    assert pace_of([]) is None and pace_of([(0, 0.0, 1.0)]) is None


@pytest.mark.parametrize(
    ("said", "spec", "options"),
    [
        ("alpha / sqrt(r) = 11.3", {}, {}),
        ("rank 48 is near 64", {"lora": LoraSpec(r=48)}, {}),
        ("warmup_ratio", {"hyperparameters": Hyperparameters(max_steps=5)}, {}),
        ("2048 tokens, and the server takes 4096", {}, {"max_model_len": 4096}),
        (
            "reduce micro_batch_size or max_sequence_tokens",
            {"hyperparameters": Hyperparameters(fit_micro_batch=False)},
            {"available_bytes": GIB},
        ),
        ("one row at once needs about 8.3 GB and a run may take 1.0", {}, {"available_bytes": GIB}),
        (
            "3 rows are too long",
            {},
            {"report": REPORT.model_copy(update={"overlength_rows": 3})},
        ),
        (
            "4 rows lose their oldest turns",
            {},
            {"report": REPORT.model_copy(update={"truncated_rows": 4})},
        ),
    ],
)
def test_pitfalls_what_is_likely_to_go_wrong_is_warned_of(
    said: str, spec: dict[str, object], options: dict[str, object]
) -> None:
    warnings = of(resolved(**spec), **options).warnings  # type: ignore[arg-type]
    assert any(said in warning for warning in warnings), warnings


def test_what_is_in_order_is_not_warned_of() -> None:
    calm = resolved(
        lora=LoraSpec(r=16, alpha=16),
        hyperparameters=as_asked(warmup_ratio=0.1),
        data=DataSpec(max_sequence_tokens=2048),
    )
    assert of(calm).warnings == ()


def test_sizes_are_read_from_headers_over_all_shards(tmp_path: Path) -> None:
    layer = "model.layers.0.self_attn.q_proj.weight"
    save_file({layer: np.zeros((8, 4), np.float32)}, tmp_path / "a.safetensors")
    others = {"model.embed_tokens.weight": (10, 4), "model.layers.0.norm.weight": (4,)}
    save_file(
        {name: np.zeros(shape, np.float32) for name, shape in others.items()},
        tmp_path / "b.safetensors",
    )
    config = {"hidden_size": 4, "num_hidden_layers": 1, "vocab_size": 10, "intermediate_size": 6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    size = model_size(tmp_path)
    assert (size.linear, size.other, size.parameters) == (32, 44, 76)
    assert size.matrices == (("q_proj", 8, 4),)
    assert size.adapter_parameters(2, ["q_proj", "absent"]) == 24


@pytest.mark.parametrize("content", [None, "{}", "[", '{"hidden_size": 1}'])
def test_a_model_that_cannot_be_read_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(TrainingUnavailable, match="cannot be read"):
        model_size(tmp_path)
