"""What the device of this process is, and what it computes in."""

from __future__ import annotations

from pathlib import Path

import torch

CPU_INFO = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}
"""Of x86 and Arm. Without one, PyTorch computes in bfloat16 many times slower than in float32."""


def computes_in_bfloat16(*, on_gpu: bool) -> bool:
    """Whether the device does so by itself."""
    if on_gpu:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(BFLOAT16_FLAGS & set(_cpu("flags", "Features").split()))


def device_name(*, on_gpu: bool) -> str:
    """For people."""
    return str(torch.cuda.get_device_name(0)) if on_gpu else _cpu("model name") or "cpu"


def _cpu(*fields: str) -> str:
    for line in CPU_INFO.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in fields:
            return value.strip()
    return ""
