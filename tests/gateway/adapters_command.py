"""Runs `gateway adapters`, or another command, as a process of its own, for tests."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOON_S = 20.0
"""For what takes a second; a test that needs it all has failed."""


@dataclass(frozen=True, slots=True)
class Result:
    code: int | None
    output: str
    errors: str


async def started(
    *args: str,
    target: str,
    command: Sequence[str] = ("adapters",),
    stdin: int = asyncio.subprocess.DEVNULL,
    stdout: int = asyncio.subprocess.PIPE,
    stderr: int = asyncio.subprocess.PIPE,
) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-m", "gateway", *command, *args),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        cwd=ROOT,
        env={
            "PYTHONPATH": f"{ROOT / 'clients' / 'python'}:{ROOT}",
            "GATEWAY_TARGET": target,
            "TERM": "xterm",
        },
    )


async def ended(process: asyncio.subprocess.Process) -> Result:
    output, errors = await asyncio.wait_for(process.communicate(), SOON_S)
    assert b"Traceback" not in (errors or b"")
    return Result(process.returncode, (output or b"").decode(), (errors or b"").decode())


async def run(*args: str, target: str) -> Result:
    return await ended(await started(*args, target=target))


async def answered(*args: str, target: str) -> str:
    """What a command that succeeds in silence prints."""
    result = await run(*args, target=target)
    assert (result.code, result.errors) == (0, "")
    return result.output
