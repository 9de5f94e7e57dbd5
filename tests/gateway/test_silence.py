"""Who is silent for too long, and who only seems so because we did not run: on a virtual clock."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from gateway.silence import STEP_S, until_silent
from tests.engine.virtual_time import VirtualTimeLoop

LIMIT_S, FIRST_LIMIT_S = 30.0, 100.0


class Other:
    """Answers after so many seconds each."""

    def __init__(self, *delays_s: float) -> None:
        self.asked = 0
        self.open = 0
        self._delays_s = list(delays_s)

    async def ask(self) -> None:
        self.asked += 1
        self.open += 1
        try:
            await asyncio.sleep(self._delays_s.pop(0) if self._delays_s else 1e9)
        finally:
            self.open -= 1


def took_s(work: Coroutine[Any, Any, None], freezes: tuple[float, float] | None = None) -> float:
    """How long `work` takes; after the first of `freezes` nothing runs for the second."""
    loop = VirtualTimeLoop()

    async def measure() -> float:
        begin_s = loop.time()
        if freezes is not None:
            loop.call_later(freezes[0], lambda: pass_by(loop, freezes[1]))
        await work
        return loop.time() - begin_s

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(measure())


def pass_by(loop: VirtualTimeLoop, seconds: float) -> None:
    loop._clock.now_s += seconds


def test_who_never_answers_is_silent_after_the_first_limit() -> None:
    other = Other()
    assert took_s(until_silent(other.ask, LIMIT_S, FIRST_LIMIT_S)) == FIRST_LIMIT_S
    assert (other.asked, other.open) == (1, 0), "nothing is left of the question"


@pytest.mark.parametrize("limit_s", [LIMIT_S, 2.5])
def test_who_stops_answering_is_silent_after_the_limit(limit_s: float) -> None:
    other = Other(FIRST_LIMIT_S - 1, 0.5, limit_s - 0.5)
    before_s = FIRST_LIMIT_S - 1 + 0.5 + limit_s - 0.5 + 3 * STEP_S
    assert took_s(until_silent(other.ask, limit_s, FIRST_LIMIT_S)) == before_s + limit_s
    assert (other.asked, other.open) == (4, 0)


def test_time_in_which_we_do_not_run_accuses_nobody() -> None:
    """A laptop that sleeps for an hour in the middle of a question."""
    other = Other(1.0, LIMIT_S + 5 + 3600.0)
    assert took_s(until_silent(other.ask, LIMIT_S, LIMIT_S), (5.0, 3600.0)) > 3600.0
    assert other.asked == 2
    other = Other(1.0, LIMIT_S - 5 + 3600.0)
    seconds = took_s(until_silent(other.ask, LIMIT_S, LIMIT_S), (5.0, 3600.0))
    assert other.asked == 3, "it answered once it could"
    assert seconds > 3600.0 + LIMIT_S


def test_what_is_raised_comes_through() -> None:
    async def ask() -> None:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        took_s(until_silent(ask, LIMIT_S, LIMIT_S))
