"""What every registry does with splits: set, promoted, rolled back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from store.records import (
    AdapterRecord,
    Arm,
    EtagMismatch,
    EventKind,
    Guard,
    NothingToRollBack,
    VersionNotReady,
    VersionState,
)
from store.registry import Registry
from tests.store.registry_steps import (
    ACTOR,
    MakeRegistry,
    begin,
    bring_to,
    content,
    ready,
)
from tests.store.split_machine import SplitMachine

SQL = ("acme", "sql")
GUARD = Guard(2, min_requests=20, max_error_ratio=0.1, max_total_p95_ms=1500.0)
MOVES: dict[str, Callable[[Registry, str], Awaitable[AdapterRecord]]] = {
    "set_traffic": lambda r, etag: r.set_traffic(*SQL, [Arm(1, 1)], etag=etag, actor=ACTOR),
    "promote": lambda r, etag: r.promote(*SQL, 1, etag=etag, actor=ACTOR),
    "roll_back": lambda r, etag: r.roll_back(*SQL, etag=etag, actor=ACTOR),
}


class TrafficContract:
    """Tests of splits."""

    async def test_the_first_ready_version_takes_all_traffic(
        self, make_registry: MakeRegistry
    ) -> None:
        async with make_registry() as registry:
            await begin(registry)
            await begin(registry)
            _, adapter = await registry.complete_version(*SQL, 2, content(), actor=ACTOR)
            assert adapter.arms == (Arm(2, 100),)
            assert (adapter.traffic_revision, adapter.etag) == (1, "t1")
            assert adapter.traffic_time_ns > adapter.create_time_ns
            assert await registry.adapter(*SQL) == adapter
            _, later = await registry.complete_version(*SQL, 1, content(), actor=ACTOR)
            assert later == adapter

    async def test_a_version_without_take_traffic_leaves_it_to_the_next(
        self, make_registry: MakeRegistry
    ) -> None:
        async with make_registry() as registry:
            await ready(registry, take_traffic=False)
            assert (await registry.adapter(*SQL)).arms == ()
            await ready(registry)
            assert (await registry.adapter(*SQL)).arms == (Arm(2, 100),)

    async def test_a_split_that_was_emptied_stays_empty(self, make_registry: MakeRegistry) -> None:
        async with make_registry() as registry:
            await begin(registry)
            await registry.set_traffic(*SQL, [], actor=ACTOR)
            _, adapter = await registry.complete_version(*SQL, 1, content(), actor=ACTOR)
        assert (adapter.arms, adapter.traffic_revision) == ((), 1)

    async def test_a_split_is_kept_by_version_with_its_guard(
        self, make_registry: MakeRegistry
    ) -> None:
        async with make_registry() as registry:
            await ready(registry)
            await ready(registry)
            arms = [Arm(2, 10), Arm(1, 1_000_000)]
            adapter = await registry.set_traffic(*SQL, arms, guard=GUARD, actor=ACTOR)
            assert adapter.arms == (Arm(1, 1_000_000), Arm(2, 10))
            assert adapter.guard == GUARD
            assert await registry.adapter(*SQL) == adapter
            assert (await registry.promote(*SQL, 1, actor=ACTOR)).guard is None
            restored = await registry.roll_back(*SQL, actor=ACTOR)
            assert (restored.arms, restored.guard) == (adapter.arms, None)

    async def test_every_change_is_a_new_revision_even_an_equal_one(
        self, make_registry: MakeRegistry
    ) -> None:
        async with make_registry() as registry:
            await ready(registry)
            etags = [(await MOVES[move](registry, "")).etag for move in MOVES]
        assert etags == ["t2", "t3", "t4"]

    @pytest.mark.parametrize("move", MOVES)
    async def test_an_etag_lets_one_of_two_pass(
        self, make_registry: MakeRegistry, move: str
    ) -> None:
        async with make_registry() as registry:
            await ready(registry)
            await registry.promote(*SQL, 1, actor=ACTOR)
            outcomes = await asyncio.gather(
                *(MOVES[move](registry, "t2") for _ in range(2)), return_exceptions=True
            )
            assert {type(outcome) for outcome in outcomes} == {AdapterRecord, EtagMismatch}
            with pytest.raises(EtagMismatch, match="is at 't3' now") as caught:
                await MOVES[move](registry, "t2")
            assert caught.value.etag == "t3"
            assert (await registry.adapter(*SQL)).etag == "t3"

    @pytest.mark.parametrize(
        "state", [state for state in VersionState if state is not VersionState.READY], ids=str
    )
    async def test_only_ready_versions_get_traffic(
        self, make_registry: MakeRegistry, state: VersionState
    ) -> None:
        async with make_registry() as registry:
            await bring_to(registry, state)
            await ready(registry)
            before = await registry.adapter(*SQL)
            for move in ("set_traffic", "promote"):
                with pytest.raises(VersionNotReady, match=f"is {state.name}, and must be READY"):
                    await MOVES[move](registry, "")
            with pytest.raises(VersionNotReady):
                await registry.set_traffic(*SQL, [Arm(2, 1), Arm(1, 1)], actor=ACTOR)
            assert await registry.adapter(*SQL) == before

    @pytest.mark.parametrize(
        ("arms", "guard", "message"),
        [
            ([Arm(1, 1), Arm(2, 1), Arm(1, 2)], None, "a version comes twice"),
            ([Arm(1, 1), Arm(2, 0)], None, "a weight is below 1"),
            ([Arm(1, 1)], GUARD, "guard of version 2, which is no arm"),
        ],
    )
    async def test_a_split_that_makes_no_sense_is_refused(
        self, make_registry: MakeRegistry, arms: list[Arm], guard: Guard | None, message: str
    ) -> None:
        async with make_registry() as registry:
            await ready(registry)
            await ready(registry)
            with pytest.raises(ValueError, match=message):
                await registry.set_traffic(*SQL, arms, guard=guard, actor=ACTOR)
            assert (await registry.adapter(*SQL)).traffic_revision == 1

    async def test_roll_backs_go_one_further_each_time(self, make_registry: MakeRegistry) -> None:
        async with make_registry() as registry:
            for _ in range(3):
                await ready(registry)
            await registry.promote(*SQL, 2, actor=ACTOR)
            half = await registry.set_traffic(*SQL, [Arm(2, 1), Arm(3, 1)], actor=ACTOR)
            await registry.promote(*SQL, 3, actor=ACTOR)
            back = [(await registry.roll_back(*SQL, actor=ACTOR)).arms for _ in range(3)]
            assert back == [half.arms, (Arm(2, 100),), (Arm(1, 100),)]
            with pytest.raises(NothingToRollBack, match="there is no earlier split"):
                await registry.roll_back(*SQL, actor=ACTOR)
            await registry.promote(*SQL, 3, actor=ACTOR)
            assert (await registry.roll_back(*SQL, actor=ACTOR)).arms == (Arm(1, 100),)

    async def test_a_split_that_was_never_set_is_not_rolled_back(
        self, make_registry: MakeRegistry
    ) -> None:
        async with make_registry() as registry:
            await begin(registry)
            with pytest.raises(NothingToRollBack, match="its split was never set"):
                await registry.roll_back(*SQL, actor=ACTOR)

    async def test_a_split_with_a_version_that_is_gone_does_not_come_back(
        self, make_registry: MakeRegistry
    ) -> None:
        async with make_registry() as registry:
            await ready(registry)
            await ready(registry)
            after = await registry.promote(*SQL, 2, actor=ACTOR)
            await registry.drain_version(*SQL, 1, actor=ACTOR)
            message = "cannot be rolled back: version 1 of adapter 'sql' is DRAINING"
            with pytest.raises(NothingToRollBack, match=message):
                await registry.roll_back(*SQL, actor=ACTOR)
            assert await registry.adapter(*SQL) == after

    async def test_changes_of_the_split_are_told_with_the_split(
        self, make_registry: MakeRegistry
    ) -> None:
        async with make_registry() as registry:
            await ready(registry)
            await registry.set_traffic(*SQL, [Arm(1, 7)], actor="bob", reason="half day")
            await registry.promote(*SQL, 1, actor="carol")
            await registry.roll_back(*SQL, actor="guard", reason="errors 30 % > 10 %")
            events = await registry.events("acme", after=2, limit=9)
            last = (await registry.adapter(*SQL)).traffic_time_ns
        told = [(event.kind, event.actor, event.reason, event.arms) for event in events]
        assert told == [
            (EventKind.TRAFFIC_SET, ACTOR, "first READY version", (Arm(1, 100),)),
            (EventKind.TRAFFIC_SET, "bob", "half day", (Arm(1, 7),)),
            (EventKind.VERSION_PROMOTED, "carol", "", (Arm(1, 100),)),
            (EventKind.ADAPTER_ROLLED_BACK, "guard", "errors 30 % > 10 %", (Arm(1, 7),)),
        ]
        assert {event.version for event in events} == {0}
        assert events[-1].time_ns == last

    def test_any_course_of_splits_goes_as_a_stack_of_them_would(
        self, make_registry: MakeRegistry
    ) -> None:
        class Machine(SplitMachine):
            def __init__(self) -> None:
                super().__init__(make_registry)

        course = settings(
            max_examples=25,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],  # each example makes a database
        )
        run_state_machine_as_test(Machine, settings=course)
