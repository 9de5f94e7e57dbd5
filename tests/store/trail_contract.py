"""What every registry tells: lists page by page, the trail of changes, scores; after a restart."""

from __future__ import annotations

import asyncio
import math
import statistics
from collections.abc import Awaitable, Callable

import pytest

from store.records import Arm, EventKind, EventRecord, FeedbackSummary, VersionState
from store.registry import Registry
from tests.store.registry_steps import ACTOR, MakeRegistry, Ticks, begin, bring_to, content, ready

LISTS: dict[str, Callable[[Registry], Awaitable[object]]] = {
    "adapters": lambda r: r.adapters("acme", limit=0),
    "versions": lambda r: r.versions("acme", "sql", limit=-1),
    "events": lambda r: r.events("acme", after=0, limit=-1),
}
SCORES = {
    "none at all": [],
    "one": [0.5],
    "equal": [0.1] * 9,
    "thumbs": [0.0, 1.0, 1.0, 0.0, 1.0],
    "far from 0": [1e9 + 1, 1e9 + 2, 1e9 + 3],
    "tiny": [1e-310, 3e-310],
    "zeros": [0.0, 0.0],
    "huge": [1e308, -1e308, 1.7e308, 5e307],
}


async def names(registry: Registry, **page: str) -> list[str]:
    return [record.adapter for record in await registry.adapters("acme", limit=3, **page)]


