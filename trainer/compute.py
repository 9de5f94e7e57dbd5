"""What the device of this process is, and what it computes in."""

from __future__ import annotations

import torch

from trainer.devices import cpu_computes_in_bfloat16, cpu_field


def computes_in_bfloat16(*, on_gpu: bool) -> bool:
    """Whether the device does so by itself."""
    if on_gpu:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return cpu_computes_in_bfloat16()


def device_name(*, on_gpu: bool) -> str:
    """For people."""
    return str(torch.cuda.get_device_name(0)) if on_gpu else cpu_field("model name") or "cpu"
