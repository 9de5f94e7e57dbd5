"""A name, a version and a session become a route, or an error that says what is there."""

from __future__ import annotations

import asyncio

import pytest

from engine.errors import AdapterLoadFailed, AdapterNotFound, AdapterNotReady, VersionNotFound
from engine.fake import FakeShard
from engine.generation import ServedVersion, VersionKey
from engine.pool import Route, ServedAdapter, ServedView, ShardPool
from engine.residents import Residents
from engine.ring import AdapterKey, NoShardOpen, Plan, Reason, ShardState, cap
from engine.slot_holds import SlotHolds
from engine.split import Split
from store.records import Arm
from tests.engine.open_slots import open_slots

ALPHA = {1: 50, 3: 50}


async def nothing_in_core(lora_int_id: int) -> int:
    return 0


def adapter(weights: dict[int, int], *ready: int) -> ServedAdapter:
    arms = [Arm(version, weight) for version, weight in weights.items()]
    return ServedAdapter(Split(arms), tuple(sorted({*weights, *ready})))


def view() -> ServedView:
    view = ServedView()
    view.show("acme", "alpha", adapter(ALPHA, 4))
    view.show("acme", "beta", adapter({2: 1}))
    view.show("acme", "resting", adapter({}, 7))
    view.show("acme", "new", adapter({}))
    view.show("other", "gamma", adapter({1: 1}))
    return view


def pool(view: ServedView, residents: Residents | None = None) -> ShardPool:
    residents = residents or Residents(lambda key: None, nothing_in_core, open_slots())
    return ShardPool([FakeShard()], {"shard-0": residents}, view)


def route(adapter: str, version: int | None = None, session: str = "") -> Route:
    return pool(view()).route("acme", adapter, version, session)


def test_a_pool_needs_a_shard() -> None:
    with pytest.raises(ValueError, match="needs a shard"):
        ShardPool([], {}, ServedView())


def test_no_adapter_is_the_base_model() -> None:
    assert route("").key is None
    assert pool(ServedView()).route("acme", "", None, "").key is None


def test_the_split_decides_and_a_session_sticks_to_its_arm() -> None:
    assert route("beta").key == ("acme", "beta", 2)
    arms = {session: route("alpha", None, f"{session}").key for session in range(50)}
    assert set(arms.values()) == {("acme", "alpha", 1), ("acme", "alpha", 3)}
    assert arms == {session: route("alpha", None, f"{session}").key for session in range(50)}


def test_a_session_is_placed_in_each_adapter_by_itself() -> None:
    shown = view()
    shown.show("acme", "alike", adapter(ALPHA))
    sessions = [f"{number}" for number in range(100)]
    one, other = (
        [shown.resolve("acme", name, None, session) for session in sessions]
        for name in ("alpha", "alike")
    )
    same = sum(a is not None and b is not None and a.version == b.version
               for a, b in zip(one, other, strict=True))  # fmt: skip
    assert 20 < same < 80


@pytest.mark.parametrize("version", [1, 3, 4])
def test_a_version_that_is_ready_may_be_named_with_traffic_or_without(version: int) -> None:
    assert route("alpha", version).key == VersionKey("acme", "alpha", version)


def test_an_unknown_adapter_is_told_what_is_there_in_its_own_tenant() -> None:
    with pytest.raises(AdapterNotFound) as caught:
        route("alpa")
    assert not isinstance(caught.value, VersionNotFound)
    assert caught.value.adapter == "alpa"
    assert str(caught.value) == (
        "adapter 'alpa' is unknown; served here: alpha, beta, resting, new"
    )
    with pytest.raises(AdapterNotFound):
        route("gamma")


def test_where_there_is_none_the_error_says_none() -> None:
    with pytest.raises(AdapterNotFound, match="served here: none"):
        pool(ServedView()).route("acme", "alpha", None, "")


