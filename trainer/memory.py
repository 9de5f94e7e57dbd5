"""Memory of the device that trains: what is used, and how much may be."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Protocol

import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""See proc_pid_clear_refs(5)."""
KIB = 1024


class Memory(Protocol):
    """Of one device. Reading it never waits for the device."""

    limit_bytes: int
    """How much this process may use; 0: not known."""

    def used_bytes(self) -> int:
        """Now."""

    def peak_bytes(self) -> int:
        """Since the process began, or since `reset_peak`."""

    def reset_peak(self) -> None:
        """Forget the peak."""

    def release(self) -> None:
        """Give back what nobody uses."""


class HostMemory:
    """Resident memory of this process."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes

    def used_bytes(self) -> int:
        return _status("VmRSS")

    def peak_bytes(self) -> int:
        return _status("VmHWM")

    def reset_peak(self) -> None:
        CLEAR_REFS.write_text(RESET_PEAK)

    def release(self) -> None:
        gc.collect()


class GpuMemory:
    """What PyTorch has allocated of the GPU that this process sees."""

    def __init__(self, limit_bytes: int) -> None:
        """`limit_bytes` 0: all that is free now. More than the limit cannot be allocated."""
        free, total = torch.cuda.mem_get_info()
        self.limit_bytes = min(limit_bytes or total, free)
        torch.cuda.set_per_process_memory_fraction(self.limit_bytes / total)

    def used_bytes(self) -> int:
        return int(torch.cuda.memory_allocated())

    def peak_bytes(self) -> int:
        return int(torch.cuda.max_memory_allocated())

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


def memory_of(*, on_gpu: bool, limit_bytes: int) -> Memory:
    """Of the device that trains; `limit_bytes` 0: no limit was given."""
    return GpuMemory(limit_bytes) if on_gpu else HostMemory(limit_bytes)


def _status(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * KIB
    raise OSError(f"{STATUS} of process {os.getpid()} has no {field}")
