"""Whether a core lives, as a client of it knows. Nobody waits for an answer of a dead one."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import ShardUnavailable

T = TypeVar("T")

_STILL = frozenset("ZXxTt")
"""States of processes that have ended, or are stopped (proc(5))."""


def runs(pid: int) -> bool:
    """Whether a process can do anything now."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in _STILL


class Liveness:
    """Ends waits when the core is declared dead. vLLM itself would wait for ever
    (vllm/v1/engine/core_client.py:1279)."""

    def __init__(self, shard: str) -> None:
        """To be made on the event loop that waits."""
        self._shard = shard
        self._dead: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def dead(self) -> bool:
        """Whether the core was declared dead."""
        return self._dead.done()

    def declare_dead(self) -> None:
        """End all waits, and each that comes. Safe to call twice."""
        if not self._dead.done():
            self._dead.set_result(None)

    async def answer(self, call: Coroutine[Any, Any, T], timeout_s: float | None) -> T:
        """What the core answers.

        Raises ShardUnavailable if it is dead, dies, or takes longer; else what `call` raises.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        asking = asyncio.ensure_future(call)
        try:
            await asyncio.wait(
                (asking, self._dead), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not asking.done():
                raise ShardUnavailable(self._shard)
            return asking.result()
        except EngineDeadError as error:
            raise ShardUnavailable(self._shard) from error
        finally:
            asking.cancel()