def test_of_many_adapters_the_error_names_a_few() -> None:
    many = ServedView()
    for number in range(5000):
        many.show("acme", f"adapter-{number:04}", adapter({1: 1}))
    with pytest.raises(AdapterNotFound, match="and 4990 more") as caught:
        pool(many).route("acme", "alpha", None, "")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("version", [0, 2, 5])
def test_a_version_that_is_not_ready_is_told_which_are(version: int) -> None:
    with pytest.raises(VersionNotFound) as caught:
        route("alpha", version)
    assert (caught.value.adapter, caught.value.version) == ("alpha", version)
    assert str(caught.value).endswith(f"has no READY version {version}; READY here: 1, 3, 4")


def test_an_adapter_without_traffic_says_what_to_do() -> None:
    with pytest.raises(AdapterNotReady, match=r"name one \(7\), or give one traffic"):
        route("resting")
    assert route("resting", 7).key == ("acme", "resting", 7)
    with pytest.raises(AdapterNotReady, match="none is READY yet"):
        route("new")


def test_a_route_keeps_its_version_when_the_view_changes() -> None:
    shown = view()
    placed = pool(shown).route("acme", "beta", None, "")
    shown.show("acme", "beta", adapter({5: 1}, 2))
    assert placed.key == ("acme", "beta", 2)
    assert pool(shown).route("acme", "beta", None, "").key == ("acme", "beta", 5)


async def test_a_lease_holds_what_is_loaded_until_it_ends() -> None:
    residents = Residents(lambda key: None, nothing_in_core, open_slots())
    loaded = ServedVersion("acme", "beta", 2, 9, "/beta", "digest")
    residents.loaded(loaded)
    placed = pool(view(), residents).route("acme", "beta", None, "")
    async with placed.lease() as version:
        assert version == loaded
        assert residents.uses()[loaded.key].holds == 1
    assert residents.uses()[loaded.key].holds == 0


async def waits_for_its_slot(residents: Residents) -> tuple[Route, asyncio.Task[None]]:
    """A lease of a loaded version that has no slot; its task ends when it has one."""
    loaded = ServedVersion("acme", "beta", 2, 9, "/beta", "digest")
    residents.loaded(loaded)
    placed = pool(view(), residents).route("acme", "beta", None, "")

    async def run() -> None:
        async with placed.lease() as version:
            assert version == loaded
            assert residents.slots._slots[loaded.key].running == 1

    running = asyncio.create_task(run())
    await asyncio.sleep(0)
    assert placed.in_flight["shard-0"] == 1
    assert residents.uses()[loaded.key].holds == 1, "it is not unloaded meanwhile"
    return placed, running


async def test_a_lease_waits_for_the_slot_of_its_version_and_gives_it_back() -> None:
    slots = SlotHolds(lambda key, waits: None, nothing_in_core)
    residents = Residents(lambda key: None, nothing_in_core, slots)
    placed, running = await waits_for_its_slot(residents)
    assert placed.key is not None
    slots.granted(placed.key)
    await running
    assert slots._slots[placed.key].running == 0
    assert residents.uses()[placed.key].holds == 0
    assert placed.in_flight["shard-0"] == 0


async def test_a_lease_that_is_given_up_while_it_waits_for_a_slot_holds_nothing() -> None:
    told: list[bool] = []
    slots = SlotHolds(lambda key, waits: told.append(waits), nothing_in_core)
    residents = Residents(lambda key: None, nothing_in_core, slots)
    placed, running = await waits_for_its_slot(residents)
    assert placed.key is not None
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert told == [True, False]
    assert residents.uses()[placed.key].holds == 0
    assert placed.in_flight["shard-0"] == 0


async def test_the_base_model_needs_no_lease() -> None:
    async with route("").lease() as version:
        assert version is None


