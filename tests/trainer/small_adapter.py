"""Adapters of a base model with one small layer, written without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

from trainer.spec import DEFAULT_TARGET_MODULES

MODULES: Mapping[str, tuple[int, int]] = {
    f"model.layers.0.{name}": (4, 2) for name in DEFAULT_TARGET_MODULES
}
"""The base model's linear layers."""


def tensors_of(targets: Sequence[str], rank: int) -> dict[str, list[int]]:
    """Names and shapes, as PEFT saves them."""
    tensors = {}
    for module, (rows, columns) in MODULES.items():
        if module.rpartition(".")[2] in targets:
            tensors[f"base_model.model.{module}.lora_A.weight"] = [rank, columns]
            tensors[f"base_model.model.{module}.lora_B.weight"] = [rows, rank]
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Sequence[int]], seed: int = 0) -> None:
    """A safetensors file, every number of which is the seed."""
    header, data = {}, b""
    for name, shape in tensors.items():
        content = seed.to_bytes(4, "little") * prod(shape)
        header[name] = {
            "dtype": "F32",
            "shape": list(shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def config_of(targets: Sequence[str], rank: int, **fields: object) -> str:
    """Content of an `adapter_config.json`."""
    known = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "use_rslora": True,
        "target_modules": list(targets),
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
    }
    return json.dumps({**known, **fields})


def write_small_adapter(
    folder: Path,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    rank: int = 8,
    *,
    seed: int = 1,
    **fields: object,
) -> Path:
    """Both files of an adapter; `fields` are of its config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(config_of(targets, rank, **fields))
    write_tensors(folder / "adapter_model.safetensors", tensors_of(targets, rank), seed)
    return folder
