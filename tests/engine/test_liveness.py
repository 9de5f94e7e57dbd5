"""Nobody waits for a core that is dead, dies, or does not answer in time."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from engine.errors import ShardUnavailable
from engine.liveness import Liveness, runs
from engine.screening import Screening
from engine.shard import VllmShard

LONG_S, SHORT_S = 60.0, 0.02


class Core:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.asked = 0
        self.given_up = 0

    async def ask(self) -> str:
        self.asked += 1
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        return "answer"


@pytest.fixture
def core() -> Core:
    return Core()


async def test_an_answer_comes_through(core: Core) -> None:
    core.may_answer.set()
    assert await Liveness("shard-1").answer(core.ask(), LONG_S) == "answer"


async def test_who_waits_when_the_core_dies_is_told_at_once(core: Core) -> None:
    liveness = Liveness("shard-1")
    waiting = [asyncio.create_task(liveness.answer(core.ask(), LONG_S)) for _ in range(3)]
    while core.asked < 3:
        await asyncio.sleep(0)
    assert not liveness.dead
    liveness.declare_dead()
    liveness.declare_dead()
    for failed in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(failed, ShardUnavailable) and failed.shard == "shard-1"
    await asyncio.sleep(0)
    assert core.given_up == 3 and liveness.dead


async def test_who_asks_a_dead_core_is_told_at_once(core: Core) -> None:
    liveness = Liveness("shard-1")
    liveness.declare_dead()
    with pytest.raises(ShardUnavailable):
        await asyncio.wait_for(liveness.answer(core.ask(), LONG_S), 1)


async def test_a_core_that_does_not_answer_in_time_is_not_waited_for(core: Core) -> None:
    liveness = Liveness("shard-1")
    with pytest.raises(ShardUnavailable):
        await liveness.answer(core.ask(), SHORT_S)
    assert not liveness.dead, "it may be busy"


async def test_what_the_call_raises_comes_through_but_for_vllms_word_for_dead() -> None:
    async def raises(error: Exception) -> None:
        raise error

    liveness = Liveness("shard-1")
    with pytest.raises(ValueError, match="no such rank"):
        await liveness.answer(raises(ValueError("no such rank")), LONG_S)
    with pytest.raises(ShardUnavailable):
        await liveness.answer(raises(EngineDeadError()), LONG_S)


async def test_who_leaves_takes_the_question_along(core: Core) -> None:
    waiting = asyncio.create_task(Liveness("shard-1").answer(core.ask(), LONG_S))
    while not core.asked:
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await asyncio.sleep(0)
    assert core.given_up == 1


def test_a_process_runs_unless_it_is_stopped_or_has_ended() -> None:
    assert runs(os.getpid())
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with process:
        assert runs(process.pid)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        assert not runs(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not runs(process.pid), "nobody has collected it"
    assert not runs(process.pid)


def test_nobody_waits_for_the_greeting_of_a_core_that_has_ended() -> None:
    """The event loop would be held up for VLLM_ENGINE_READY_TIMEOUT_S."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    slot: Any = SimpleNamespace(core_pid=process.pid)
    with pytest.raises(TimeoutError, match="has ended"):
        VllmShard.attach(slot, Screening())