async def test_a_lease_of_what_cannot_be_loaded_raises() -> None:
    residents = Residents(
        lambda key: residents.failed(key, "its files are gone"), nothing_in_core, open_slots()
    )
    placed = pool(view(), residents).route("acme", "beta", None, "")
    with pytest.raises(AdapterLoadFailed, match="its files are gone"):
        async with placed.lease():
            pass


def test_vllm_sees_tenant_adapter_and_version_as_one_name() -> None:
    version = ServedVersion("acme", "alpha", 3, 1, "/alpha", "digest")
    assert version.lora_name == "acme/alpha@3"


# --- several shards ----------------------------------------------------------

NAMES = ("shard-0", "shard-1", "shard-2")


def several(wanted: list[tuple[str, VersionKey]] | None = None) -> ShardPool:
    """A pool of three shards, which have loaded nothing; `wanted` is what is asked for."""
    asked: list[tuple[str, VersionKey]] = [] if wanted is None else wanted

    def residents(name: str) -> Residents:
        return Residents(lambda key: asked.append((name, key)), nothing_in_core, open_slots())

    shards = [FakeShard(name) for name in NAMES]
    return ShardPool(shards, {name: residents(name) for name in NAMES}, view())


def keys(count: int) -> list[VersionKey]:
    return [VersionKey("acme", f"adapter-{number}", 1) for number in range(count)]


def test_adapters_are_spread_as_the_ring_says_and_each_stays_where_it_is() -> None:
    one, other = several(), several()
    for key in keys(50):
        home = one.ring.ranked(AdapterKey(key.tenant, key.adapter))[0]
        for pool in (one, other, one):
            assert pool.route_to(key).shard.name == home
        assert one.route_to(key._replace(version=2)).shard.name == home, "as all its versions"
    assert {one.route_to(key).shard.name for key in keys(50)} == set(NAMES)


async def test_the_base_model_goes_where_least_is_in_flight() -> None:
    pool = several()
    leases = []
    for _ in range(6):
        route = pool.route_to(None)
        assert route.reason is Reason.LEAST_LOADED
        leases.append(route.lease())
        await leases[-1].__aenter__()
    assert pool.route_to(None).in_flight == dict.fromkeys(NAMES, 2)
    for lease in leases:
        await lease.__aexit__(None, None, None)
    assert pool.route_to(None).in_flight == dict.fromkeys(NAMES, 0)


async def test_a_request_counts_from_the_moment_at_which_it_waits_for_its_version() -> None:
    wanted: list[tuple[str, VersionKey]] = []
    pool = several(wanted)
    (key,) = keys(1)
    route = pool.route_to(key)

    async def run() -> None:
        async with route.lease():
            raise AssertionError("nobody loads it")

    waiting = asyncio.create_task(run())
    while not wanted:
        await asyncio.sleep(0)
    assert wanted == [(route.shard.name, key)]
    assert route.in_flight[route.shard.name] == 1
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert set(route.in_flight.values()) == {0}


async def test_above_the_cap_an_adapter_overflows_to_the_next_of_its_order() -> None:
    pool = several()
    (key,) = keys(1)
    first, second, _ = pool.ring.ranked(AdapterKey(key.tenant, key.adapter))
    for _ in range(cap(0, 3)):
        route = pool.route_to(key)
        assert (route.shard.name, route.reason) == (first, Reason.PLANNED)
        await route.to(None).lease().__aenter__()
    overflow = pool.route_to(key)
    assert (overflow.shard.name, overflow.reason) == (second, Reason.OVERFLOW)


def test_a_shard_that_left_gets_nothing_until_it_is_back() -> None:
    pool = several()
    (key,) = keys(1)
    home = pool.route_to(key)
    pool.leave(home.shard.name)
    instead = pool.route_to(key)
    assert instead.shard.name == pool.ring.ranked(AdapterKey(key.tenant, key.adapter))[1]
    assert instead.reason is Reason.FAILOVER
    assert [route.shard.name for route in pool.homes(key)] == [instead.shard.name]
    pool.join(home.shard, home.residents)
    assert pool.route_to(key).shard.name == home.shard.name
    with pytest.raises(KeyError):
        pool.join(FakeShard("shard-9"), home.residents)


