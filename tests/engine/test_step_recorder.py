"""The recorder in a core: on a scheduler that a test scripts."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.fingerprint import tag
from engine.step_record import Steps, read_steps
from engine.step_recorder import StepRecorder

LORA = SimpleNamespace(lora_name="acme/alpha@1")
BATCH = 256


class Scheduler:
    """Schedules what it is told to."""

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        self.next: Any = None
        self.failure: Exception | None = None
        self.updated: list[Any] = []

    def known(self, number: int, lora: Any = None) -> str:
        request_id = f"{tag(f'{number:032x}', number)}-0123abcd"
        self.requests[request_id] = SimpleNamespace(lora_request=lora)
        return request_id

    def schedule(self, throttle: bool = False) -> Any:
        if isinstance(self.next, Exception):
            raise self.next
        return self.next

    def update_from_output(self, scheduled: Any, output: str) -> str:
        if self.failure is not None:
            raise self.failure
        self.updated.append(scheduled)
        return output


class Core:
    """What the recorder looks at of a core."""

    def __init__(self) -> None:
        self.batch_queue_size = 2
        self.scheduler = Scheduler()
        self.model_executor: Any = SimpleNamespace()
        self.vllm_config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=BATCH),
            lora_config=SimpleNamespace(max_loras=8),
        )
        self.told: list[str] = []

    def _send_engine_dead(self) -> None:
        self.told.append("dead")


def batch(fresh: list[str], older: list[str]) -> Any:
    return SimpleNamespace(
        num_scheduled_tokens=dict.fromkeys((*fresh, *older), 1),
        scheduled_new_reqs=[SimpleNamespace(req_id=request_id) for request_id in fresh],
        scheduled_cached_reqs=SimpleNamespace(req_ids=older),
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "record"


@pytest.fixture
def core(path: Path) -> Core:
    core = Core()
    StepRecorder(core, path)
    return core


def numbers(steps: Steps) -> tuple[set[int], set[int]]:
    return {r.fingerprint for r in steps.fresh}, {r.fingerprint for r in steps.older}


def test_a_step_is_open_from_its_schedule_to_its_update(core: Core, path: Path) -> None:
    scheduler = core.scheduler
    one, two = scheduler.known(1), scheduler.known(2, LORA)
    scheduler.next = step = batch([two], [one])
    assert scheduler.schedule(False) is step
    steps = read_steps(path)
    assert numbers(steps) == ({2}, {1}) and steps.versions == {"", "acme/alpha@1"}
    assert scheduler.update_from_output(step, "outputs") == "outputs"
    assert read_steps(path) == Steps() and scheduler.updated == [step]


def test_two_steps_on_their_way_end_in_their_order(core: Core, path: Path) -> None:
    scheduler = core.scheduler
    one, two, three = map(scheduler.known, (1, 2, 3))
    steps = [batch([one], []), batch([two], [one]), batch([three], [two])]
    for step in steps:  # as many as vLLM has at most while it takes up the oldest
        scheduler.next = step
        scheduler.schedule()
    assert numbers(read_steps(path)) == ({1, 2, 3}, set())
    scheduler.update_from_output(steps[0], "")
    assert numbers(read_steps(path)) == ({2, 3}, {1})
    scheduler.update_from_output(steps[1], "")
    assert numbers(read_steps(path)) == ({3}, {2})


def test_a_step_without_requests_is_none(core: Core, path: Path) -> None:
    core.scheduler.next = step = batch([], [])
    core.scheduler.schedule()
    assert read_steps(path) == Steps()
    core.scheduler.update_from_output(step, "")
    assert read_steps(path) == Steps()


def test_a_step_whose_outputs_cannot_be_taken_stays_open(core: Core, path: Path) -> None:
    scheduler = core.scheduler
    scheduler.next = step = batch([scheduler.known(1)], [])
    scheduler.schedule()
    scheduler.failure = RuntimeError("a grammar")
    with pytest.raises(RuntimeError, match="a grammar"):
        scheduler.update_from_output(step, "")
    assert numbers(read_steps(path)) == ({1}, set())


def test_who_makes_the_scheduler_raise_is_among_all_that_it_knows(core: Core, path: Path) -> None:
    scheduler = core.scheduler
    scheduler.known(1)
    scheduler.known(2, LORA)
    scheduler.next = RuntimeError("no block")
    with pytest.raises(RuntimeError, match="no block"):
        scheduler.schedule()
    assert numbers(read_steps(path)) == (set(), {1, 2})


def test_before_the_clients_hear_of_a_death_it_is_known_who_had_died(
    core: Core, path: Path
) -> None:
    core._send_engine_dead()
    assert core.told == ["dead"] and read_steps(path).executor_exits == ()
    codes = (None, -9, -15)
    core.model_executor.workers = [
        SimpleNamespace(proc=SimpleNamespace(exitcode=code)) for code in codes
    ]
    core._send_engine_dead()
    assert core.told == ["dead", "dead"] and read_steps(path).executor_exits == (-9, -15)


def test_a_step_of_256_requests_costs_less_than_a_millisecond(core: Core) -> None:
    """Prints what it costs; the limit is far off, since a test machine may be busy."""
    scheduler = core.scheduler
    ids = [scheduler.known(number, LORA if number % 2 else None) for number in range(BATCH)]
    scheduler.next = step = batch([], ids)
    plain = Scheduler()
    plain.next = step

    def fastest_us(of: Any) -> float:
        times = []
        for _ in range(500):
            start = time.perf_counter()
            of.schedule()
            of.update_from_output(step, "")
            times.append(time.perf_counter() - start)
        return min(times) * 1e6

    cost_us = fastest_us(scheduler) - fastest_us(plain)
    print(f"a step of {BATCH} requests is recorded in {cost_us:.1f} us")
    assert cost_us < 1000
