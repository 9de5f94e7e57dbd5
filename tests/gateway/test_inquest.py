"""How a core died and whom that accuses, over a core that a test scripts and a real record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.core_death import CoreDeath
from engine.fingerprint import tag
from engine.step_record import StepRecord
from gateway.inquest import inquest


class Core:
    """A core that has ended somehow."""

    def __init__(self, record_path: Path) -> None:
        self.record_path = record_path
        self.record = StepRecord(record_path, 2, 8, 2)
        self.code: int | None = -9
        self.is_stopped = False
        self.record.begin([tag("a", 1)], [tag("b", 2)], [""])

    async def exit_code(self) -> int | None:
        return self.code


class Shard:
    """The host's client of it."""

    said_dead = False


@pytest.fixture
def core(tmp_path: Path) -> Core:
    return Core(tmp_path / "record")


async def held(core: Any, said_dead: bool = False, stalled_s: float | None = None) -> CoreDeath:
    shard: Any = Shard()
    shard.said_dead = said_dead
    return await inquest(core, shard, stalled_s)


def accused(death: CoreDeath) -> set[str]:
    return {request.request_id for request in death.steps.requests}


@pytest.mark.parametrize(("code", "reason"), [(-11, "killed by SIGSEGV"), (1, "exit code 1")])
async def test_a_core_that_crashes_accuses_who_was_in_its_step(
    core: Core, code: int, reason: str
) -> None:
    core.code = code
    death = await held(core)
    assert (death.reason, death.crashed) == (reason, True)
    assert accused(death) == {"a", "b"}


@pytest.mark.parametrize("code", [-9, -15, 0, None])
async def test_one_that_was_ended_or_did_not_end_accuses_nobody(
    core: Core, code: int | None
) -> None:
    core.code = code
    death = await held(core)
    assert not death.crashed and not accused(death)


async def test_one_that_says_that_an_exception_ends_it_is_not_waited_for(core: Core) -> None:
    core.code = None
    death = await held(core, said_dead=True)
    assert death.crashed and accused(death) == {"a", "b"}


@pytest.mark.parametrize("said_dead", [True, False])
async def test_one_whose_executor_was_killed_accuses_nobody(core: Core, said_dead: bool) -> None:
    core.record.note_exits([-9, -15])
    core.code = 1
    death = await held(core, said_dead)
    assert not death.crashed and not accused(death)


@pytest.mark.parametrize("stopped", [True, False])
async def test_one_that_hangs_accuses_its_step_unless_somebody_stopped_it(
    core: Core, stopped: bool
) -> None:
    core.is_stopped = stopped
    death = await held(core, stalled_s=3.0)
    assert death.reason == "did not answer for 3 s, and was killed"
    assert death.crashed is not stopped
    assert accused(death) == (set() if stopped else {"a", "b"})


async def test_what_it_computed_until_it_ended_counts(core: Core) -> None:
    """A core may go on after its first sign of death."""

    async def exit_code() -> int:
        core.record.end(0)
        core.record.begin([tag("c", 3)], [], [""])
        return -11

    core.exit_code = exit_code  # type: ignore[method-assign]
    assert accused(await held(core)) == {"c"}


async def test_a_crash_between_two_steps_accuses_nobody(core: Core) -> None:
    core.record.end(0)
    core.code = -11
    death = await held(core)
    assert death.crashed and not accused(death)


async def test_one_without_a_client_is_judged_by_its_exit(core: Core) -> None:
    either: Any = core
    assert (await inquest(either, None, None)).reason == "killed by SIGKILL"
