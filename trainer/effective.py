"""What of a resolved spec a device really does, and what its owner is told of the difference."""

from __future__ import annotations

from trainer.events import FailureReason, JobFailure, Notice
from trainer.failure import RunFailed
from trainer.spec import Backend, GradientCheckpointing, JobSpec, Optimizer, Precision

HIGH_SCALE, HIGH_LEARNING_RATE = 8.0, 2e-4
"""From both of these on, training with rsLoRA is known to diverge."""


def effective_spec(
    spec: JobSpec, *, on_gpu: bool, bfloat16: bool
) -> tuple[JobSpec, tuple[Notice, ...]]:
    """The spec as it is trained on such a device; `bfloat16`: the device computes in it.

    Raises RunFailed for a GPU that does not: in float32 it would need twice the memory.
    """
    asked = spec.hyperparameters
    changed: dict[str, object] = {}
    notices = []
    if asked.precision is Precision.BFLOAT16 and not bfloat16:
        if on_gpu:
            raise RunFailed(
                JobFailure(
                    reason=FailureReason.TRAINING_UNAVAILABLE,
                    message="this GPU does not compute in bfloat16: set hyperparameters.precision "
                    "to float32, or train on a newer GPU",
                )
            )
        changed["precision"] = Precision.FLOAT32
        notices.append(
            Notice(
                code="PRECISION_MAPPED",
                message="this CPU does not compute in bfloat16: trained in float32",
            )
        )
    if asked.optimizer is Optimizer.ADAMW_8BIT and not on_gpu:
        changed["optimizer"] = Optimizer.ADAMW
        notices.append(
            Notice(
                code="OPTIMIZER_MAPPED",
                message="adamw_8bit runs on GPUs alone: trained with adamw_torch_fused",
            )
        )
    if asked.gradient_checkpointing is GradientCheckpointing.UNSLOTH and (
        spec.backend is not Backend.UNSLOTH or not on_gpu
    ):
        why = "activations are in the host's memory already" if not on_gpu else "PEFT has none"
        changed["gradient_checkpointing"] = GradientCheckpointing.STANDARD
        notices.append(
            Notice(
                code="GRADIENT_CHECKPOINTING_MAPPED",
                message=f"Unsloth's gradient checkpointing is not for this run ({why}): "
                "trained with PyTorch's",
            )
        )
    assert asked.learning_rate is not None
    high_rate = asked.learning_rate >= HIGH_LEARNING_RATE
    if spec.lora.use_rslora and spec.lora.scale > HIGH_SCALE and high_rate:
        notices.append(
            Notice(
                code="RSLORA_SCALE",
                message=(
                    f"rsLoRA multiplies the adapter by {spec.lora.scale:.1f} at a learning rate "
                    f"of {asked.learning_rate:g}: if the loss rises, lower the learning rate or "
                    "alpha"
                ),
            )
        )
    hyperparameters = asked.model_copy(update=changed)
    return spec.model_copy(update={"hyperparameters": hyperparameters}), tuple(notices)
