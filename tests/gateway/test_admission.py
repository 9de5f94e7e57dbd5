"""Who may start, how many at once, and how all are ended."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from engine.errors import ShardUnavailable
from gateway.admission import Admission, Draining, Overloaded
from gateway.call import Call

SOON_S = 5.0


@pytest.fixture
async def admission() -> Admission:
    return Admission(limit=2)


async def run_for_ever(admission: Admission, started: asyncio.Event) -> None:
    with admission.track(Call("GenerateStream")):
        started.set()
        await asyncio.Event().wait()


async def test_slots_are_given_up_to_the_limit(admission: Admission) -> None:
    with admission.slot(), admission.slot():
        assert admission.held == 2
        with pytest.raises(Overloaded) as caught, admission.slot():
            pass
        assert caught.value.limit == 2
        assert admission.held == 2, "who was refused holds none"
    assert admission.held == 0


async def test_a_slot_comes_back_when_its_holder_fails(admission: Admission) -> None:
    for _ in range(3):
        with contextlib.suppress(ValueError), admission.slot():
            raise ValueError
    with admission.slot(), admission.slot():
        pass


async def test_calls_are_tracked_while_they_run(admission: Admission) -> None:
    one, other = Call("Generate"), Call("Generate")
    with admission.track(one):
        with admission.track(other):
            assert admission.calls == {one, other}
        assert admission.calls == {one}
    assert not admission.calls


async def test_a_call_that_fails_is_tracked_no_more(admission: Admission) -> None:
    with contextlib.suppress(ValueError), admission.track(Call("Generate")):
        raise ValueError
    assert not admission.calls
    assert await admission.wait_idle(0)


async def test_calls_are_not_limited_by_slots(admission: Admission) -> None:
    with contextlib.ExitStack() as running:
        for _ in range(5):
            running.enter_context(admission.track(Call("GetModel")))
        assert len(admission.calls) == 5


async def test_once_closed_new_calls_are_refused_and_running_ones_go_on(
    admission: Admission,
) -> None:
    reason = Draining()
    with admission.track(Call("Generate")):
        admission.close(reason)
        with pytest.raises(Draining) as caught, admission.track(Call("Generate")):
            pass
        assert caught.value is reason
        with admission.slot():
            assert len(admission.calls) == 1


async def test_calls_that_are_refused_do_not_pile_up_in_the_traceback(
    admission: Admission,
) -> None:
    reason = Draining()
    admission.close(reason)
    depths = []
    for _ in range(3):
        with contextlib.suppress(Draining), admission.track(Call("Generate")):
            pass
        frame, depth = reason.__traceback__, 0
        while frame is not None:
            frame, depth = frame.tb_next, depth + 1
        depths.append(depth)
    assert depths == depths[:1] * 3


async def test_who_is_idle_need_not_wait(admission: Admission) -> None:
    assert await admission.wait_idle(0)


async def test_waiting_ends_with_the_last_call(admission: Admission) -> None:
    with admission.track(Call("Generate")):
        with admission.track(Call("Generate")):
            waiting = asyncio.create_task(admission.wait_idle(SOON_S))
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not waiting.done(), "one still runs"
    assert await waiting


async def test_waiting_in_vain_says_so(admission: Admission) -> None:
    with admission.track(Call("Generate")):
        assert not await admission.wait_idle(0.01)


async def test_cutting_ends_every_call_with_the_reason(admission: Admission) -> None:
    tasks = []
    for _ in range(3):
        started = asyncio.Event()
        tasks.append(asyncio.create_task(run_for_ever(admission, started)))
        await started.wait()
    calls = admission.calls
    reason = Draining()
    admission.cut_all(reason)
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), SOON_S)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    assert [call.cut_by for call in calls] == [reason] * 3
    assert await admission.wait_idle(0)


async def test_a_call_that_is_cut_twice_keeps_its_first_reason_and_is_cancelled_once(
    admission: Admission,
) -> None:
    started = asyncio.Event()
    task = asyncio.create_task(run_for_ever(admission, started))
    await started.wait()
    (call,) = admission.calls
    first = ShardUnavailable("shard-0")
    call.cut(first)
    admission.cut_all(Draining())
    assert call.cut_by is first
    assert task.cancelling() == 1
    with pytest.raises(asyncio.CancelledError):
        await task


def test_refusals_say_what_to_do() -> None:
    assert str(Overloaded(7)) == "the gateway holds 7 requests, its limit; retry later"
    assert "retry, on another connection" in str(Draining())
