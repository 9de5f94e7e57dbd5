"""All that an adapter may be and pass the gate, made of a plain one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.tiny_adapter import write_tiny_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def changed(folder: Path, **config: object) -> Path:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def of_modules(folder: Path, *modules: str) -> Path:
    tensors = load_file(folder / WEIGHTS)
    kept = {name: each for name, each in tensors.items() if any(part in name for part in modules)}
    assert kept
    save_file(kept, folder / WEIGHTS)
    return changed(folder, target_modules=list(modules))


def as_type(folder: Path, dtype: torch.dtype) -> Path:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: each.to(dtype) for name, each in tensors.items()}, folder / WEIGHTS)
    return folder


def with_embedding(folder: Path, tiny: Path) -> Path:
    config = json.loads((tiny / "config.json").read_text())
    vocabulary, width = config["vocab_size"], config["hidden_size"]
    generator = torch.Generator().manual_seed(7)
    name = "base_model.model.model.embed_tokens"
    tensors = load_file(folder / WEIGHTS) | {
        f"{name}.lora_embedding_A": torch.randn(8, vocabulary, generator=generator),
        f"{name}.lora_embedding_B": torch.randn(width, 8, generator=generator),
        f"{name}.base_layer.weight": torch.randn(vocabulary, width, generator=generator),
    }
    save_file(tensors, folder / WEIGHTS)
    return folder


def of_several_ranks(folder: Path, tiny: Path) -> Path:
    """Ranks and scales by module, as PEFT's patterns give them."""
    lower = load_file(write_tiny_adapter(folder / "lower", tiny, seed=9, rank=4) / WEIGHTS)
    tensors = load_file(folder / WEIGHTS)
    tensors |= {name: each for name, each in lower.items() if "q_proj" in name}
    save_file(tensors, folder / WEIGHTS)
    return changed(folder, rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 5})


KINDS = {
    "full rank": lambda folder, tiny: folder,
    "rsLoRA": lambda folder, tiny: changed(folder, use_rslora=True),
    "bfloat16": lambda folder, tiny: as_type(folder, torch.bfloat16),
    "float64": lambda folder, tiny: as_type(folder, torch.float64),
    "a part of what vLLM packs": lambda folder, tiny: of_modules(folder, "q_proj", "up_proj"),
    "nothing that vLLM packs": lambda folder, tiny: of_modules(folder, "o_proj"),
    "one layer": lambda folder, tiny: of_modules(folder, "layers.2."),
    "embedding": with_embedding,
    "several ranks": of_several_ranks,
}
