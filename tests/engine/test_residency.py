"""The places of a shard: what is loaded for whom, what goes for it, and when."""

from __future__ import annotations

import asyncio
import time

import pytest

from engine import residency as module
from engine.adapter_loader import LoadPhase
from engine.errors import AdapterLoadFailed, LoadFault, ShardUnavailable
from engine.residents import Resident
from tests.engine.crowd import SHARD
from tests.engine.stage import A, B, C, D, happens, settled, stage, started


async def test_what_many_want_is_loaded_once_and_told_to_all() -> None:
    async with stage(2, processes=3) as at:
        at.core.may_load.clear()
        holds = [started(process.residents.hold(A)) for process in at.crowd.processes * 2]
        ensured = [asyncio.ensure_future(at.residency.ensure(A)) for _ in range(2)]
        await settled()
        at.core.may_load.set()
        residents = await asyncio.gather(*holds)
        assert {resident.version for resident in residents} == {*await asyncio.gather(*ensured)}
        assert at.core.loads == [A]
        assert at.loads == [(SHARD, True)] and at.counts == [1]
        place = at.residency.place(A)
        assert place is not None and place.load_duration_s >= 0.0
        assert at.residency.resident() == [place.version]
        for process in at.crowd.processes:
            assert process.residents.uses()[A].holds == 2


async def test_loads_come_in_the_order_in_which_they_were_wanted() -> None:
    async with stage(4) as at:
        at.core.may_load.clear()
        holds = [started(at.process.residents.hold(key)) for key in (C, A, D, B)]
        await settled()
        assert at.core.loads == [C], "one at a time"
        at.core.may_load.set()
        await asyncio.gather(*holds)
        assert at.core.loads == [C, A, D, B]


async def test_what_a_request_waits_for_is_loaded_before_what_is_loaded_ahead() -> None:
    async with stage(4) as at:
        at.core.may_load.clear()
        first = asyncio.ensure_future(at.residency.ensure(A))
        ahead = asyncio.ensure_future(at.residency.ensure(B))
        await settled()
        holds = [started(at.process.residents.hold(key)) for key in (D, C)]
        await settled()
        at.core.may_load.set()
        await asyncio.gather(first, ahead, *holds)
        assert at.core.loads == [A, D, C, B], "A had begun"


async def test_each_phase_of_a_load_is_told() -> None:
    async with stage(1) as at:
        await at.residency.ensure(A)
        before = [LoadPhase.QUEUE, LoadPhase.PREPARE]
        whole = [*before, LoadPhase.COMMIT, LoadPhase.ALL]  # a thread has read nothing
        assert at.phases == [(phase, True) for phase in whole]
        at.phases.clear()
        at.core.refusals[B] = 1
        await at.residency.ensure(B)
        assert at.phases == [
            *((phase, True) for phase in before),
            (LoadPhase.ALL, False),
            (LoadPhase.COMMIT, True),
            (LoadPhase.ALL, True),
        ]


async def test_what_is_there_is_not_loaded_again() -> None:
    async with stage(2) as at:
        version = await at.residency.ensure(A)
        assert await at.residency.ensure(A) == version
        at.residency.want(A)  # a message that crossed ours
        await settled()
        assert at.core.loads == [A]


async def test_who_asks_while_it_was_being_loaded_is_told_again() -> None:
    async with stage(2) as at:
        await at.residency.ensure(A)
        late = at.crowd.join()
        late.residents.leave(A, lambda: None)  # as if it had not heard
        assert (await late.residents.hold(A)).version.key == A
        assert at.core.loads == [A]


async def test_the_one_that_was_idle_for_longest_goes() -> None:
    async with stage(3) as at:
        for key in (A, B, C, A):
            await at.use(key)
        await at.use(D)
        assert at.core.keys == {A, C, D}
        await at.use(B)
        assert at.core.keys == {A, B, D}
        assert max(at.counts) == 3


async def test_what_no_request_ever_used_goes_first() -> None:
    async with stage(2) as at:
        await at.use(A)
        await at.residency.ensure(B)
        await at.use(C)
        assert at.core.keys == {A, C}


