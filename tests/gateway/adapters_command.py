"""Runs `gateway adapters` as a process of its own, for tests."""

from __future__ import annotations

import asyncio
import sys
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
    *args: str, target: str, stderr: int = asyncio.subprocess.PIPE
) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-m", "gateway", "adapters", *args),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
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
    return Result(process.returncode, output.decode(), (errors or b"").decode())


async def run(*args: str, target: str) -> Result:
    return await ended(await started(*args, target=target))


async def answered(*args: str, target: str) -> str:
    """What a command that succeeds in silence prints."""
    result = await run(*args, target=target)
    assert (result.code, result.errors) == (0, "")
    return result.output
