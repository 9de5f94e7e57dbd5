"""Counting what is open: real processes and descriptors."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import psutil

from tests.chaos.census import Census

SCRIPT = """
import os, subprocess, sys
child = subprocess.Popen(
    [sys.executable, "-c", "print(flush=True); import time; time.sleep(600)"],
    stdout=subprocess.PIPE,
)
child.stdout.readline()
child.stdout.close()
print(child.pid, flush=True)
sys.stdin.read()
"""


def test_a_descriptor_and_a_process_that_nobody_has_are_counted() -> None:
    host = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert host.stdin is not None and host.stdout is not None
    child = psutil.Process(int(host.stdout.readline()))
    try:
        family: list[Any] = [psutil.Process(host.pid), child]
        gateway: Any = SimpleNamespace(
            process=host, family=lambda: family, serving_workers=lambda: [child.pid]
        )
        census = Census.of(gateway)
        assert census.processes.total() == 2 and not census.strays
        assert census.descriptors[host.pid]["pipe:[N]"] == 2
        assert census.descriptors.keys() == {host.pid, child.pid}
        family.remove(child)
        (stray,) = Census.of(gateway).strays
        assert stray.startswith(f"{child.pid} ") and "time.sleep(600)" in stray
        host.stdin.close()
        host.wait()
        assert len(Census.strays_of(host.pid)) == 1, "also when the host is gone"
    finally:
        child.kill()
        host.kill()
        host.wait()
        host.stdout.close()
    while psutil.pid_exists(child.pid) and child.status() != psutil.STATUS_ZOMBIE:
        os.sched_yield()
    assert not Census.strays_of(host.pid)