async def test_what_was_used_elsewhere_counts_as_used_then() -> None:
    async with stage(3) as at:
        begin_s = time.monotonic()
        for key in (A, B):
            await at.use(key)
        await at.residency.ensure(C, begin_s - 1.0)
        await at.use(D)
        assert at.core.keys == {A, B, D}, "longer ago than both"
        await at.residency.ensure(C, time.monotonic())
        assert at.core.keys == {B, C, D}
        assert at.residency.places_left == 0 and not at.residency.wanted()
        await at.use(A)
        assert at.core.keys == {A, C, D}, "later than B"


async def test_an_idle_one_goes_before_a_busy_one_that_began_earlier() -> None:
    async with stage(2) as at:
        busy = await at.process.residents.hold(A)
        await at.use(B)
        await at.use(C)
        assert at.core.keys == {A, C}
        at.process.residents.release(busy)


async def test_a_use_in_any_process_counts() -> None:
    async with stage(2, processes=2) as at:
        await at.use(A)
        await at.use(B)
        other = at.crowd.processes[1].residents
        other.release(await other.hold(A))
        await at.use(C)
        assert at.core.keys == {A, C}


async def test_where_all_are_busy_the_one_that_began_first_drains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SURVEY_INTERVAL_S", 0.01)
    async with stage(2) as at:
        residents = at.process.residents
        first, second = await residents.hold(A), await residents.hold(B)
        waiting = started(residents.hold(C))
        await settled()
        again = started(residents.hold(A))  # which is on its way out
        await settled()
        await asyncio.sleep(0.05)  # it looks for an idle one again and again
        assert not waiting.done() and not again.done()
        assert at.core.keys == {A, B}
        assert at.residency.place(B) is not None, "one goes at a time"
        residents.release(first)
        await waiting
        assert at.core.keys == {B, C}
        assert not again.done(), "it comes after whoever waited before it"
        residents.release(second)
        assert (await again).version.key == A


async def test_another_that_becomes_idle_meanwhile_goes_instead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SURVEY_INTERVAL_S", 0.01)
    async with stage(2) as at:
        residents = at.process.residents
        first, second = await residents.hold(A), await residents.hold(B)
        waiting = started(residents.hold(C))
        await settled()
        residents.release(second)
        await waiting
        assert at.core.keys == {A, C}, "the first still drains"
        residents.release(first)
        await happens(lambda: at.core.keys == {C})


async def test_a_stream_of_requests_does_not_keep_others_out() -> None:
    async with stage(1) as at:
        served = asyncio.Event()

        async def stream() -> None:
            while not served.is_set():
                resident = await at.process.residents.hold(A)
                await asyncio.sleep(0.001)
                at.process.residents.release(resident)

        streams = [asyncio.create_task(stream()) for _ in range(4)]  # never all idle at once
        await happens(lambda: A in at.core.keys)
        await at.use(B)
        served.set()
        await asyncio.gather(*streams)


async def test_a_load_that_fails_is_tried_again_under_another_id() -> None:
    async with stage(2) as at:
        at.core.refusals[A] = 1
        before = at.stock.versions[A].lora_int_id
        version = await at.residency.ensure(A)
        assert version.lora_int_id != before
        assert at.core.loads == [A, A]
        assert at.loads == [(SHARD, False), (SHARD, True)]
        assert at.faults == [], "it was loaded"


async def test_a_load_that_fails_twice_is_told_and_remembered_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with stage(2) as at:
        at.core.refusals[A] = 2
        with pytest.raises(AdapterLoadFailed, match="the engine refuses it: shapes do not match"):
            await at.process.residents.hold(A)
        with pytest.raises(AdapterLoadFailed, match="shapes do not match"):
            await at.process.residents.hold(A)
        assert at.core.loads == [A, A], "the second request cost no load"
        assert at.faults == [LoadFault.ENGINE], "both attempts are one failure"
        assert at.residency.place(A) is None and at.core.keys == set()
        monkeypatch.setattr(module, "FAILURE_KEPT_S", -1.0)  # it is over
        assert (await at.process.residents.hold(A)).version.key == A  # the core looks at the id


async def test_the_operator_need_not_wait_for_a_failure_to_be_forgotten() -> None:
    async with stage(2) as at:
        at.core.refusals[A] = 2
        with pytest.raises(AdapterLoadFailed):
            await at.residency.ensure(A)
        assert (await at.residency.ensure(A)).key == A
        await at.residency.remove(A)
        await at.use(A)  # the failure before is no matter any more