class TrailContract:
    """Tests of lists, events and feedback."""

    async def test_adapters_come_by_name_page_by_page(self, make_registry: MakeRegistry) -> None:
        async with make_registry() as registry:
            for name in ("b.1", "a", "b-1", "b", "b_1", "bz", "c", "b1", "ab"):
                await begin(registry, name)
            await begin(registry, "bb", tenant="other")
            assert await names(registry) == ["a", "ab", "b"]
            assert await names(registry, after="b") == ["b-1", "b.1", "b1"]
            assert await names(registry, after="b1") == ["b_1", "bz", "c"]
            assert await names(registry, after="c") == []
            assert await names(registry, prefix="b") == ["b", "b-1", "b.1"]
            assert await names(registry, prefix="b", after="b_1") == ["bz"]
            assert await names(registry, prefix="b", after="a") == ["b", "b-1", "b.1"]
            assert await names(registry, prefix="b", after="c") == []
            assert await names(registry, prefix="b.") == ["b.1"]
            for pattern in ("%", "*", "[b]", "B", "bé"):
                assert await names(registry, prefix=pattern) == []

    async def test_versions_come_newest_first_page_by_page(
        self, make_registry: MakeRegistry
    ) -> None:
        async with make_registry() as registry:
            for state in (VersionState.READY, VersionState.DELETED, VersionState.FAILED):
                await bring_to(registry, state)
            await begin(registry)
            await begin(registry, "chat")

            async def page(
                limit: int, below: int | None = None, deleted: bool = False
            ) -> list[int]:
                records = await registry.versions(
                    "acme", "sql", below=below, limit=limit, deleted=deleted
                )
                return [record.version for record in records]

            assert await page(2) == [4, 3]
            assert await page(2, below=3) == [1]
            assert await page(9, below=3, deleted=True) == [2, 1]
            assert await page(1, below=1) == []

    @pytest.mark.parametrize("name", LISTS)
    async def test_a_page_of_nothing_is_refused(
        self, make_registry: MakeRegistry, name: str
    ) -> None:
        async with make_registry() as registry:
            await begin(registry)
            with pytest.raises(ValueError, match="limit must be at least 1"):
                await LISTS[name](registry)

    async def test_versions_of_all_tenants_are_found_by_state(
        self, make_registry: MakeRegistry
    ) -> None:
        async with make_registry() as registry:
            assert await registry.versions_in(VersionState.VALIDATING) == []
            for tenant, adapter in (("other", "sql"), ("acme", "sql"), ("acme", "chat")):
                await begin(registry, adapter, tenant=tenant)
            await ready(registry)
            begun = await registry.versions_in(VersionState.VALIDATING)
        assert [(record.tenant, record.adapter, record.version) for record in begun] == [
            ("acme", "chat", 1),
            ("acme", "sql", 1),
            ("other", "sql", 1),
        ]

    async def test_a_snapshot_has_all_adapters_with_their_ready_versions(
        self, make_registry: MakeRegistry
    ) -> None:
        async with make_registry() as registry:
            await bring_to(registry, VersionState.DELETED)
            await ready(registry)
            await ready(registry)
            await begin(registry, "chat")
            await ready(registry, tenant="other")
            snapshot = await registry.snapshot()
            expected = [
                (await registry.adapter("acme", "chat"), ()),
                (await registry.adapter("acme", "sql"), (2, 3)),
                (await registry.adapter("other", "sql"), (1,)),
            ]
        assert snapshot == expected

    async def test_the_trail_tells_a_life_from_its_begin_to_its_end(
        self, make_registry: MakeRegistry
    ) -> None:
        clock = Ticks(1_700_000_000_000_000_000)
        async with make_registry(clock_ns=clock) as registry:
            record = await ready(registry)
            await registry.set_traffic("acme", "sql", [], actor="bob")
            await registry.drain_version("acme", "sql", 1, actor="bob")
            await registry.drain_version("acme", "sql", 1, actor="bob")
            gone = await registry.delete_version("acme", "sql", 1, actor="gateway")
            events = await registry.events("acme", after=0, limit=9)
            assert await registry.last_sequence() == 6
        told = [(event.kind, event.version, event.actor) for event in events]
        assert told == [
            (EventKind.VERSION_CREATED, 1, ACTOR),
            (EventKind.VERSION_READY, 1, ACTOR),
            (EventKind.TRAFFIC_SET, 0, ACTOR),
            (EventKind.TRAFFIC_SET, 0, "bob"),
            (EventKind.VERSION_DRAINING, 1, "bob"),
            (EventKind.VERSION_DELETED, 1, "gateway"),
        ]
        assert [event.sequence for event in events] == [1, 2, 3, 4, 5, 6]
        times_ns = [event.time_ns for event in events]
        assert times_ns == sorted(times_ns)
        assert (times_ns[0], times_ns[1]) == (record.create_time_ns, record.update_time_ns)
        assert events[-1] == EventRecord(
            sequence=6,
            time_ns=gone.update_time_ns,
            kind=EventKind.VERSION_DELETED,
            tenant="acme",
            adapter="sql",
            version=1,
            actor="gateway",
        )

    async def test_the_trail_is_read_from_anywhere_for_a_tenant_or_an_adapter(
        self, make_registry: MakeRegistry
    ) -> None:
        async with make_registry() as registry:
            assert await registry.last_sequence() == 0
            for tenant, adapter in (("acme", "sql"), ("other", "sql"), ("acme", "chat")) * 2:
                await begin(registry, adapter, tenant=tenant)

            async def page(after: int, limit: int, adapter: str = "") -> list[int]:
                events = await registry.events("acme", after=after, limit=limit, adapter=adapter)
                return [event.sequence for event in events]

            assert await page(0, 9) == [1, 3, 4, 6]
            assert await page(1, 2) == [3, 4]
            assert await page(0, 9, "chat") == [3, 6]
            assert await page(3, 9, "chat") == [6]
            assert await page(6, 9) == await page(0, 9, "none") == await page(2**64 - 1, 9) == []
            assert await registry.last_sequence() == 6

    async def test_the_trail_has_no_gap_where_changes_were_refused(
        self, make_registry: MakeRegistry
    ) -> None:
        async with make_registry() as registry:
            await ready(registry)
            calls: list[Awaitable[object]] = []
            for n in range(10):
                calls += [
                    ready(registry, f"a{n}"),
                    registry.set_traffic("acme", "sql", [Arm(1, 1)], etag="t1", actor=ACTOR),
                    registry.complete_version("acme", "sql", 1, content(), actor=ACTOR),
                ]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            events = await registry.events("acme", after=0, limit=99)
        assert sum(isinstance(outcome, Exception) for outcome in outcomes) == 19
        assert [event.sequence for event in events] == list(range(1, 3 + 30 + 1 + 1))

    @pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
    async def test_scores_are_summed_up(
        self, make_registry: MakeRegistry, scores: list[float]
    ) -> None:
        async with make_registry() as registry:
            await begin(registry)
            for n, score in enumerate(scores):
                await registry.record_feedback("acme", "sql", 1, f"r{n}", score)
            found = await registry.feedback("acme", "sql")
        if not scores:
            assert found == {}
            return
        assert found.keys() == {1}
        assert found[1].count == len(scores)
        assert found[1].mean == pytest.approx(statistics.mean(scores), rel=1e-12, abs=0)
        deviation = statistics.stdev(scores) if len(scores) > 1 else 0.0
        assert found[1].standard_deviation == pytest.approx(deviation, rel=1e-6, abs=1e-12)

    async def test_a_second_score_replaces_the_first_even_of_another_version(
        self, make_registry: MakeRegistry
    ) -> None:
        async with make_registry() as registry:
            for adapter, tenant in (("sql", "acme"), ("sql", "acme"), ("sql", "other")):
                await begin(registry, adapter, tenant=tenant)
            await registry.record_feedback("acme", "sql", 1, "r", 1.0)
            await registry.record_feedback("other", "sql", 1, "r", 5.0)
            await registry.record_feedback("acme", "sql", 1, "s", 3.0)
            await registry.record_feedback("acme", "sql", 1, "s", 4.0)
            await registry.record_feedback("acme", "sql", 2, "r", 2.0)
            assert await registry.feedback("acme", "sql") == {
                1: FeedbackSummary(1, 4.0, 0.0),
                2: FeedbackSummary(1, 2.0, 0.0),
            }
            assert await registry.feedback("acme", "chat") == {}

    @pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
    async def test_a_score_that_is_no_number_is_refused(
        self, make_registry: MakeRegistry, score: float
    ) -> None:
        async with make_registry() as registry:
            await begin(registry)
            with pytest.raises(ValueError, match="not a score"):
                await registry.record_feedback("acme", "sql", 1, "r", score)
            assert await registry.feedback("acme", "sql") == {}

    async def test_everything_is_as_it_was_after_a_restart(
        self, make_registry: MakeRegistry
    ) -> None:
        async def everything(registry: Registry) -> list[object]:
            return [
                await registry.snapshot(),
                *[await registry.versions_in(state) for state in VersionState],
                await registry.events("acme", after=0, limit=99),
                await registry.feedback("acme", "sql"),
            ]

        async with make_registry() as registry:
            for state in VersionState:
                await bring_to(registry, state)
            last = await ready(registry)
            await registry.record_feedback("acme", "sql", last.version, "r", 1.0)
            before = await everything(registry)
        async with make_registry() as registry:
            assert await everything(registry) == before
            assert (await begin(registry)).lora_int_id == last.lora_int_id + 1
