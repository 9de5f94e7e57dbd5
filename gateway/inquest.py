"""How a core died, and what it was computing, found out by the host before it tells anybody."""

from __future__ import annotations

from engine.core import EngineCore
from engine.core_death import CoreDeath, crashed_by_exception, crashed_by_exit, exit_reason
from engine.shard import VllmShard
from engine.step_record import Steps, read_steps


async def inquest(core: EngineCore, shard: VllmShard | None, stalled_s: float | None) -> CoreDeath:
    """Of a core that is dead, or has not answered for `stalled_s` and is about to be killed.

    `shard` is the host's client of it, which does not know yet that it is dead.
    """
    if stalled_s is not None:
        # One that somebody has stopped hangs by no fault of what it computes.
        crashed = not core.is_stopped
        reason = f"did not answer for {stalled_s:g} s, and was killed"
        steps = read_steps(core.record_path)
    elif shard is not None and shard.said_dead:
        steps = read_steps(core.record_path)
        crashed = crashed_by_exception(steps.executor_exits)
        reason = "an exception ended it"
    else:
        code = await core.exit_code()
        reason = exit_reason(code)
        steps = read_steps(core.record_path)
        by_itself = code is not None and crashed_by_exit(code)
        crashed = by_itself and crashed_by_exception(steps.executor_exits)
    return CoreDeath(reason, crashed, steps if crashed else Steps())
