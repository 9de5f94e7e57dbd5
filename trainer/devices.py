"""The devices that train: the CPU, and GPUs by number.

A GPU is asked through `nvidia-smi`, which comes with the driver: a query by torch would keep a
few hundred megabytes of the GPU for the asking process, for as long as it lives.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from trainer.cgroup import cgroup_memory
from trainer.errors import TrainingUnavailable

CPU = "cpu"

MEMORY_SHARE = 0.95
"""Of what is free on a GPU when a run starts; the rest is left to those beside it."""
QUERY_S = 10.0
"""How long a query of a GPU may take. A driver that hangs hangs its tools."""
FIRST_BFLOAT16 = 8.0
"""CUDA's compute capability from which on a GPU computes in bfloat16 (Ampere)."""
KIB, MIB = 1024, 1024**2
CPU_INFO = Path("/proc/cpuinfo")
CPU_BFLOAT16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}
"""Of x86 and Arm. Without one, PyTorch computes in bfloat16 many times slower than in float32."""


@dataclass(frozen=True, slots=True)
class Device:
    """One device, which runs one job at a time."""

    name: str
    """`cpu`, or the number of a GPU."""

    @property
    def on_gpu(self) -> bool:
        return self.name != CPU


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What a device has now."""

    memory_bytes: int
    """All of it."""
    memory_available_bytes: int
    bfloat16: bool
    """Whether it computes in bfloat16."""


def usable_bytes(facts: DeviceFacts, *, on_gpu: bool) -> int:
    """Memory that a run may take which starts now; 0: it is given no limit.

    A limit is there to be tried out (`fit_micro_batch`), and on a CPU that would take the memory
    from serving, or have the kernel end one of the two.
    """
    return int(MEMORY_SHARE * facts.memory_available_bytes) if on_gpu else 0


def device_facts(device: Device) -> DeviceFacts:
    """Ask a device; takes up to a second. Raises TrainingUnavailable if it does not answer."""
    return _gpu_facts(device) if device.on_gpu else _cpu_facts()


def _cpu_facts() -> DeviceFacts:
    total, available = cpu_memory()
    return DeviceFacts(total, available, bfloat16=cpu_computes_in_bfloat16())


def cpu_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Bytes of memory for the CPU, and those that are available: the machine's, or what a
    container may have of them. `root` has `proc` and `sys`."""
    lines = (root / "proc/meminfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    total, available = (int(fields[name].split()[0]) * KIB for name in ("MemTotal", "MemAvailable"))
    for group in cgroup_memory(root):
        total, available = min(total, group.limit_bytes), min(available, group.available_bytes)
    return total, min(total, available)


def cpu_computes_in_bfloat16() -> bool:
    """Whether the CPU has instructions for it."""
    return bool(CPU_BFLOAT16_FLAGS & set(cpu_field("flags", "Features").split()))


def cpu_field(*names: str) -> str:
    """The first field of these names that the system tells of the CPU; empty: it has none."""
    for line in CPU_INFO.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""


def _gpu_facts(device: Device) -> DeviceFacts:
    command = [
        "nvidia-smi",
        f"--id={device.name}",
        "--query-gpu=memory.total,memory.free,compute_cap",
        "--format=csv,noheader,nounits",
    ]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=QUERY_S, check=True
        ).stdout
        total, free, capability = answer.strip().split(",")
        return DeviceFacts(
            int(total) * MIB, int(free) * MIB, bfloat16=float(capability) >= FIRST_BFLOAT16
        )
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise TrainingUnavailable(
            f"GPU {device.name} does not answer nvidia-smi ({type(error).__name__}): give the "
            "gateway the number of a GPU that is there, or train on the cpu"
        ) from error
