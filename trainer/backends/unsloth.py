"""Unsloth, which replaces parts of torch, transformers and PEFT in the whole process."""

from __future__ import annotations

from typing import Any

# isort: off
import unsloth  # before all others
import torch

# isort: on
from trainer.backends import LoadRequest, peft_alpha
from trainer.backends.quantization import check_quantized, keep_trainable_on_cpu
from trainer.spec import GradientCheckpointing, Precision, Quantization

AS_UNSLOTH_SAYS: dict[GradientCheckpointing, bool | str] = {
    GradientCheckpointing.UNSLOTH: "unsloth",
    GradientCheckpointing.STANDARD: True,
    GradientCheckpointing.OFF: False,
}


class UnslothBackend:
    """See TrainingBackend."""

    def load(self, request: LoadRequest) -> Any:
        spec, asked = request.spec, request.spec.hyperparameters
        assert asked.gradient_checkpointing is not None
        checkpointing = AS_UNSLOTH_SAYS[asked.gradient_checkpointing]
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            request.model_path,
            max_seq_length=spec.data.max_sequence_tokens,
            dtype=torch.bfloat16 if asked.precision is Precision.BFLOAT16 else torch.float32,
            # nf4, double quantization, and computed in `dtype`.
            load_in_4bit=asked.quantization is Quantization.NF4,
            # Else a name is exchanged for that of another, already quantized model.
            use_exact_model_name=True,
            device_map={"": 0} if request.on_gpu else None,
            use_gradient_checkpointing=checkpointing,
        )
        model = unsloth.FastLanguageModel.get_peft_model(
            model,
            r=spec.lora.r,
            lora_alpha=peft_alpha(spec),
            lora_dropout=spec.lora.dropout,
            use_rslora=spec.lora.use_rslora,
            bias=spec.lora.bias,
            target_modules=list(spec.lora.target_modules),
            use_gradient_checkpointing=checkpointing,
            random_state=asked.seed,
            max_seq_length=spec.data.max_sequence_tokens,
        )
        check_quantized(model, spec)
        if not request.on_gpu:
            keep_trainable_on_cpu(model)
        return model

    def set_checkpointing(self, model: Any, checkpointing: GradientCheckpointing) -> None:
        mode = AS_UNSLOTH_SAYS[checkpointing]
        model._unsloth_gradient_checkpointing = mode  # what its trainer goes back to
        model.for_training(use_gradient_checkpointing=mode)


BACKEND = UnslothBackend()
