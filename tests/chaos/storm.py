"""The storm: blow after blow on a gateway under load, and a count of what is open after each."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import time
from collections.abc import Callable

from tests.chaos.blow import Blow, BlowKind
from tests.chaos.census import Census
from tests.chaos.load import Load
from tests.e2e.gateway_process import GatewayProcess
from tests.e2e.shard_calls import NAMES, core_of

WHOLE_TIMEOUT_S = 300.0
"""How long a core may take to be back on a machine that has much else to do."""
QUIET_TIMEOUT_S = 60.0
SETTLING = 15
"""Counts, a second apart, until two are equal."""
BEFORE_S = (1.0, 4.0)
"""Load before each blow."""
AFTER_S = 2.0
"""And after it, once the gateway is whole again."""
GAUGES = ("gateway_inflight_calls", "vllm:num_requests_running", "vllm:num_requests_waiting")


class Storm:
    """All blows on one gateway."""

    def __init__(
        self,
        gateway: GatewayProcess,
        load: Load,
        chance: random.Random,
        tell: Callable[[str], None],
    ) -> None:
        """`tell` is told what happens, for people who wait."""
        self.blows: list[Blow] = []
        self.censuses: list[Census] = []
        """Before all, and after each."""
        self._gateway = gateway
        self._load = load
        self._chance = chance
        self._tell = tell

    async def strike(self, kind: BlowKind) -> None:
        """One blow, under load from before it until after the gateway is whole again."""
        async with self._load.running():
            await asyncio.sleep(self._chance.uniform(*BEFORE_S))
            blow = await asyncio.to_thread(self._hit, kind)
            self.blows.append(blow)
            if blow.whole_s is not None:
                await asyncio.sleep(AFTER_S)
        took = "never" if blow.whole_s is None else f"after {blow.whole_s - blow.at_s:.1f} s"
        self._tell(f"{len(self.blows)}. {kind.value} of {blow.target}: whole {took}")
        await self.count()

    async def count(self) -> None:
        """Count what is open, once it is quiet."""
        await asyncio.to_thread(self._wait_quiet)
        census, before = await asyncio.to_thread(Census.of, self._gateway), None
        for _ in range(SETTLING):  # connections are closed, and dead processes are collected
            if census == before:
                break
            await asyncio.sleep(1.0)
            census, before = await asyncio.to_thread(Census.of, self._gateway), census
        self.censuses.append(census)

    def gauges(self) -> dict[str, float]:
        """What must be 0 while nothing runs, over all workers and shards."""
        return {name: sum(self._gateway.metrics(name)) for name in GAUGES}

    def _hit(self, kind: BlowKind) -> Blow:
        gateway = self._gateway
        shard = self._chance.choice(NAMES)
        worker = self._chance.choice(gateway.serving_workers())
        if kind is BlowKind.WORKER_KILLED:
            blow = Blow(kind, f"worker {worker}", time.monotonic())
            served = gateway.log.count("is serving")
            os.kill(worker, signal.SIGKILL)
            signs = [(r"worker \d+ is serving", served + 1), (rf"requests of worker {worker}\b", 1)]
        else:
            blow = Blow(kind, shard, time.monotonic())
            back = rf"{shard} is up again"
            ups = len(re.findall(back, gateway.log))
            number = signal.SIGKILL if kind is BlowKind.CORE_KILLED else signal.SIGSTOP
            core_of(gateway, shard).send_signal(number)
            signs = [(back, ups + 1)]
        try:
            for pattern, count in signs:
                gateway.wait_log(pattern, WHOLE_TIMEOUT_S, count=count)
            self._wait(lambda: gateway.metrics("gateway_workers", state="standby") == [1.0])
        except AssertionError:
            return blow
        blow.whole_s = time.monotonic()
        return blow

    def _wait_quiet(self) -> None:
        """Not for ever: what is not quiet by then is a finding."""
        try:
            self._wait(lambda: not any(self.gauges().values()), QUIET_TIMEOUT_S)
        except AssertionError as error:
            self._tell(str(error))

    def _wait(self, condition: Callable[[], bool], timeout_s: float = WHOLE_TIMEOUT_S) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, f"not quiet: {self.gauges()}"
            time.sleep(0.1)