def test_shards_that_were_tried_are_left_out() -> None:
    pool = several()
    (key,) = keys(1)
    ranked = pool.ring.ranked(AdapterKey(key.tenant, key.adapter))
    assert pool.route_to(key, without=ranked[:1]).shard.name == ranked[1]
    assert pool.route_to(None, without=NAMES[:2]).shard.name == NAMES[2]
    with pytest.raises(NoShardOpen):
        pool.route_to(key, without=NAMES)


def test_without_a_shard_that_is_up_there_is_no_route() -> None:
    pool = ShardPool([], {}, view(), NAMES)
    (key,) = keys(1)
    for ask in (lambda: pool.route_to(None), lambda: pool.route_to(key), lambda: pool.homes(key)):
        with pytest.raises(NoShardOpen):
            ask()


def test_the_homes_of_a_version_are_its_replicas() -> None:
    pool = several()
    hot, cold = keys(2)
    pool.follow(Plan(((AdapterKey(hot.tenant, hot.adapter), 2),), 1))
    ranked = pool.ring.ranked(AdapterKey(hot.tenant, hot.adapter))
    assert tuple(route.shard.name for route in pool.homes(hot)) == ranked[:2]
    assert all(route.key == hot for route in pool.homes(hot))
    assert len(pool.homes(cold)) == 1


# --- shards that are drained -------------------------------------------------


def three_shards() -> ShardPool:
    shards = [FakeShard(f"shard-{number}") for number in range(3)]
    residents = {
        shard.name: Residents(lambda key: None, nothing_in_core, open_slots()) for shard in shards
    }
    return ShardPool(shards, residents, view())


def test_a_drained_shard_gets_nothing_and_gets_it_all_back() -> None:
    several = three_shards()
    key = VersionKey("acme", "beta", 2)
    home, second, _ = several.ring.ranked(AdapterKey("acme", "beta"))
    several.drain([home])
    assert several.drained == {home} and several.is_open
    placed = several.route_to(key)
    assert (placed.shard.name, placed.reason) == (second, Reason.FAILOVER)
    assert [route.shard.name for route in several.homes(key)] == [second]
    assert home not in {several.route_to(None).shard.name for _ in range(9)}
    several.drain([])
    assert several.route_to(key).shard.name == home


def test_a_drain_outlives_the_core_and_comes_before_it() -> None:
    several = three_shards()
    home = several.ring.ranked(AdapterKey("acme", "beta"))[0]
    residents = Residents(lambda key: None, nothing_in_core, open_slots())
    several.leave(home)
    several.drain([home])
    assert several.ring.states[home] is ShardState.DOWN
    several.join(FakeShard(home), residents)
    assert several.ring.states[home] is ShardState.DRAINING
    several.drain([])
    assert several.ring.states[home] is ShardState.UP


def test_without_a_shard_that_is_not_drained_none_is_open() -> None:
    several = three_shards()
    several.drain(several.ring.shards)
    assert not several.is_open
    with pytest.raises(NoShardOpen):
        several.route_to(None)


def test_a_choice_places_nothing() -> None:
    several = three_shards()
    key = VersionKey("acme", "beta", 2)
    choice = several.choose(key)
    assert several.placed == 0 and set(several.in_flight.values()) == {0}
    assert several.route_to(key).shard.name == choice.shard
    assert several.placed == 1


async def test_what_runs_on_a_drained_shard_goes_on_and_is_counted() -> None:
    several = three_shards()
    placed = several.route_to(None)
    async with placed.lease():
        several.drain([placed.shard.name])
        assert several.in_flight[placed.shard.name] == 1
    assert several.in_flight[placed.shard.name] == 0
