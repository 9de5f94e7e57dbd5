"""A request whose shard dies before a token is tried on the next one, once and within a budget."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import pytest
from prometheus_client import REGISTRY

from engine.errors import CrashPart, ShardUnavailable
from engine.fake import FakeShard, Script
from engine.generation import GenerationRequest, ServedVersion, VersionKey
from engine.pool import ServedView, ShardPool
from engine.residents import Residents
from engine.ring import AdapterKey, NoShardOpen
from engine.slot_holds import SlotHolds
from gateway.admission import Admission
from gateway.call import Call
from gateway.dispatch import Dispatch
from gateway.retry_budget import LEAST, RetryBudget
from tests.engine.open_slots import open_slots

NAMES = ("shard-0", "shard-1", "shard-2")
KEY = VersionKey("acme", "alpha", 1)
LOADED = ServedVersion(*KEY, 1, "/alpha", "digest")
DEAD = Script(dies_after_tokens=0)


async def nothing_in_core(lora_int_id: int) -> int:
    return 0


class Stage:
    """A dispatch over three shards which have the adapter, in its order, scripted."""

    def __init__(self, *scripts: Script, ask: Callable[[VersionKey], None] | None = None) -> None:
        self.admission = Admission(100)
        self.residents = {name: Residents(ask or (lambda key: None), nothing_in_core, open_slots())
                          for name in NAMES}  # fmt: skip
        self.pool = ShardPool(
            [FakeShard(name) for name in NAMES], self.residents, ServedView(), NAMES
        )
        self.order = self.pool.ring.ranked(AdapterKey(KEY.tenant, KEY.adapter))
        self.shards = {}
        for name, script in zip(self.order, scripts, strict=False):
            self.shards[name] = FakeShard(name, script)
            self.pool.join(self.shards[name], self.residents[name])
        if ask is None:
            for residents in self.residents.values():
                residents.loaded(LOADED)
        self.dispatch = Dispatch(self.pool, self.admission)

    async def run(self, call: Call | None = None, tokens: int = 5) -> tuple[Call, int]:
        """One streamed request; the call, and how many tokens came."""
        call = call or Call("GenerateStream", task=None)
        request = GenerationRequest("r", "one two", {"max_tokens": tokens}, stream=True)
        count = 0
        async with contextlib.aclosing(self.dispatch.outputs(request, KEY, call)) as outputs:
            async for output in outputs:
                call.first_token_s = 1.0
                count += sum(len(delta.token_ids) for delta in output.deltas)
        return call, count


async def test_a_request_is_answered_by_the_shard_of_its_adapter() -> None:
    stage = Stage(Script(), Script(), Script())
    call, tokens = await stage.run()
    assert (call.shard, tokens) == (stage.order[0], 5)


async def test_without_a_token_it_is_tried_once_more_on_the_next_shard() -> None:
    stage = Stage(DEAD, Script(), Script())
    call, tokens = await stage.run()
    assert (call.shard, tokens) == (stage.order[1], 5)
    assert set(stage.pool.route_to(None).in_flight.values()) == {0}


async def test_with_a_token_the_caller_is_told() -> None:
    stage = Stage(Script(dies_after_tokens=2), Script(), Script())
    with pytest.raises(ShardUnavailable, match=stage.order[0]):
        await stage.run()
    assert not stage.shards[stage.order[1]].aborted


async def test_the_second_death_is_told() -> None:
    stage = Stage(DEAD, DEAD, Script())
    with pytest.raises(ShardUnavailable, match=stage.order[1]):
        await stage.run()


async def test_without_another_shard_the_death_is_told_and_later_that_none_is_open() -> None:
    stage = Stage(DEAD, Script(), Script())
    for name in stage.order[1:]:
        stage.pool.leave(name)
    with pytest.raises(ShardUnavailable, match=f"{stage.order[0]} is not available"):
        await stage.run()
    stage.pool.leave(stage.order[0])
    with pytest.raises(NoShardOpen, match="no shard takes requests now; retry"):
        await stage.run()


async def test_one_that_waits_for_its_version_is_tried_elsewhere_too() -> None:
    asked: list[VersionKey] = []
    stage = Stage(Script(), Script(), Script(), ask=asked.append)
    stage.residents[stage.order[1]].loaded(LOADED)
    running = asyncio.create_task(stage.run())
    while not asked:
        await asyncio.sleep(0)
    stage.pool.leave(stage.order[0])
    stage.residents[stage.order[0]].lose(stage.order[0])
    call, tokens = await running
    assert (call.shard, tokens) == (stage.order[1], 5)


async def test_one_that_waits_for_its_turn_is_tried_elsewhere_too() -> None:
    stage = Stage(Script(), Script(), Script())
    waits = asyncio.Event()
    slots = SlotHolds(lambda key, waiting: waits.set(), nothing_in_core)
    home = Residents(lambda key: None, nothing_in_core, slots)
    home.loaded(LOADED)
    stage.pool.join(stage.shards[stage.order[0]], home)
    running = asyncio.create_task(stage.run())
    await waits.wait()
    stage.pool.leave(stage.order[0])
    home.lose(stage.order[0])
    call, tokens = await running
    assert (call.shard, tokens) == (stage.order[1], 5)
    assert set(stage.pool.route_to(None).in_flight.values()) == {0}


async def test_no_more_are_tried_again_at_once_than_the_budget_allows() -> None:
    stage = Stage(DEAD, Script(token_interval_s=0.05), Script())
    runs = await asyncio.gather(*(stage.run() for _ in range(LEAST + 1)), return_exceptions=True)
    failed = [run for run in runs if isinstance(run, ShardUnavailable)]
    assert len(failed) == 1 and len(runs) - len(failed) == LEAST
    call, _ = await stage.run()
    assert call.shard == stage.order[1], "they have ended, and there is room again"


async def test_what_crashed_an_engine_alone_is_not_sent_to_another() -> None:
    stage = Stage(Script(dies_after_tokens=0, crash_part=CrashPart.ALONE), Script(), Script())
    with pytest.raises(ShardUnavailable, match=stage.order[0]):
        await stage.run()
    assert not stage.shards[stage.order[1]].aborted


async def test_of_those_that_crashed_an_engine_together_one_is_tried_at_a_time() -> None:
    crash = Script(dies_after_tokens=0, crash_part=CrashPart.SUSPECT)
    stage = Stage(crash, Script(token_interval_s=0.05), Script())
    runs = await asyncio.gather(*(stage.run() for _ in range(3)), return_exceptions=True)
    failed = [run for run in runs if isinstance(run, ShardUnavailable)]
    assert len(failed) == 2
    call, _ = await stage.run()
    assert call.shard == stage.order[1], "it has ended, and the next may go"


def test_a_suspect_takes_its_place_in_the_budget_beside_others() -> None:
    budget = RetryBudget(Admission(100))
    with budget.retry(True):
        assert not budget.has_room(True) and budget.has_room()
        with budget.retry(), budget.retry():
            assert not budget.has_room()
    with budget.retry(), budget.retry():
        assert budget.has_room(True)
        with budget.retry():
            assert not budget.has_room(True)


@pytest.mark.parametrize(("active", "room"), [(0, 3), (20, 3), (30, 3), (31, 4), (100, 10)])
def test_the_budget_is_a_tenth_of_what_is_active_and_three_at_least(active: int, room: int) -> None:
    admission = Admission(1000)
    budget = RetryBudget(admission)
    with contextlib.ExitStack() as running:
        for _ in range(active):
            running.enter_context(admission.slot())
        taken = 0
        while budget.has_room():
            running.enter_context(budget.retry())
            taken += 1
        assert taken == room
        assert REGISTRY.get_sample_value("gateway_retry_budget_used") == pytest.approx(
            room / max(LEAST, active / 10)
        )
    assert budget.has_room()
    assert REGISTRY.get_sample_value("gateway_retry_budget_used") == 0.0
