"""What a gateway has open when it is quiet: its processes, and the descriptors of each."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.e2e.gateway_process import GatewayProcess

KINDS = {
    "VLLM::EngineCore": "core",
    "VLLM::Worker": "worker of a core",
    "resource_tracker": "resource tracker",
    "spawn_main": "gateway worker",
    "gateway serve": "host",
}
"""What a command line or title tells, the first that fits."""

Descriptors = Counter[str]
"""How many of each kind."""


@dataclass(slots=True)
class Census:
    """One count."""

    processes: Counter[str]
    """By kind."""
    descriptors: Mapping[int, Descriptors]
    """Of the host and of each worker that serves, by pid."""
    strays: list[str] = field(default_factory=list)
    """Processes that the host has started and that are no longer below it."""

    @classmethod
    def of(cls, gateway: GatewayProcess) -> Census:
        """That of a gateway, now."""
        family = gateway.family()
        counted = [gateway.process.pid, *gateway.serving_workers()]
        return cls(
            processes=Counter(filter(None, map(_kind, family))),
            descriptors={pid: _descriptors(pid) for pid in counted},
            strays=cls.strays_of(gateway.process.pid, {process.pid for process in family}),
        )

    @staticmethod
    def strays_of(host: int, family: Container[int] = ()) -> list[str]:
        """Processes of the host's session that are none of its family, whoever their parent is."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                if os.getsid(process.pid) == host and process.pid not in family:
                    told = " ".join(process.cmdline())
                    if process.status() != psutil.STATUS_ZOMBIE:
                        found.append(f"{process.pid} {told[-80:]}")
        return found


def _kind(process: psutil.Process) -> str | None:
    try:
        told = " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return None  # it has just ended, or is collected soon
    return next((kind for sign, kind in KINDS.items() if sign in told), told)


def _descriptors(pid: int) -> Descriptors:
    found = Descriptors()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found[re.sub(r"\d+", "N", os.readlink(descriptor))] += 1
    return found
