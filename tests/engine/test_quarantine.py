"""Who is quarantined after which crashes."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from engine import quarantine as module
from engine.fingerprint import Tagged
from engine.quarantine import MAX_CRASHES, MAX_TOGETHER, QUARANTINE_S, WINDOW_S, Kind, Quarantine
from engine.step_record import Steps

REQUEST, VERSION = Kind.REQUEST, Kind.ADAPTER_VERSION
POISON = 666
A, B = "acme/alpha@1", "acme/beta@2"


class Clock:
    now_s = 1e9

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quarantine(clock: Clock) -> Quarantine:
    return Quarantine(clock)


def steps(
    fresh: Iterable[int] = (), older: Iterable[int] = (), versions: Iterable[str] = ("",)
) -> Steps:
    return Steps(
        frozenset(Tagged(f"r{number}", number) for number in fresh),
        frozenset(Tagged(f"r{number}", number) for number in older),
        frozenset(versions),
    )


def test_one_crash_makes_suspects_and_nobody_is_refused(quarantine: Quarantine) -> None:
    assert quarantine.crashed(steps([POISON], [1, 2])) == []
    state = quarantine.state
    assert state.suspects == {POISON, 1, 2} and not state.requests and not state.versions


def test_a_request_in_two_crashes_is_quarantined_for_an_hour(
    quarantine: Quarantine, clock: Clock
) -> None:
    quarantine.crashed(steps([POISON], [1, 2]))
    clock.now_s += 60
    assert quarantine.crashed(steps([POISON], [3])) == [(REQUEST, POISON)]
    assert quarantine.state.requests == {POISON: clock.now_s + QUARANTINE_S}
    assert quarantine.counts() == {REQUEST: 1, VERSION: 0}
    assert not quarantine.state.suspects, "both crashes are explained"
    clock.now_s += QUARANTINE_S
    assert not quarantine.state.requests and quarantine.counts()[REQUEST] == 0


def test_crashes_further_apart_than_the_window_have_nothing_in_common(
    quarantine: Quarantine, clock: Clock
) -> None:
    quarantine.crashed(steps([POISON]))
    clock.now_s += WINDOW_S - 1
    assert Quarantine(clock).crashed(steps([POISON])) == []
    assert quarantine.crashed(steps([POISON])) == [(REQUEST, POISON)]
    quarantine.crashed(steps([1]))
    clock.now_s += WINDOW_S
    assert not quarantine.state.suspects
    assert quarantine.crashed(steps([1])) == []


def test_those_new_to_the_engine_are_judged_before_those_that_ran(quarantine: Quarantine) -> None:
    quarantine.crashed(steps([POISON, 5], [1, 2]))
    assert quarantine.crashed(steps([POISON, 6], [1, 2, 5])) == [(REQUEST, POISON)]


def test_without_one_that_was_new_twice_all_that_were_in_both_are_quarantined(
    quarantine: Quarantine,
) -> None:
    quarantine.crashed(steps([1], [POISON, 2]))
    assert quarantine.crashed(steps([POISON], [3, 2])) == [(REQUEST, 2), (REQUEST, POISON)]


def test_more_than_a_few_in_both_are_there_because_they_always_are(quarantine: Quarantine) -> None:
    crowd = range(MAX_TOGETHER)
    quarantine.crashed(steps([POISON, *crowd]))
    assert quarantine.crashed(steps([POISON, *crowd])) == []
    assert quarantine.crashed(steps([POISON, 100])) == [(REQUEST, POISON)], "it is alone now"


def test_of_too_many_those_in_most_crashes_stand_out(quarantine: Quarantine) -> None:
    crowd, other = range(MAX_TOGETHER), range(100, 100 + MAX_TOGETHER)
    quarantine.crashed(steps([POISON, *crowd]))
    quarantine.crashed(steps([POISON, *crowd]))
    quarantine.crashed(steps(other))
    assert quarantine.crashed(steps([POISON, *crowd[:3], *other])) == [
        *((REQUEST, number) for number in crowd[:3]),
        (REQUEST, POISON),
    ]


def test_eight_at_once_are_the_most(quarantine: Quarantine) -> None:
    crowd = range(MAX_TOGETHER)
    quarantine.crashed(steps(crowd))
    assert len(quarantine.crashed(steps(crowd))) == MAX_TOGETHER


def test_a_suspect_that_is_answered_to_its_end_is_none_any_more(quarantine: Quarantine) -> None:
    quarantine.crashed(steps([POISON, 1], [2]))
    quarantine.acquit(1)
    quarantine.acquit(2)
    quarantine.acquit(99)
    assert quarantine.state.suspects == {POISON}
    assert quarantine.crashed(steps([POISON, 1], [2])) == [(REQUEST, POISON)]


def test_a_version_that_is_in_two_crashes_of_different_requests_is_quarantined(
    quarantine: Quarantine, clock: Clock
) -> None:
    assert quarantine.crashed(steps([1], versions=[A])) == []
    assert quarantine.crashed(steps([2], [3], versions=[A, B])) == [(VERSION, A)]
    assert quarantine.state.versions == {A: clock.now_s + QUARANTINE_S}
    assert quarantine.holds_version(A) and not quarantine.holds_version(B)
    assert quarantine.counts() == {REQUEST: 0, VERSION: 1}
    clock.now_s += QUARANTINE_S
    assert not quarantine.holds_version(A)


def test_a_request_is_judged_before_its_version(quarantine: Quarantine) -> None:
    quarantine.crashed(steps([POISON], versions=[A]))
    assert quarantine.crashed(steps([POISON], versions=[A])) == [(REQUEST, POISON)]
    assert not quarantine.state.versions
    assert quarantine.crashed(steps([1], versions=[A])) == [], "those two are explained"


@pytest.mark.parametrize("common", [[""], ["", A], [A, B]], ids=["base", "base and one", "two"])
def test_neither_the_base_model_nor_one_of_several_is_quarantined(
    quarantine: Quarantine, common: list[str]
) -> None:
    quarantine.crashed(steps([1], versions=common))
    assert quarantine.crashed(steps([2], versions=common)) == []
    assert quarantine.state.suspects == {1, 2}


def test_a_crash_without_requests_of_anybodys_is_not_remembered(quarantine: Quarantine) -> None:
    assert quarantine.crashed(Steps()) == []
    assert not quarantine._crashes


def test_a_request_in_quarantine_accuses_no_other_again(quarantine: Quarantine) -> None:
    quarantine.crashed(steps([POISON]))
    quarantine.crashed(steps([POISON]))
    assert quarantine.crashed(steps([POISON], [1])) == [], "it came before it was refused there"
    assert quarantine.state.suspects == {1}
    for _ in range(2):
        assert quarantine.crashed(steps([POISON], versions=[A])) == [], "nor its version"


def test_lifted_it_is_free_and_its_crashes_are_forgotten(quarantine: Quarantine) -> None:
    for _ in range(2):
        quarantine.crashed(steps([POISON]))
    for number in (1, 2):
        quarantine.crashed(steps([number], versions=[A]))
    assert not quarantine.lift(REQUEST, 1) and not quarantine.lift(VERSION, B)
    assert quarantine.lift(REQUEST, POISON) and quarantine.lift(VERSION, A)
    assert not quarantine.lift(REQUEST, POISON)
    assert not quarantine.state.requests and not quarantine.state.versions
    assert quarantine.crashed(steps([POISON], versions=[A])) == []


def test_what_is_remembered_is_bounded(
    quarantine: Quarantine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_HELD", 3)
    for number in range(MAX_CRASHES + 1):
        quarantine.crashed(steps([number]))
    assert quarantine.state.suspects == set(range(1, MAX_CRASHES + 1)), "the first is forgotten"
    for number in range(100, 105):
        quarantine.crashed(steps([number]))
        assert quarantine.crashed(steps([number])) == [(REQUEST, number)]
    assert list(quarantine.state.requests) == [102, 103, 104], "the oldest are released"
