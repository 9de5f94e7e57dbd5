"""What every registry does, whatever database is behind it.

A database's own tests subclass RegistryContract and provide the fixture `make_registry`. What
is said of splits and of the trail has files of its own, for their length.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from store.records import (
    AdapterRecord,
    AdapterUnknown,
    Arm,
    EventKind,
    InvalidName,
    NewVersion,
    RequestIdReused,
    TransitionRefused,
    VersionInUse,
    VersionRecord,
    VersionState,
    VersionUnknown,
)
from store.registry import Registry
from tests.store.registry_steps import (
    ACTOR,
    ONE,
    TWO,
    MakeRegistry,
    Ticks,
    begin,
    bring_to,
    content,
    ready,
)
from tests.store.traffic_contract import TrafficContract
from tests.store.trail_contract import TrailContract

NEW = NewVersion(
    tenant="acme",
    adapter="sql",
    source_uri="/adapters/sql",
    expected_sha256=TWO,
    fingerprints={"config_sha256": ONE},
    labels={"team": "data", "ünï": "\n"},
    take_traffic=False,
)
ONE_VERSION: dict[str, Callable[[Registry, str, int], Awaitable[object]]] = {
    "version": lambda r, a, v: r.version("acme", a, v),
    "complete": lambda r, a, v: r.complete_version("acme", a, v, content(), actor=ACTOR),
    "fail": lambda r, a, v: r.fail_version("acme", a, v, ["bad"], actor=ACTOR),
    "drain": lambda r, a, v: r.drain_version("acme", a, v, actor=ACTOR),
    "delete": lambda r, a, v: r.delete_version("acme", a, v, actor=ACTOR),
    "mint": lambda r, a, v: r.mint_lora_int_id("acme", a, v),
    "set_traffic": lambda r, a, v: r.set_traffic("acme", a, [Arm(v, 1)], actor=ACTOR),
    "promote": lambda r, a, v: r.promote("acme", a, v, actor=ACTOR),
    "feedback": lambda r, a, v: r.record_feedback("acme", a, v, "r", 1.0),
}
ONE_ADAPTER: dict[str, Callable[[Registry, str], Awaitable[object]]] = {
    "adapter": lambda r, a: r.adapter("acme", a),
    "versions": lambda r, a: r.versions("acme", a, limit=1),
    "roll_back": lambda r, a: r.roll_back("acme", a, actor=ACTOR),
    "set_traffic": lambda r, a: r.set_traffic("acme", a, [], actor=ACTOR),
}
V = VersionState
MOVES: dict[tuple[str, VersionState], VersionState | type[Exception]] = {
    ("complete", V.VALIDATING): V.READY,
    ("complete", V.READY): TransitionRefused,
    ("complete", V.FAILED): TransitionRefused,
    ("complete", V.DRAINING): TransitionRefused,
    ("complete", V.DELETED): TransitionRefused,
    ("fail", V.VALIDATING): V.FAILED,
    ("fail", V.READY): TransitionRefused,
    ("fail", V.FAILED): TransitionRefused,
    ("fail", V.DRAINING): TransitionRefused,
    ("fail", V.DELETED): TransitionRefused,
    ("drain", V.VALIDATING): TransitionRefused,
    ("drain", V.READY): V.DRAINING,
    ("drain", V.FAILED): V.FAILED,
    ("drain", V.DRAINING): V.DRAINING,
    ("drain", V.DELETED): V.DELETED,
    ("delete", V.VALIDATING): TransitionRefused,
    ("delete", V.READY): TransitionRefused,
    ("delete", V.FAILED): V.DELETED,
    ("delete", V.DRAINING): V.DELETED,
    ("delete", V.DELETED): V.DELETED,
}


class RegistryContract(TrafficContract, TrailContract):
    """Tests of versions and lists, and by inheritance all others."""

    async def test_a_version_begins_with_all_that_was_asked_for(
        self, make_registry: MakeRegistry
    ) -> None:
        async with make_registry(clock_ns=Ticks(70)) as registry:
            record = await registry.begin_version(NEW, request_id="r", actor=ACTOR)
            assert record == VersionRecord(
                tenant="acme",
                adapter="sql",
                version=1,
                state=VersionState.VALIDATING,
                lora_int_id=1,
                source_uri="/adapters/sql",
                expected_sha256=TWO,
                fingerprints={"config_sha256": ONE},
                labels={"team": "data", "ünï": "\n"},
                take_traffic=False,
                create_time_ns=record.create_time_ns,
                update_time_ns=record.create_time_ns,
            )
            assert record.create_time_ns > 70
            assert await registry.version("acme", "sql", 1) == record
            assert await registry.adapter("acme", "sql") == AdapterRecord(
                tenant="acme",
                adapter="sql",
                arms=(),
                guard=None,
                traffic_revision=0,
                latest_version=1,
                create_time_ns=record.create_time_ns,
                traffic_time_ns=record.create_time_ns,
            )

    async def test_versions_count_up_for_each_adapter_and_ids_over_all(
        self, make_registry: MakeRegistry
    ) -> None:
        async with make_registry() as registry:
            names = [("acme", "sql"), ("acme", "sql"), ("acme", "chat"), ("other", "sql")]
            records = [await begin(registry, adapter, tenant=tenant) for tenant, adapter in names]
        assert [record.version for record in records] == [1, 2, 1, 1]
        assert [record.lora_int_id for record in records] == [1, 2, 3, 4]

    async def test_a_repeated_request_gets_its_version_as_it_stands_now(
        self, make_registry: MakeRegistry
    ) -> None:
        async with make_registry() as registry:
            first = await registry.begin_version(NEW, request_id="r", actor=ACTOR)
            assert await registry.begin_version(NEW, request_id="r", actor="other") == first
            done, _ = await registry.complete_version("acme", "sql", 1, content(), actor=ACTOR)
            assert await registry.begin_version(NEW, request_id="r", actor=ACTOR) == done
            assert await registry.version_of_request("acme", "r") == done
            assert (await registry.adapter("acme", "sql")).latest_version == 1

    @pytest.mark.parametrize(
        "other",
        [
            {"adapter": "chat"},
            {"source_uri": "/adapters/sql/"},
            {"expected_sha256": ""},
            {"fingerprints": {}},
            {"labels": {"team": "data"}},
            {"take_traffic": True},
        ],
        ids=lambda other: next(iter(other)),
    )
    async def test_a_request_id_with_other_fields_is_refused(
        self, make_registry: MakeRegistry, other: dict[str, object]
    ) -> None:
        changed = replace(NEW, **other)  # type: ignore[arg-type]
        async with make_registry() as registry:
            await registry.begin_version(NEW, request_id="r", actor=ACTOR)
            with pytest.raises(RequestIdReused, match="'r' was used with other fields"):
                await registry.begin_version(changed, request_id="r", actor=ACTOR)
            assert await registry.last_sequence() == 1

    async def test_request_ids_are_each_tenants_own_and_none_is_no_id(
        self, make_registry: MakeRegistry
    ) -> None:
        async with make_registry() as registry:
            await registry.begin_version(NEW, request_id="r", actor=ACTOR)
            theirs = replace(NEW, tenant="other", labels={})
            await registry.begin_version(theirs, request_id="r", actor=ACTOR)
            for _ in range(2):
                last = await registry.begin_version(NEW, request_id="", actor=ACTOR)
            assert last.version == 3
            assert await registry.version_of_request("acme", "") is None
            assert await registry.version_of_request("acme", "never") is None

    async def test_callers_at_once_with_one_request_id_get_one_version(
        self, make_registry: MakeRegistry
    ) -> None:
        async with make_registry() as registry:
            calls = [registry.begin_version(NEW, request_id="r", actor=ACTOR) for _ in range(20)]
            records = await asyncio.gather(*calls)
        assert {record.version for record in records} == {1}
        assert {record.lora_int_id for record in records} == {1}

    @pytest.mark.parametrize(
        "name", ["", "SQL", "-sql", ".sql", "a/b", "a b", "a\n", "é", "a" * 64]
    )
    async def test_a_name_against_the_rules_is_refused(
        self, make_registry: MakeRegistry, name: str
    ) -> None:
        async with make_registry() as registry:
            with pytest.raises(InvalidName, match=r"adapter .* is no valid name; use 1 to 63"):
                await begin(registry, name)
            with pytest.raises(InvalidName, match=r"tenant .* is no valid name"):
                await begin(registry, tenant=name)
            assert await registry.snapshot() == []

    @pytest.mark.parametrize("name", ["a", "0", "my-adapter_v1.2", "a" * 63])
    async def test_a_name_by_the_rules_is_taken(
        self, make_registry: MakeRegistry, name: str
    ) -> None:
        async with make_registry() as registry:
            assert (await begin(registry, name, tenant=name)).adapter == name

    async def test_a_complete_version_has_its_content(self, make_registry: MakeRegistry) -> None:
        async with make_registry() as registry:
            begun = await begin(registry)
            record, _ = await registry.complete_version("acme", "sql", 1, content(), actor=ACTOR)
            assert await registry.version("acme", "sql", 1) == record
        assert record.update_time_ns > begun.update_time_ns
        assert record == replace(
            begun,
            state=VersionState.READY,
            content=content(),
            update_time_ns=record.update_time_ns,
        )

    async def test_content_needs_a_digest(self, make_registry: MakeRegistry) -> None:
        async with make_registry() as registry:
            begun = await begin(registry)
            with pytest.raises(ValueError, match="not a digest: 'latest'"):
                await registry.complete_version("acme", "sql", 1, content("latest"), actor=ACTOR)
            assert await registry.version("acme", "sql", 1) == begun

    async def test_a_failed_version_says_why_even_in_no_unicode(
        self, make_registry: MakeRegistry
    ) -> None:
        findings = ["rank is 512", "module 'a\ud800' is unknown"]
        async with make_registry() as registry:
            await begin(registry)
            record = await registry.fail_version("acme", "sql", 1, findings, actor=ACTOR)
            assert await registry.version("acme", "sql", 1) == record
            (*_, event) = await registry.events("acme", after=0, limit=9)
        assert record.findings == ("rank is 512", r"module 'a\ud800' is unknown")
        assert record.content is None
        assert (event.kind, event.reason) == (
            EventKind.VERSION_FAILED,
            r"rank is 512; module 'a\ud800' is unknown",
        )

    @pytest.mark.parametrize(("method", "state"), MOVES, ids=lambda value: str(value))
    async def test_states_change_by_the_drawing_alone(
        self, make_registry: MakeRegistry, method: str, state: VersionState
    ) -> None:
        outcome = MOVES[method, state]
        async with make_registry() as registry:
            found = await bring_to(registry, state)
            sequence = await registry.last_sequence()
            if isinstance(outcome, VersionState):
                await ONE_VERSION[method](registry, "sql", 1)
                changed = outcome is not state
            else:
                with pytest.raises(outcome, match=f"cannot go from {state.name} to"):
                    await ONE_VERSION[method](registry, "sql", 1)
                outcome, changed = state, False
            record = await registry.version("acme", "sql", 1)
            assert record.state is outcome
            assert await registry.last_sequence() == sequence + changed
            assert (record.update_time_ns > found.update_time_ns) == changed
            assert [r.version for r in await registry.versions_in(outcome)] == [1]

    async def test_a_version_with_traffic_is_not_drained(self, make_registry: MakeRegistry) -> None:
        async with make_registry() as registry:
            record = await ready(registry)
            with pytest.raises(VersionInUse, match="version 1 of adapter 'sql' has traffic"):
                await registry.drain_version("acme", "sql", 1, actor=ACTOR)
            assert await registry.version("acme", "sql", 1) == record

    async def test_numbers_of_deleted_versions_never_come_back(
        self, make_registry: MakeRegistry
    ) -> None:
        async with make_registry() as registry:
            await bring_to(registry, VersionState.DELETED)
        async with make_registry() as registry:
            record = await begin(registry)
        assert (record.version, record.lora_int_id) == (2, 2)

    async def test_a_fresh_id_replaces_the_old_one_for_good(
        self, make_registry: MakeRegistry
    ) -> None:
        async with make_registry() as registry:
            await begin(registry)
            assert await registry.mint_lora_int_id("acme", "sql", 1) == 2
            assert await registry.mint_lora_int_id("acme", "sql", 1) == 3
            assert (await registry.version("acme", "sql", 1)).lora_int_id == 3
            with pytest.raises(VersionUnknown):
                await registry.mint_lora_int_id("acme", "sql", 2)
            assert (await begin(registry)).lora_int_id == 4

    @pytest.mark.parametrize("method", ONE_VERSION)
    async def test_a_version_that_is_not_there_is_unknown(
        self, make_registry: MakeRegistry, method: str
    ) -> None:
        async with make_registry() as registry:
            await begin(registry)
            with pytest.raises(VersionUnknown, match="adapter 'sql' has no version 2"):
                await ONE_VERSION[method](registry, "sql", 2)
            await begin(registry, "chat", tenant="other")
            with pytest.raises(AdapterUnknown, match="adapter 'chat' is unknown") as caught:
                await ONE_VERSION[method](registry, "chat", 1)
            assert caught.type is AdapterUnknown
            assert await registry.last_sequence() == 2

    @pytest.mark.parametrize("method", ONE_ADAPTER)
    async def test_an_adapter_of_another_tenant_is_unknown(
        self, make_registry: MakeRegistry, method: str
    ) -> None:
        async with make_registry() as registry:
            await begin(registry, "chat", tenant="other")
            with pytest.raises(AdapterUnknown, match="adapter 'chat' is unknown"):
                await ONE_ADAPTER[method](registry, "chat")

    async def test_the_newest_ready_version_with_a_content_is_found(
        self, make_registry: MakeRegistry
    ) -> None:
        async with make_registry() as registry:
            for _ in range(3):
                await ready(registry, digest=ONE)
            newest = await registry.version("acme", "sql", 3)
            await ready(registry, digest=TWO)
            assert await registry.find_ready("acme", "sql", ONE) == newest
            await registry.drain_version("acme", "sql", 3, actor=ACTOR)
            found = await registry.find_ready("acme", "sql", ONE)
            assert found is not None and found.version == 2
            assert await registry.find_ready("acme", "chat", ONE) is None
            assert await registry.find_ready("other", "sql", ONE) is None

    @pytest.mark.parametrize("state", VersionState)
    async def test_content_is_in_use_until_its_last_version_is_deleted(
        self, make_registry: MakeRegistry, state: VersionState
    ) -> None:
        async with make_registry() as registry:
            await bring_to(registry, state)
            in_use = state in (VersionState.READY, VersionState.DRAINING)
            assert await registry.digest_in_use(ONE) == in_use
            assert not await registry.digest_in_use(TWO)
            await ready(registry, tenant="other", digest=ONE)
            assert await registry.digest_in_use(ONE)
