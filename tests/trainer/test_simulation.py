"""Jobs, queue, host and training processes under a clock that is simulated, killed at any moment.

The code is the trainer's own (`trainer/jobs.py` and all below it, `store/job_transitions.py`);
files, processes and the passing of time are simulated. A seed decides everything, so what it found
it finds again: run it alone with SEED=n. SEEDS=n runs more of them, or fewer.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from store.job_records import JobState
from store.sqlite_jobs import SqliteJobs
from tests.trainer.simulation.story import Found, simulate, stage

SEEDS = int(os.environ.get("SEEDS", "10000"))
AT_ONCE, PROCESSES = 500, 2


@pytest.mark.timeout(900)
def test_simulation() -> None:
    """No job is lost, run twice at once or published twice; sequences have no gap; devices are
    given in a fair order, and what tenants had of them is never forgotten."""
    only = os.environ.get("SEED")
    if only:
        simulate([int(only)])
        return
    began_s = time.monotonic()
    total = Found()
    parts = [range(at, min(at + AT_ONCE, SEEDS)) for at in range(0, SEEDS, AT_ONCE)]
    context = multiprocessing.get_context("spawn")  # threads of other tests are no ground to fork
    with ProcessPoolExecutor(PROCESSES, context) as processes:
        for found in processes.map(simulate, parts):
            total.add(found)
    ended = {state.value: count for state, count in total.states.items()}
    print(
        f"\n{SEEDS} seeds from 0, 0 violations: {total.points} points at which the host might "
        f"have died, {total.hosts} hosts, {total.processes} training processes, {total.events} "
        f"events, {total.grants} jobs passed by another, jobs {ended}, "
        f"in {time.monotonic() - began_s:.0f} s"
    )
    assert set(total.states) == {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}
    assert total.hosts > SEEDS and total.processes > SEEDS and total.grants


def test_simulation_of_a_seed_is_the_same_again_and_on_sqlite() -> None:
    with stage() as play:
        for seed in range(12):
            first = play(seed)
            assert play(seed).trace == first.trace
            on_sqlite = play(
                seed,
                lambda clock_ns, make_uid: SqliteJobs(
                    Path(":memory:"), clock_ns=clock_ns, make_uid=make_uid
                ),
            )
            told = [entry[:4] for entry in first.trace]
            assert [entry[:4] for entry in on_sqlite.trace] == told
