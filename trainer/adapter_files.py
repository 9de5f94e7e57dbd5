"""Saves an adapter as engines serve it: two files, and the tokenizer it was trained with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from trainer.spec import JobSpec

WEIGHTS_FILE = "adapter_model.safetensors"
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


def save_adapter(model: Any, folder: Path, spec: JobSpec, base: Path, dtype: torch.dtype) -> None:
    """Write a PEFT model's adapter, in the type it is served in.

    The tokenizer is copied from the base model's folder: libraries change one when they load
    it. PEFT's own `save_pretrained` would write a README, weights in float32, and a config that
    names a folder of this machine as base model.
    """
    folder.mkdir()
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file(
        {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()},
        folder / WEIGHTS_FILE,
        metadata={"format": "pt"},
    )
    save_config(model, folder, spec)
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)


def save_config(model: Any, folder: Path, spec: JobSpec) -> None:
    """Write `adapter_config.json`; the model's own config stays as it is."""
    config = model.peft_config["default"]
    kept = {name: getattr(config, name) for name in ("base_model_name_or_path", "target_modules")}
    kept |= {"inference_mode": config.inference_mode, "auto_mapping": config.auto_mapping}
    try:
        config.base_model_name_or_path = spec.base_model
        config.target_modules = sorted(spec.lora.target_modules)  # a set, saved in any order
        config.inference_mode = True
        config.auto_mapping = None  # of classes in this process
        config.save_pretrained(folder)
    finally:
        for name, value in kept.items():
            setattr(config, name, value)
