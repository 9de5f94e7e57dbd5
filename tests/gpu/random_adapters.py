"""Adapters with random weights over all linear layers, in bfloat16: for speed, not for answers."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

from tests.tiny_adapter import MODULES


def write_adapters(folder: Path, model: Path, *, count: int, rank: int) -> list[Path]:
    """Write so many, each by a process of its own; returns their folders."""
    paths = [folder / f"r{rank}-{number}" for number in range(1, count + 1)]
    with multiprocessing.get_context("spawn").Pool(min(count, 8)) as pool:
        pool.starmap(_write, [(path, model, rank, seed) for seed, path in enumerate(paths)])
    return paths


def _write(folder: Path, model: Path, rank: int, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    config = json.loads((model / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    shapes = {  # out, in
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    generator = torch.Generator().manual_seed(seed)
    # Strong: the norms of vLLM's made up weights leave hardly anything of what goes in, and the
    # gateway refuses an adapter that changes no answer.
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (outs, ins) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            for name, shape in {"lora_A": (rank, ins), "lora_B": (outs, rank)}.items():
                values = torch.rand(shape, generator=generator).sub_(0.5)
                tensors[f"{prefix}.{name}.weight"] = values.to(torch.bfloat16)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "r": rank,
                "lora_alpha": 2 * rank,
                "lora_dropout": 0.0,
                "bias": "none",
                "target_modules": list(MODULES),
            }
        )
    )
