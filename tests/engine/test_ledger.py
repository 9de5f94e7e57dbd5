"""Changes are seen in the order of their transactions, by processes and by watchers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest

from engine import ledger as module
from engine.generation import VersionKey
from engine.ledger import Ledger
from engine.pool import ServedAdapter
from store.records import (
    Arm,
    Content,
    EventKind,
    EventRecord,
    Guard,
    NewVersion,
    RequestIdReused,
    TransitionRefused,
    VersionInUse,
    VersionNotReady,
    VersionState,
)
from store.sqlite_registry import SqliteRegistry

T = TypeVar("T")

TENANT = "acme"
ME = "somebody"
NEW = NewVersion(TENANT, "sql", "/sql")
SOON_S = 30.0
ONE, TWO = (Arm(1, 100),), (Arm(2, 100),)
"""All traffic to one version."""
NEVER_S = 60.0
"""A heartbeat that no test waits for."""


def key(version: int, adapter: str = "sql") -> VersionKey:
    return VersionKey(TENANT, adapter, version)


def content(number: int = 0) -> Content:
    return Content(f"{number:064x}", "0" * 64, 100, 8, ("q_proj",))


class ScriptedAudience:
    """Writes down what it is shown, and follows when it may."""

    def __init__(self) -> None:
        self.shown: list[tuple[str, str, ServedAdapter]] = []
        self.may_follow = asyncio.Event()
        self.may_follow.set()

    def show(self, tenant: str, adapter: str, served: ServedAdapter) -> Awaitable[None]:
        self.shown.append((tenant, adapter, served))
        return self._follow()

    async def _follow(self) -> None:
        await self.may_follow.wait()

    @property
    def arms(self) -> list[tuple[Arm, ...]]:
        return [served.split.arms for _, _, served in self.shown]

    @property
    def ready(self) -> list[tuple[int, ...]]:
        return [served.ready for _, _, served in self.shown]


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[SqliteRegistry]:
    async with SqliteRegistry(tmp_path / "registry.sqlite") as registry:
        yield registry


@pytest.fixture
def audience() -> ScriptedAudience:
    return ScriptedAudience()


@pytest.fixture
async def ledger(registry: SqliteRegistry, audience: ScriptedAudience) -> AsyncIterator[Ledger]:
    ledger = Ledger(registry, audience)
    await ledger.open()
    yield ledger
    audience.may_follow.set()
    async with asyncio.timeout(SOON_S):
        await ledger.close()


async def make_ready(ledger: Ledger, count: int = 1, new: NewVersion = NEW) -> None:
    for number in range(count):
        record = await ledger.begin(new, request_id="", actor=ME)
        made = VersionKey(new.tenant, new.adapter, record.version)
        await ledger.complete(made, content(number), actor=ME)


async def set_traffic(ledger: Ledger, *arms: Arm, guard: Guard | None = None) -> None:
    await ledger.set_traffic(TENANT, "sql", arms, guard=guard, etag="", actor=ME)


async def test_the_life_of_a_version_is_shown_as_it_goes(
    ledger: Ledger, audience: ScriptedAudience
) -> None:
    await make_ready(ledger, 2)
    assert audience.ready == [(), (1,), (1,), (1, 2)]
    assert audience.arms == [(), ONE, ONE, ONE]
    with pytest.raises(VersionInUse):
        await ledger.drain(key(1), actor=ME)
    await ledger.promote(key(2), etag="", actor=ME)
    record = await ledger.drain(key(1), actor=ME)
    assert record.state is VersionState.DRAINING
    assert audience.ready[-1] == (2,) and audience.arms[-1] == TWO
    shown = len(audience.shown)
    assert (await ledger.delete(key(1), actor=ME)).state is VersionState.DELETED
    assert len(audience.shown) == shown, "nobody could ask for it any more"
    assert ledger.view.tenants[TENANT]["sql"] is audience.shown[-1][2]


async def test_a_version_that_fails_is_never_shown_as_ready(
    ledger: Ledger, audience: ScriptedAudience
) -> None:
    await ledger.begin(NEW, request_id="", actor=ME)
    record = await ledger.fail(key(1), ["it is broken"], actor=ME)
    assert record.findings == ("it is broken",)
    assert audience.ready == [()] and audience.arms == [()]


async def test_findings_are_kept_as_far_as_they_can_be_carried(ledger: Ledger) -> None:
    await ledger.begin(NEW, request_id="", actor=ME)
    many = [f"{number} " + "x" * 5000 for number in range(500)]
    record = await ledger.fail(key(1), many, actor=ME)
    assert len(record.findings) == module.MAX_FINDINGS
    assert record.findings[1] == many[1][: module.MAX_FINDING_CHARACTERS]


async def test_the_same_request_again_finds_its_version(ledger: Ledger) -> None:
    first = await ledger.begin(NEW, request_id="r1", actor=ME)
    assert await ledger.begin(NEW, request_id="r1", actor=ME) == first
    with pytest.raises(RequestIdReused):
        await ledger.begin(replace(NEW, source_uri="/other"), request_id="r1", actor=ME)


async def test_open_reads_what_was_registered(
    ledger: Ledger, registry: SqliteRegistry, audience: ScriptedAudience
) -> None:
    await make_ready(ledger, 3)
    guard = Guard(2, min_requests=5, max_error_ratio=0.1)
    await set_traffic(ledger, Arm(1, 9), Arm(2, 1), guard=guard)
    await make_ready(ledger, 1, NewVersion("other", "chat", "/chat"))
    again = Ledger(registry, ScriptedAudience())
    await again.open()
    served = again.view.tenants[TENANT]["sql"]
    assert served.ready == (1, 2, 3) and served.split.arms == (Arm(1, 9), Arm(2, 1))
    assert again.view.tenants["other"]["chat"].ready == (1,)
    assert again.guarded == ledger.guarded
    assert [record.guard for record in again.guarded.values()] == [guard]


async def test_only_what_a_guard_watches_is_guarded(ledger: Ledger) -> None:
    await make_ready(ledger, 2)
    await set_traffic(ledger, Arm(1, 1), Arm(2, 1), guard=Guard(2, min_requests=5))
    assert set(ledger.guarded) == {(TENANT, "sql")}
    await ledger.roll_back(TENANT, "sql", etag="", actor=ME, reason="too slow")
    assert not ledger.guarded
    assert ledger.view.tenants[TENANT]["sql"].split.arms == ONE


async def test_a_change_returns_when_all_follow_and_holds_up_no_other(
    ledger: Ledger, audience: ScriptedAudience, registry: SqliteRegistry
) -> None:
    await make_ready(ledger, 2)
    audience.may_follow.clear()
    first = asyncio.create_task(ledger.promote(key(2), etag="", actor=ME))
    second = asyncio.create_task(ledger.promote(key(1), etag="", actor=ME))
    while len(audience.shown) < 6:
        await asyncio.sleep(0.001)
    assert (await registry.adapter(TENANT, "sql")).arms == ONE
    assert not first.done() and not second.done()
    audience.may_follow.set()
    await asyncio.gather(first, second)


async def test_what_is_refused_is_not_shown_and_blocks_nothing(
    ledger: Ledger, audience: ScriptedAudience
) -> None:
    await make_ready(ledger)
    shown, view = len(audience.shown), ledger.view.tenants[TENANT]["sql"]
    with pytest.raises(VersionNotReady):
        await ledger.begin(NEW, request_id="", actor=ME)
        await set_traffic(ledger, Arm(2, 1))
    with pytest.raises(TransitionRefused):
        await ledger.drain(key(2), actor=ME)
    assert len(audience.shown) == shown + 1, "the new version alone"
    assert ledger.view.tenants[TENANT]["sql"].ready == view.ready
    await ledger.complete(key(2), content(2), actor=ME)


async def test_a_cancelled_caller_does_not_stop_a_change(
    ledger: Ledger, audience: ScriptedAudience, registry: SqliteRegistry
) -> None:
    await make_ready(ledger, 2)
    change = asyncio.create_task(ledger.promote(key(2), etag="", actor=ME))
    await asyncio.sleep(0)  # it has begun
    change.cancel()
    await asyncio.gather(change, return_exceptions=True)
    assert change.cancelled()
    await ledger.close()
    assert (await registry.adapter(TENANT, "sql")).arms == TWO
    assert audience.arms[-1] == TWO


async def test_close_waits_for_what_was_begun(ledger: Ledger, audience: ScriptedAudience) -> None:
    await make_ready(ledger)
    audience.may_follow.clear()
    change = asyncio.create_task(ledger.begin(NEW, request_id="", actor=ME))
    while len(audience.shown) < 3:
        await asyncio.sleep(0.001)
    closing = asyncio.create_task(ledger.close())
    await asyncio.sleep(0)
    assert not closing.done()
    audience.may_follow.set()
    await closing
    assert (await change).version == 2


async def write(ledger: Ledger, seed: int) -> None:
    """Change the split, some times."""
    randomly = random.Random(seed)
    for _ in range(8):
        weight = randomly.randint(1, 1000)
        await set_traffic(ledger, Arm(1, weight), Arm(2, 1001 - weight))


class TardyRegistry(SqliteRegistry):
    """Its answers take a while, each another one, as those of a database elsewhere would."""

    async def _call(self, function: Callable[[], T]) -> T:
        answer = await super()._call(function)
        await asyncio.sleep(random.uniform(0.0, 0.002))
        return answer


async def test_the_order_of_shows_is_the_order_of_transactions(
    tmp_path: Path, audience: ScriptedAudience
) -> None:
    async with TardyRegistry(tmp_path / "tardy.sqlite") as registry:
        ledger = Ledger(registry, audience)
        await make_ready(ledger, 2)
        shown, before = len(audience.shown), await registry.last_sequence()
        begins = (ledger.begin(NEW, request_id="", actor=ME) for _ in range(12))
        await asyncio.gather(*(write(ledger, seed) for seed in range(4)), *begins)
        splits: list[tuple[Arm, ...]] = [ONE]
        for event in await registry.events(TENANT, after=before, limit=1000):
            splits.append(event.arms if event.kind is EventKind.TRAFFIC_SET else splits[-1])
    assert len(splits) == 1 + 4 * 8 + 12
    assert audience.arms[shown:] == splits[1:]
    assert ledger.view.tenants[TENANT]["sql"].split.arms == splits[-1]


async def read(
    ledger: Ledger, after: int, until: int, adapter: str = "", heartbeat_s: float = 0.01
) -> list[EventRecord]:
    """Events up to a sequence number."""
    events: list[EventRecord] = []
    told = after
    watch = ledger.watch(TENANT, after=after, adapter=adapter, heartbeat_s=heartbeat_s)
    async with asyncio.timeout(SOON_S), aclosing(watch):
        async for event in watch:
            if isinstance(event, EventRecord):
                assert event.sequence > told, "a heartbeat said that it had been told"
                events.append(event)
                told = event.sequence
            else:
                assert event >= told
                told = event
            if told >= until:
                break
    return events


async def test_watchers_miss_nothing_while_many_write(
    ledger: Ledger, registry: SqliteRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EVENTS_PER_READ", 3)
    await make_ready(ledger, 2)
    last = 5 + 4 * 8 + 7  # of a tenant's first version three, of the next ones two
    watchers = [asyncio.create_task(read(ledger, after, last)) for after in (0, 0, 3, 20, last - 1)]
    others = NewVersion("other", "chat", "/chat")
    await asyncio.gather(*(write(ledger, seed) for seed in range(4)), make_ready(ledger, 3, others))
    events = await registry.events(TENANT, after=0, limit=1000)
    assert await registry.last_sequence() == last
    for after, watcher in zip((0, 0, 3, 20, last - 1), watchers, strict=True):
        assert await watcher == [event for event in events if event.sequence > after]


async def test_a_watcher_reads_what_was_before_without_a_pause(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EVENTS_PER_READ", 2)
    await make_ready(ledger, 4)
    events = await read(ledger, 0, 9, heartbeat_s=NEVER_S)
    assert [event.sequence for event in events] == list(range(1, 10))


async def test_a_watcher_of_one_adapter_hears_of_it_alone(ledger: Ledger) -> None:
    await make_ready(ledger)
    await make_ready(ledger, 1, NewVersion(TENANT, "chat", "/chat"))
    assert {event.adapter for event in await read(ledger, 0, 6, "chat")} == {"chat"}


async def test_a_watcher_is_told_first_where_it_stands(ledger: Ledger) -> None:
    watch = ledger.watch(TENANT, after=17, adapter="", heartbeat_s=NEVER_S)
    async with aclosing(watch):
        assert await anext(watch) == 17


async def test_a_heartbeat_tells_up_to_where_everything_was_told(ledger: Ledger) -> None:
    await make_ready(ledger, 1, NewVersion("other", "chat", "/chat"))
    watch = ledger.watch(TENANT, after=0, adapter="", heartbeat_s=0.01)
    async with asyncio.timeout(SOON_S), aclosing(watch):
        assert [await anext(watch), await anext(watch)] == [0, 3]
        await ledger.begin(NEW, request_id="", actor=ME)
        told = await anext(watch)
        while told == 3:  # one more heartbeat may have been due
            told = await anext(watch)
        assert isinstance(told, EventRecord) and told.sequence == 4


async def test_a_watcher_wakes_at_a_change_and_does_not_wait_for_its_heartbeat(
    ledger: Ledger, audience: ScriptedAudience
) -> None:
    watch = ledger.watch(TENANT, after=0, adapter="", heartbeat_s=NEVER_S)
    async with asyncio.timeout(SOON_S), aclosing(watch):
        await anext(watch)
        waiting = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0.02)  # it has read, and found nothing
        audience.may_follow.clear()  # that it must not wait for either
        change = asyncio.create_task(ledger.begin(NEW, request_id="", actor=ME))
        event = await waiting
        assert isinstance(event, EventRecord) and event.kind is EventKind.VERSION_CREATED
        assert event.actor == ME and not change.done()
