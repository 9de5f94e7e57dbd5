"""Whether a request is to blame for its engine's death, as a client of that engine can tell.

vLLM tells all clients of an exception before the core's process ends, so a worker mostly knows
first that its core is dead, and the host, which sees how the process ended, has the last word.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from engine.core_death import crashed_by_exception
from engine.errors import CrashPart
from engine.step_record import Steps, read_steps

VERDICT_WAIT_S = 3.0
"""How long a suspect waits for the host before it may be tried elsewhere. The host looks at a core
every second, and is told of the end of its process at once."""


class Verdict:
    """On one core."""

    def __init__(self, record_path: Path) -> None:
        """To be made on the event loop that waits."""
        self._record_path = record_path
        self._said: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._steps: Steps | None = None

    def say(self, crashed: bool) -> None:
        """What the host says of a core that is dead. Safe to call twice."""
        if not self._said.done():
            self._said.set_result(crashed)

    async def part_of(self, fingerprint: int | None, *, waits: bool) -> CrashPart:
        """What a request has to do with the death of the core, which is dead.

        A suspect that `waits` gets here only when the host has spoken, and has told this process
        who is in quarantine now; or after VERDICT_WAIT_S.
        """
        if fingerprint is None or self._is_acquitted:
            return CrashPart.NONE
        if self._steps is None:
            self._steps = read_steps(self._record_path)
        steps = self._steps
        if not self._said.done() and not crashed_by_exception(steps.executor_exits):
            return CrashPart.NONE
        if steps.is_alone(fingerprint):
            return CrashPart.ALONE
        if all(request.fingerprint != fingerprint for request in steps.requests):
            return CrashPart.NONE
        if waits:
            await asyncio.wait({self._said}, timeout=VERDICT_WAIT_S)
        return CrashPart.NONE if self._is_acquitted else CrashPart.SUSPECT

    @property
    def _is_acquitted(self) -> bool:
        """Whether the host has said that nothing which was computed is to blame."""
        return self._said.done() and not self._said.result()
