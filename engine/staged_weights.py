"""An adapter's weights as vLLM wants them in memory, read without holding up its step loop.

vLLM reads, casts and pins each tensor by itself, hundreds of them. Here all of an adapter lies in
one block, in the served type, and page-locked where the engine runs on a GPU; what vLLM makes of
the names, ranks and scales is left to its own code.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.utils import is_base_embedding_weights
from vllm.utils import torch_utils

WEIGHTS_FILE = "adapter_model.safetensors"

PIECE = 2**15
"""Elements copied at once: torch takes no more than the calling thread for so few. With more
it would start threads, on the very processors that an engine on the CPU computes on."""
ALIGNMENT_BYTES = 64


class StagedModel(LoRAModel):
    """An adapter in memory, as vLLM registers it."""

    @classmethod
    def from_lora_tensors(  # type: ignore[override]  # the rest is passed on as it comes
        cls,
        lora_model_id: int,
        tensors: dict[str, torch.Tensor],
        peft_helper: Any,
        device: str = "cuda",
        dtype: torch.dtype | None = None,
        **rest: Any,
    ) -> LoRAModel:
        """As vLLM does it; its casts and pins find nothing left to do."""
        assert dtype is not None
        model: LoRAModel = super().from_lora_tensors(
            lora_model_id, in_one_block(tensors, dtype), peft_helper, device, dtype, **rest
        )
        return model


def read_ahead(folder: Path) -> None:
    """Have the kernel fetch the weights from the disk, if they are there."""
    with contextlib.suppress(OSError), (folder / WEIGHTS_FILE).open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def in_one_block(
    tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Copies of the tensors in one block, but for those that vLLM skips."""
    kept = {name: each for name, each in tensors.items() if not is_base_embedding_weights(name)}
    step = ALIGNMENT_BYTES // dtype.itemsize
    sizes = {name: -(-tensor.numel() // step) * step for name, tensor in kept.items()}
    block = torch.empty(sum(sizes.values()), dtype=dtype, pin_memory=torch_utils.PIN_MEMORY)
    copies, begin = {}, 0
    for name, tensor in kept.items():
        copy = block[begin : begin + tensor.numel()]
        _copy(tensor.reshape(-1), copy)
        copies[name] = copy.view(tensor.shape)
        begin += sizes[name]
    return copies


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    for begin in range(0, source.numel(), PIECE):
        target[begin : begin + PIECE].copy_(source[begin : begin + PIECE])
