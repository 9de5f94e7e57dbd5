"""The states of a worker, as the host sees them."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from gateway.worker_process import TRANSITIONS, WorkerProcess, WorkerState

IMPORTING, STANDBY, ATTACHING = WorkerState.IMPORTING, WorkerState.STANDBY, WorkerState.ATTACHING
SERVING, DRAINING, ENDED = WorkerState.SERVING, WorkerState.DRAINING, WorkerState.ENDED

LIFE = (IMPORTING, STANDBY, ATTACHING, SERVING, DRAINING, ENDED)
"""Of a worker to which nothing happens."""
ALLOWED = {
    *itertools.pairwise(LIFE),
    # A drain may come at any time.
    *((state, DRAINING) for state in (IMPORTING, STANDBY, ATTACHING)),
    # And so may its end.
    *((state, ENDED) for state in (IMPORTING, STANDBY, ATTACHING, SERVING)),
}
MOVES = list(itertools.product(WorkerState, repeat=2))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def worker() -> AsyncIterator[WorkerProcess]:
    """A worker that is killed before it can import anything."""
    worker = WorkerProcess()
    worker.kill()
    yield worker
    worker.reap()


def name_of(state: WorkerState) -> str:
    return state.value


@pytest.mark.parametrize(("before", "after"), MOVES, ids=name_of)
async def test_a_worker_makes_the_moves_that_are_allowed_and_no_other(
    before: WorkerState, after: WorkerState, worker: WorkerProcess
) -> None:
    worker.state = before
    if (before, after) in ALLOWED:
        worker.move(after)
        assert worker.state is after
    else:
        with pytest.raises(ValueError, match=f"worker {worker.pid} cannot go from"):
            worker.move(after)
        assert worker.state is before


def test_the_table_has_every_state() -> None:
    assert TRANSITIONS.keys() == set(WorkerState)


def test_a_worker_begins_with_its_imports_and_never_returns_to_a_state() -> None:
    """A core greets a client slot once, so no worker can attach twice."""
    ages = {state: age for age, state in enumerate(LIFE)}
    for before, moves in TRANSITIONS.items():
        assert all(ages[before] < ages[after] for after in moves)


def test_a_worker_serves_only_after_it_was_attached() -> None:
    assert {before for before, moves in TRANSITIONS.items() if SERVING in moves} == {ATTACHING}


def test_a_worker_can_always_end_and_then_does_nothing_more() -> None:
    assert all(ENDED in TRANSITIONS[state] for state in WorkerState if state is not ENDED)
    assert not TRANSITIONS[ENDED]


async def test_a_worker_that_was_killed_is_collected_with_its_signal() -> None:
    worker = WorkerProcess()
    assert worker.state is IMPORTING
    worker.kill()
    assert await worker.channel.receive() is None, "the pipe ends with the process"
    assert worker.reap() == -9
