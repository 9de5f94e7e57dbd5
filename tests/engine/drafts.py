"""Adapters to check: a good one, and ways to spoil it."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

from engine.adapters import AdapterFacts, check_adapter
from engine.base_model import BaseModules, ModuleShapes, base_modules
from engine.errors import AdapterInvalid
from tests.corpus import draft
from tests.corpus.draft import (
    BOMB,
    Q_PROJ,
    RANK,
    V_PROJ,
    a,
    b,
    configure,
    header,
    lacks_field,
)

__all__ = [
    "BOMB",
    "EXPECTED_MODULES",
    "LLAMA",
    "MAX_LORA_RANK",
    "Q_PROJ",
    "RANK",
    "SHAPES",
    "V_PROJ",
    "Draft",
    "Spoil",
    "a",
    "b",
    "base_llama",
    "base_shapes",
    "check",
    "configure",
    "findings",
    "good_config",
    "good_tensors",
    "header",
    "lacks_field",
    "load_as_vllm_does",
]

LLAMA = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    architectures=["LlamaForCausalLM"],
)
MAX_LORA_RANK = 16
SHAPES = {Q_PROJ: (32, 32), V_PROJ: (16, 32)}
"""Modules of the good adapter; the base model has more."""
EXPECTED_MODULES = {
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("embed_tokens", "lm_head"),
}
"""What vLLM's Llama tells its loader."""


def good_config() -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }


def good_tensors() -> dict[str, torch.Tensor]:
    tensors = {}
    for module, (out_features, in_features) in SHAPES.items():
        tensors[a(module)] = torch.full((RANK, in_features), 0.01)
        tensors[b(module)] = torch.full((out_features, RANK), 0.01)
    return tensors


@dataclass
class Draft(draft.Draft):
    """An adapter for the tiny Llama that can be spoiled before it is written."""

    config: Any = field(default_factory=good_config)
    tensors: dict[str, torch.Tensor] = field(default_factory=good_tensors)


Spoil = Callable[[Draft], object]
"""Breaks an adapter in one way."""


@functools.cache
def base_llama() -> BaseModules:
    """Modules of the tiny Llama."""
    with tempfile.TemporaryDirectory() as folder:
        LLAMA.save_pretrained(folder)
        return base_modules(Path(folder))


def base_shapes() -> ModuleShapes:
    """Of those that an adapter may change."""
    return base_llama().shapes


def check(folder: Path, **options: Any) -> AdapterFacts:
    """`check_adapter` against the tiny Llama."""
    return check_adapter(
        folder, adapter="sql", shapes=base_shapes(), max_lora_rank=MAX_LORA_RANK, **options
    )


def findings(folder: Path) -> tuple[str, ...]:
    """What is wrong with an adapter that must be refused."""
    with pytest.raises(AdapterInvalid) as caught:
        check(folder)
    assert caught.value.adapter == "sql"
    return caught.value.findings


def load_as_vllm_does(folder: Path) -> LoRAModel:
    """As a worker does it (vllm/lora/worker_manager.py:106), on the CPU."""
    helper = PEFTHelper.from_local_dir(str(folder), None)
    model = LoRAModel.from_local_checkpoint(
        str(folder), EXPECTED_MODULES, helper, lora_model_id=1, device="cpu", dtype=torch.bfloat16
    )
    for lora in model.loras.values():
        lora.optimize()
    return model
