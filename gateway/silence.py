"""How long another process has not answered, in the time of our own event loop.

A group of processes that is stopped and goes on, a machine that sleeps, and one that lacks
processors hold up who asks as well as who is asked. So time is counted in steps of our own loop,
none for more than it was to take: what passes while we do not run accuses nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

STEP_S = 1.0
"""How often is asked, and looked for the answer."""


async def until_silent(
    ask: Callable[[], Awaitable[object]], limit_s: float, first_limit_s: float
) -> None:
    """Ask again and again, and return once there is no answer for `limit_s`; for `first_limit_s`
    to the first question. Raises what `ask` raises."""
    while await _answers(ask, first_limit_s):
        first_limit_s = limit_s
        await asyncio.sleep(STEP_S)


async def _answers(ask: Callable[[], Awaitable[object]], limit_s: float) -> bool:
    asking = asyncio.ensure_future(ask())
    waited_s = 0.0
    try:
        while waited_s < limit_s:
            step_s = min(STEP_S, limit_s - waited_s)
            await asyncio.wait({asking}, timeout=step_s)
            if asking.done():
                asking.result()
                return True
            waited_s += step_s
        return False
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
