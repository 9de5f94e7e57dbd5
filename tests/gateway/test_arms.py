"""Outcomes reach the host in batches, and are remembered within bounds."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import arms as arms_module
from gateway.arms import MAX_ARM_OUTCOMES, MAX_ARMS, MAX_REQUESTS, Arms, Outcome, Reporter
from gateway.call import Call, Principal
from tests.gateway.outcomes import failure, outcome

NEVER_S = 3_600.0


def ended(**fields: object) -> Call:
    """A call of the version 2 that got 5 tokens, the first after 0.25 s, the last after 1.25 s."""
    call = Call("Generate", Principal("acme"), "r1", started_s=100.0, task=None)
    call.adapter, call.version = "pirate", 2
    call.prompt_tokens, call.completion_tokens = 7, 5
    call.first_token_s, call.last_token_s = 100.25, 101.25
    call.finish_reasons = ("stop",)
    for name, value in fields.items():
        setattr(call, name, value)
    return call


def ids(outcomes: Sequence[Outcome]) -> list[str]:
    return [each.request_id for each in outcomes]


# --- an outcome of a call ---------------------------------------------------


def test_an_outcome_tells_who_when_and_how_much() -> None:
    before_s = time.time()
    found = Outcome.of(ended(), "OK", time.monotonic())
    assert before_s - 0.001 <= found.end_s <= time.time() + 0.001
    assert (found.tenant, found.adapter, found.version) == ("acme", "pirate", 2)
    assert (found.request_id, found.code, found.finish_reasons) == ("r1", "OK", ("stop",))
    assert (found.prompt_tokens, found.completion_tokens) == (7, 5)
    assert (found.ttft_s, found.total_s, found.inter_token_s) == (0.25, 1.25, 0.25)


def test_the_end_is_that_of_the_call_not_of_the_telling() -> None:
    found = Outcome.of(ended(), "OK", time.monotonic() - 60)
    assert found.end_s == pytest.approx(time.time() - 60, abs=1)


def test_a_request_that_failed_lasted_until_its_end() -> None:
    assert Outcome.of(ended(), "UNAVAILABLE", 109.0).total_s == 9.0


def test_a_request_without_a_token_has_no_latency_but_its_own() -> None:
    call = ended(first_token_s=None, last_token_s=None, completion_tokens=0, finish_reasons=())
    found = Outcome.of(call, "DEADLINE_EXCEEDED", 130.0)
    assert (found.ttft_s, found.inter_token_s, found.total_s) == (None, None, 30.0)


@pytest.mark.parametrize(
    ("tokens", "reasons", "inter_token_s"),
    [
        (1, ("stop",), None),
        (2, ("length",), 1.0),
        (5, (), 0.25),
        (10, ("stop", "length"), 0.25),
        (4, ("stop",) * 4, None),
    ],
    ids=["one token", "two", "cut off", "two completions side by side", "four of one token"],
)
def test_time_between_tokens_is_that_of_one_completion(
    tokens: int, reasons: tuple[str, ...], inter_token_s: float | None
) -> None:
    call = ended(completion_tokens=tokens, finish_reasons=reasons)
    assert Outcome.of(call, "OK", 102.0).inter_token_s == inter_token_s


def test_outcomes_travel_and_share_their_names() -> None:
    sent = [outcome(request_id="a"), failure(request_id="b")]
    one, other = pickle.loads(pickle.dumps(sent))
    assert [one, other] == sent
    late = pickle.loads(pickle.dumps(sent[0]))
    assert late.adapter is one.adapter is other.adapter
    assert late.finish_reasons[0] is one.finish_reasons[0]


# --- the host's memory ------------------------------------------------------


def test_each_version_has_its_own_outcomes_in_order() -> None:
    arms = Arms()
    arms.record([outcome(request_id="a"), outcome(request_id="b", version=2)])
    arms.record([outcome(request_id="c"), outcome(request_id="d", tenant="other")])
    assert ids(arms.outcomes("default", "pirate", 1)) == ["a", "c"]
    assert ids(arms.outcomes("default", "pirate", 2)) == ["b"]
    assert ids(arms.outcomes("other", "pirate", 1)) == ["d"]
    assert arms.outcomes("default", "pirate", 3) == []
    assert arms.outcomes("default", "sailor", 1) == []


def test_outcomes_are_those_since_a_time() -> None:
    arms = Arms()
    arms.record(outcome(request_id=str(end_s), end_s=end_s) for end_s in (5.0, 9.0, 7.0, 8.0))
    assert ids(arms.outcomes("default", "pirate", 1, since_s=8.0)) == ["9.0", "8.0"]


def test_the_newest_are_those_since_a_time_and_no_more_than_asked_for() -> None:
    arms = Arms()
    arms.record(outcome(request_id=f"r{number}", end_s=float(number)) for number in range(10))

    def newest(since_s: float, limit: int, version: int = 1) -> list[str]:
        return ids(arms.newest("default", "pirate", version, since_s=since_s, limit=limit))

    assert newest(7.0, 100) == ["r9", "r8", "r7"]
    assert newest(0.0, 2) == ["r9", "r8"]
    assert newest(10.0, 100) == newest(0.0, 100, version=2) == []


def test_versions_are_those_that_answered() -> None:
    arms = Arms()
    arms.record([outcome(version=version) for version in (10, 2, 9, 2)])
    arms.record([outcome(version=4, adapter="sailor"), outcome(version=5, tenant="other")])
    assert arms.versions("default", "pirate") == [2, 9, 10]
    assert arms.versions("default", "sailor") == [4]
    assert arms.versions("default", "unheard") == []


def test_the_memory_begins_with_itself() -> None:
    before_s = time.time()
    assert before_s <= Arms().since_s <= time.time()


def test_what_was_read_stays_when_more_comes() -> None:
    arms = Arms()
    arms.record([outcome()])
    read = arms.outcomes("default", "pirate", 1)
    arms.record([outcome()])
    assert len(read) == 1


def test_an_arm_keeps_its_newest() -> None:
    arms = Arms()
    arms.record(outcome(request_id=str(number)) for number in range(MAX_ARM_OUTCOMES + 3))
    kept = ids(arms.outcomes("default", "pirate", 1))
    assert len(kept) == MAX_ARM_OUTCOMES
    assert (kept[0], kept[-1]) == ("3", str(MAX_ARM_OUTCOMES + 2))


def test_the_arm_that_was_idle_longest_is_forgotten() -> None:
    arms = Arms()
    arms.record(outcome(version=version) for version in range(1, MAX_ARMS + 1))
    arms.record([outcome(version=1), outcome(version=MAX_ARMS + 1)])
    versions = arms.versions("default", "pirate")
    assert len(versions) == MAX_ARMS
    assert 1 in versions, "it was used again"
    assert 2 not in versions


def test_beyond_the_whole_bound_idle_arms_lose_their_oldest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arms_module, "MAX_OUTCOMES", 6)
    arms = Arms()
    for version in (1, 2):
        arms.record(outcome(version=version, request_id=f"{version}{n}") for n in "abc")
    arms.record([outcome(version=3), outcome(version=3)])
    assert ids(arms.outcomes("default", "pirate", 1)) == ["1c"]
    assert ids(arms.outcomes("default", "pirate", 2)) == ["2a", "2b", "2c"]
    arms.record([outcome(version=3), outcome(version=3)])
    assert arms.versions("default", "pirate") == [2, 3], "nothing is left of version 1"
    assert ids(arms.outcomes("default", "pirate", 2)) == ["2b", "2c"]


def test_what_was_dropped_takes_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, bound in {"MAX_ARM_OUTCOMES": 2, "MAX_ARMS": 3, "MAX_OUTCOMES": 6}.items():
        monkeypatch.setattr(arms_module, name, bound)
    full = Arms()
    full.record([outcome(version=1)] * 50)
    idle = Arms()
    idle.record(outcome(version=version) for version in range(10, 60))
    for arms in (full, idle):
        arms.record(outcome(version=version) for version in (1, 2, 3) for _ in range(2))
        kept = [len(arms.outcomes("default", "pirate", version)) for version in (1, 2, 3)]
        assert kept == [2, 2, 2]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 9)), max_size=40))
def test_bounds_hold_whatever_comes(requests: list[tuple[int, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, bound in {
            "MAX_ARM_OUTCOMES": 4,
            "MAX_ARMS": 3,
            "MAX_OUTCOMES": 7,
            "MAX_REQUESTS": 5,
        }.items():
            patch.setattr(arms_module, name, bound)
        arms = Arms()
        for version, number in requests:
            arms.record([outcome(version=version, request_id=str(number))])
            kept = {v: arms.outcomes("default", "pirate", v) for v in range(1, 7)}
            assert arms.versions("default", "pirate") == [v for v in kept if kept[v]]
            assert len(arms.versions("default", "pirate")) <= 3
            assert all(len(of) <= 4 for of in kept.values())
            assert sum(map(len, kept.values())) <= 7
            assert kept[version][-1].request_id == str(number), "the newest is there always"
        known = [n for n in range(10) if arms.arm_of("default", str(n)) is not None]
        latest: dict[int, int] = {}
        for version, number in reversed(requests):
            latest.setdefault(number, version)
        assert set(known) == set(list(latest)[:5])
        assert all(arms.arm_of("default", str(n)) == ("pirate", latest[n]) for n in known)


def test_a_request_is_found_by_its_id_and_tenant() -> None:
    arms = Arms()
    arms.record([outcome(request_id="a", version=3), failure(request_id="b", adapter="sailor")])
    assert arms.arm_of("default", "a") == ("pirate", 3)
    assert arms.arm_of("default", "b") == ("sailor", 1)
    assert arms.arm_of("other", "a") is None
    assert arms.arm_of("default", "c") is None


def test_the_newest_requests_are_known_beyond_what_an_arm_keeps() -> None:
    arms = Arms()
    arms.record(outcome(request_id=str(number)) for number in range(MAX_REQUESTS + 1))
    assert arms.arm_of("default", "0") is None
    assert arms.arm_of("default", "1") == ("pirate", 1)
    assert arms.arm_of("default", str(MAX_REQUESTS)) == ("pirate", 1)


# --- the worker's side ------------------------------------------------------


def test_a_full_batch_is_sent_at_once() -> None:
    batches: list[Sequence[Outcome]] = []
    reporter = Reporter(batches.append, NEVER_S, max_batch=3)
    for name in "abcdefg":
        reporter.record(outcome(request_id=name))
    assert [ids(batch) for batch in batches] == [["a", "b", "c"], ["d", "e", "f"]]
    reporter.flush()
    assert ids(batches[-1]) == ["g"]


def test_nothing_is_sent_twice_or_empty() -> None:
    batches: list[Sequence[Outcome]] = []
    reporter = Reporter(batches.append, NEVER_S)
    reporter.flush()
    reporter.record(outcome())
    reporter.flush()
    reporter.flush()
    assert [len(batch) for batch in batches] == [1]


async def test_a_batch_is_sent_after_the_interval_until_the_end() -> None:
    batches: asyncio.Queue[Sequence[Outcome]] = asyncio.Queue()
    reporter = Reporter(batches.put_nowait, interval_s=0.01)
    running = asyncio.create_task(reporter.run())
    try:
        for name in "ab":
            reporter.record(outcome(request_id=name))
            assert batches.empty(), "not before the interval"
            async with asyncio.timeout(5):
                assert ids(await batches.get()) == [name]
    finally:
        running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    reporter.record(outcome(request_id="last"))
    reporter.flush()
    assert ids(batches.get_nowait()) == ["last"]
