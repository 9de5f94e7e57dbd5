"""Plain PEFT, transformers and bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trainer.backends import LoadRequest, peft_alpha
from trainer.backends.quantization import check_quantized, keep_trainable_on_cpu
from trainer.spec import GradientCheckpointing, Precision, Quantization


class PeftBackend:
    """See TrainingBackend."""

    def load(self, request: LoadRequest) -> Any:
        spec, asked = request.spec, request.spec.hyperparameters
        dtype = torch.bfloat16 if asked.precision is Precision.BFLOAT16 else torch.float32
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        model = AutoModelForCausalLM.from_pretrained(
            request.model_path,
            dtype=dtype,
            # All of it on the one device that this process sees, or an error.
            device_map={"": 0 if request.on_gpu else "cpu"},
            quantization_config=nf4 if asked.quantization is Quantization.NF4 else None,
        )
        model.config.use_cache = False
        torch.manual_seed(asked.seed)
        model = get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=spec.lora.r,
                lora_alpha=peft_alpha(spec),
                lora_dropout=spec.lora.dropout,
                use_rslora=spec.lora.use_rslora,
                bias=spec.lora.bias,
                target_modules=list(spec.lora.target_modules),
            ),
        )
        check_quantized(model, spec)
        keep_trainable_on_cpu(model)
        assert asked.gradient_checkpointing is not None
        self.set_checkpointing(model, asked.gradient_checkpointing)
        return model

    def set_checkpointing(self, model: Any, checkpointing: GradientCheckpointing) -> None:
        if checkpointing is GradientCheckpointing.OFF:
            model.gradient_checkpointing_disable()
            return
        # Reentrant checkpointing needs inputs with gradients, which frozen embeddings do not give.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


BACKEND = PeftBackend()
