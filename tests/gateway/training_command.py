"""Runs commands of `gateway` that train in a thread of the test, where a process of its own, which
takes a second to start, would show nothing more."""

from __future__ import annotations

import asyncio

from typer.testing import CliRunner

from gateway.cli import app
from tests.gateway.adapters_command import SOON_S, Result


async def invoked(*args: str, target: str) -> Result:
    """What the command printed; its outputs are pipes."""
    runner = CliRunner(env={"GATEWAY_TARGET": target})
    async with asyncio.timeout(SOON_S):
        result = await asyncio.to_thread(runner.invoke, app, args)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Result(result.exit_code, result.stdout, result.stderr)


async def printed(*args: str, target: str) -> str:
    """What a command that succeeds in silence prints."""
    result = await invoked(*args, target=target)
    assert (result.code, result.errors) == (0, "")
    return result.output


def rows(table: str) -> dict[str, str]:
    """Name to value, of a table of fields whose names have no two blanks in a row."""
    found = {}
    for line in table.splitlines():
        name, _, value = line.strip().partition("  ")
        if value:
            found[name] = value.strip()
    return found
