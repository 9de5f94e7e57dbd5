from __future__ import annotations

import pytest

from tests.trainer.training_run import resolved
from trainer.effective import effective_spec
from trainer.events import FailureReason
from trainer.failure import RunFailed
from trainer.spec import Backend, GradientCheckpointing, Optimizer, Precision


def codes(**device: bool) -> set[str]:
    _, notices = effective_spec(resolved({}), **device)
    return {notice.code for notice in notices}


def test_a_gpu_trains_what_was_asked_for() -> None:
    fields = {"hyperparameters": {"gradient_checkpointing": "unsloth", "learning_rate": 1e-4}}
    spec = resolved(fields, Backend.UNSLOTH)
    assert effective_spec(spec, on_gpu=True, bfloat16=True) == (spec, ())


def test_a_cpu_without_bfloat16_trains_in_float32_and_says_so() -> None:
    spec, notices = effective_spec(resolved({}), on_gpu=False, bfloat16=False)
    assert spec.hyperparameters.precision is Precision.FLOAT32
    assert "PRECISION_MAPPED" in {notice.code for notice in notices}
    assert "PRECISION_MAPPED" not in codes(on_gpu=False, bfloat16=True)


def test_a_gpu_without_bfloat16_is_refused_unless_it_need_not_have_it() -> None:
    with pytest.raises(RunFailed, match="precision to float32") as caught:
        effective_spec(resolved({}), on_gpu=True, bfloat16=False)
    assert caught.value.failure.reason is FailureReason.TRAINING_UNAVAILABLE
    in_float32 = resolved({"hyperparameters": {"precision": "float32"}})
    effective_spec(in_float32, on_gpu=True, bfloat16=False)


def test_the_optimizer_in_8_bits_is_for_gpus() -> None:
    spec, _ = effective_spec(resolved({}), on_gpu=False, bfloat16=True)
    assert spec.hyperparameters.optimizer is Optimizer.ADAMW
    assert "OPTIMIZER_MAPPED" not in codes(on_gpu=True, bfloat16=True)


@pytest.mark.parametrize(
    ("backend", "on_gpu", "effective"),
    [
        (Backend.UNSLOTH, True, GradientCheckpointing.UNSLOTH),
        (Backend.UNSLOTH, False, GradientCheckpointing.STANDARD),
        (Backend.PEFT, True, GradientCheckpointing.STANDARD),
        (Backend.PEFT, False, GradientCheckpointing.STANDARD),
    ],
)
def test_pitfalls_unsloths_checkpointing_is_mapped_where_there_is_none(
    backend: Backend, on_gpu: bool, effective: GradientCheckpointing
) -> None:
    spec = resolved({"hyperparameters": {"gradient_checkpointing": "unsloth"}}, backend)
    found, notices = effective_spec(spec, on_gpu=on_gpu, bfloat16=True)
    assert found.hyperparameters.gradient_checkpointing is effective
    told = "GRADIENT_CHECKPOINTING_MAPPED" in {notice.code for notice in notices}
    assert told == (effective is not GradientCheckpointing.UNSLOTH)


@pytest.mark.parametrize(
    ("lora", "learning_rate", "warned"),
    [
        ({}, 2e-4, True),
        ({}, 1e-4, False),
        ({"use_rslora": False}, 2e-4, False),
        ({"alpha": 16}, 2e-4, False),
    ],
)
def test_a_high_scale_at_a_high_learning_rate_is_warned_of(
    lora: dict[str, object], learning_rate: float, warned: bool
) -> None:
    spec = resolved({"lora": lora, "hyperparameters": {"learning_rate": learning_rate}})
    _, notices = effective_spec(spec, on_gpu=True, bfloat16=True)
    assert ("RSLORA_SCALE" in {notice.code for notice in notices}) == warned
