"""Checks that a base model is held in 4 bits where it was asked for, and stays trainable."""

from __future__ import annotations

from typing import Any

from trainer.events import FailureReason, JobFailure
from trainer.failure import RunFailed
from trainer.spec import JobSpec, Quantization


def check_quantized(model: Any, spec: JobSpec) -> int:
    """Count layers in 4 bits, once the adapter is on. Raises RunFailed if it is not all of them.

    Libraries load 16 bits in place of 4 without an error where bitsandbytes does not work.
    """
    named = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] == "base_layer"
    }
    four_bits = sum("Linear4bit" in kind for kind in named.values())
    expected = len(named) if spec.hyperparameters.quantization is Quantization.NF4 else 0
    if four_bits != expected:
        raise RunFailed(
            JobFailure(
                reason=FailureReason.TRAINING_UNAVAILABLE,
                message=f"{four_bits} of {len(named)} layers were loaded in 4 bits, and {expected} "
                "should be: see the job's log, or set hyperparameters.quantization to none",
            )
        )
    return four_bits


def keep_trainable_on_cpu(model: Any) -> None:
    """Keep bitsandbytes from packing weights for its CPU kernel.

    It would do so at the first forward pass without gradients, as an evaluation is, and the
    backward passes after it would then silently compute with the wrong weights.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
