"""A spec is bounded, whatever a caller sends."""

from __future__ import annotations

import time

import pytest
from pydantic import ValidationError

from trainer.spec import Backend, JobSpec, LoraSpec, Precision, PublishSpec


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"target_modules": [f"m{i}" for i in range(65)]}, "at most 64"),
        ({"target_modules": ["m" * 129]}, "at most 128"),
        ({"target_modules": [""]}, "at least 1"),
        ({"target_modules": ["q_proj", "q_proj"]}, "must name each module once"),
        ({"bias": "n" * 33}, "at most 32"),
    ],
)
def test_an_adapters_shape_is_bounded(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        LoraSpec.model_validate(fields)


def test_the_limits_themselves_are_taken() -> None:
    names = [f"{i:0128}" for i in range(64)]
    assert LoraSpec.model_validate({"target_modules": names}).target_modules == tuple(names)
    spec = {"dataset": "d", "adapter": "a", "base_model": "m" * 256}
    assert JobSpec.model_validate(spec).base_model == "m" * 256
    with pytest.raises(ValidationError, match="at most 256"):
        JobSpec.model_validate(spec | {"base_model": "m" * 257})


def test_a_huge_list_is_refused_at_once() -> None:
    began_s = time.thread_time()
    with pytest.raises(ValidationError):
        LoraSpec.model_validate({"target_modules": [f"m{i}" for i in range(200_000)]})
    assert time.thread_time() - began_s < 1.0


@pytest.mark.parametrize(
    ("on_gpu", "bfloat16", "precision", "mean"),
    [
        (False, False, Precision.FLOAT32, 0.01),
        (False, True, Precision.BFLOAT16, 0.2),
        (True, False, Precision.BFLOAT16, 0.2),  # refused, and not mapped
    ],
)
def test_a_cpu_without_bfloat16_has_the_gate_of_float32(
    on_gpu: bool, bfloat16: bool, precision: Precision, mean: float
) -> None:
    asked = {"quantization": "none"}
    spec = JobSpec.model_validate(
        {"dataset": "d", "adapter": "a", "hyperparameters": asked, "publish": PublishSpec()}
    ).resolved(
        base_model="m",
        max_model_len=2048,
        served_dtype="float32",
        backend=Backend.PEFT,
        on_gpu=on_gpu,
        bfloat16=bfloat16,
    )
    assert spec.hyperparameters.precision is precision
    assert spec.publish is not None and spec.publish.gate.max_logprob_delta_mean == mean
