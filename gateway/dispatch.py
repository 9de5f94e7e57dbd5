"""A request on its way to a shard, and to another one if the first dies before a token came.

version -> route -> lease -> render -> generate -> outputs
             ^________________________________| shard died, no token yet: once
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

from engine.errors import CrashPart, ShardUnavailable
from engine.generation import GenerationRequest, Output, VersionKey
from engine.pool import Route, ShardPool
from engine.ring import NoShardOpen
from gateway import metrics
from gateway.admission import Admission
from gateway.call import Call
from gateway.retry_budget import RetryBudget


class Dispatch:
    """Sends the requests of one worker to its shards."""

    def __init__(self, pool: ShardPool, admission: Admission) -> None:
        self._pool = pool
        self._budget = RetryBudget(admission)

    async def outputs(
        self, request: GenerationRequest, key: VersionKey | None, call: Call
    ) -> AsyncGenerator[Output, None]:
        """The outputs of one request. Notes on the call who answers.

        Open it with `contextlib.aclosing`. Raises what `Shard.generate` and `Route.lease` do, and
        NoShardOpen.
        """
        route = self._place(key, call)
        try:
            async with contextlib.aclosing(_run(request, route, call)) as outputs:
                async for output in outputs:
                    yield output
            return
        except ShardUnavailable as death:
            part = death.part
            again = self._second(route, call, part)
            if again is None:
                raise
        call.shard = again.shard.name
        metrics.retries.inc()
        with self._budget.retry(part is CrashPart.SUSPECT):
            async with contextlib.aclosing(_run(request, again, call)) as outputs:
                async for output in outputs:
                    yield output

    def _place(self, key: VersionKey | None, call: Call) -> Route:
        route = self._pool.route_to(key)
        call.shard = route.shard.name
        metrics.observe_placement(route)
        return route

    def _second(self, first: Route, call: Call, part: CrashPart) -> Route | None:
        """Where to try it once more; None: the caller is told, and decides by itself.

        What crashed an engine alone would crash the next one too. Of others that were in the crash,
        one goes at a time: if it is the one, they are not in its second crash.
        """
        if call.first_token_s is not None or part is CrashPart.ALONE:
            return None
        if not self._budget.has_room(part is CrashPart.SUSPECT):
            return None
        with contextlib.suppress(NoShardOpen):
            return self._pool.route_to(first.key, without=[first.shard.name])
        return None


async def _run(
    request: GenerationRequest, route: Route, call: Call
) -> AsyncGenerator[Output, None]:
    with metrics.shard_inflight_of(route.shard.name).track_inprogress():
        async with route.lease() as version:
            prompt = await route.shard.render(request.prompt)
            call.render_s = prompt.render_s
            async with contextlib.aclosing(
                route.shard.generate(request, prompt, version)
            ) as outputs:
                async for output in outputs:
                    yield output