async def test_a_failure_hurts_no_other_version() -> None:
    async with stage(2) as at:
        at.core.refusals[A] = 2
        holds = [started(at.process.residents.hold(key)) for key in (A, B)]
        bad, good = await asyncio.gather(*holds, return_exceptions=True)
        assert isinstance(bad, AdapterLoadFailed) and bad.adapter == "a"
        assert isinstance(good, Resident)


async def test_what_may_not_be_loaded_takes_no_place() -> None:
    async with stage(1) as at:
        await at.use(A)
        at.stock.refused[B] = "it is DRAINING"
        with pytest.raises(AdapterLoadFailed, match="it is DRAINING") as caught:
            await at.residency.ensure(B)
        assert caught.value.reason == "it is DRAINING"
        assert at.faults == [LoadFault.STATE]
        with pytest.raises(AdapterLoadFailed, match="it is DRAINING"):
            await at.process.residents.hold(B)
        assert at.core.keys == {A} and at.core.loads == [A]


async def test_what_nobody_expected_ends_one_load_and_tells_no_internals() -> None:
    async with stage(1) as at:
        at.stock.fails = RuntimeError("disk I/O error")
        with pytest.raises(AdapterLoadFailed, match="tell the operator") as caught:
            await at.process.residents.hold(A)
        assert "disk" not in str(caught.value)
        assert at.faults == [LoadFault.OTHER]
        at.stock.fails = None
        await at.use(B)


async def test_a_dead_shard_is_told_as_such() -> None:
    async with stage(1) as at:
        at.core.dead = True
        waiting = started(at.process.residents.hold(A))
        with pytest.raises(ShardUnavailable):
            await at.residency.ensure(A)
        with pytest.raises(AdapterLoadFailed, match="shard-0 is not available; retry"):
            await waiting
        assert at.loads == [(SHARD, False)]
        assert at.faults == [LoadFault.SHARD]


async def test_who_gives_up_waiting_leaves_nothing_held() -> None:
    async with stage(1) as at:
        at.core.may_load.clear()
        waiting = [started(at.process.residents.hold(A)) for _ in range(3)]
        ensured = asyncio.ensure_future(at.residency.ensure(A))
        await settled()
        ensured.cancel()
        for future in waiting:
            future.cancel()
        at.core.may_load.set()
        await happens(lambda: A in at.core.keys)
        assert at.process.residents.uses()[A].holds == 0
        await at.use(B)
        assert at.core.keys == {B}


async def test_room_that_a_removal_made_meanwhile_is_taken() -> None:
    async with stage(1) as at:
        await at.use(A)
        at.crowd.may_answer.clear()
        waiting = started(at.process.residents.hold(B))
        await settled()
        await at.residency.remove(A)  # before anybody said how it was used
        at.crowd.may_answer.set()
        assert (await waiting).version.key == B


async def test_at_the_end_nobody_waits_any_more() -> None:
    async with stage(1) as at:
        at.core.may_load.clear()
        ensured = [asyncio.ensure_future(at.residency.ensure(key)) for key in (A, B)]
        await settled()
        at.runs.cancel()
        await asyncio.wait(ensured)
        assert all(future.cancelled() for future in ensured)
        with pytest.raises(ShardUnavailable):
            await at.residency.ensure(C)


async def test_an_engine_that_is_gone_has_nothing_to_load_or_to_remove() -> None:
    async with stage(2) as at:
        await at.use(A)
        at.core.may_load.clear()
        holding = await at.process.residents.hold(A)
        removing = asyncio.create_task(at.residency.remove(A))
        loading = asyncio.ensure_future(at.residency.ensure(B))
        await settled()
        at.residency.lose()
        await asyncio.wait_for(removing, 1)
        with pytest.raises(ShardUnavailable):
            await asyncio.wait_for(loading, 1)
        assert at.residency.resident() == [] and at.residency.place(A) is None
        with pytest.raises(ShardUnavailable):
            await at.residency.ensure(A)
        at.process.residents.release(holding)
        at.core.may_load.set()
