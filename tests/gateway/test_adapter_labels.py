"""Few adapters are named, by their traffic, and never more than so many in all."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.ring import AdapterKey
from gateway import adapter_labels
from gateway.adapter_labels import OTHER_LABEL, AdapterLabels, AdapterNames, Dropped

MOST, MOST_EVER = 4, 8
LEAST = 0.01


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_labels, "MAX_NAMED", MOST)
    monkeypatch.setattr(adapter_labels, "MAX_NAMES_GIVEN", MOST_EVER)
    monkeypatch.setattr(adapter_labels, "LEAST_SHARE", LEAST)


def keys(letters: Iterable[str]) -> list[AdapterKey]:
    return [AdapterKey("acme", letter) for letter in letters]


def shares(**percent: float) -> dict[AdapterKey, float]:
    ordered = sorted(percent.items(), key=lambda item: -item[1])
    return {AdapterKey("acme", name): each / 100 for name, each in ordered}


def names_of(names: AdapterNames) -> str:
    return "".join(sorted(key.adapter for key in names.named))


def with_all(letters: str) -> AdapterNames:
    names = AdapterNames()
    names.show_all(keys(letters))
    return names


def test_a_label_is_the_name_of_an_adapter_that_is_named() -> None:
    labels = AdapterLabels(frozenset(keys("a")))
    assert labels.of(AdapterKey("acme", "a")) == "a"
    assert labels.of(AdapterKey("acme", "b")) == OTHER_LABEL
    assert labels.of(AdapterKey("other", "a")) == OTHER_LABEL, "of another tenant"


def test_with_room_for_all_each_is_named_before_its_first_call() -> None:
    names = with_all("ab")
    assert names_of(names) == "ab"
    assert names.show(AdapterKey("acme", "c"), usable=True)
    assert not names.show(AdapterKey("acme", "c"), usable=True), "it is not news"
    assert names_of(names) == "abc"
    assert names.rank(shares(a=99)) == []
    assert names_of(names) == "abc", "without a call"


def test_one_more_than_there_are_names_takes_none_away() -> None:
    names = with_all("abcd")
    assert not names.show(AdapterKey("acme", "e"), usable=True)
    assert names_of(names) == "abcd"


def test_with_more_adapters_than_names_the_traffic_decides_and_not_the_order() -> None:
    names = with_all("abcdefgh")
    assert names_of(names) == "", "nobody knows yet who is called"
    dropped = names.rank(shares(a=1, b=1.5, c=2, d=30, e=20, f=15, g=10))
    assert names_of(names) == "defg"
    assert dropped == [Dropped.RANK] * 3


def test_a_name_stays_until_another_clearly_outranks_it() -> None:
    names = with_all("abcdefgh")
    names.rank(shares(a=40, b=30, c=20, d=10))
    names.rank(shares(a=30, b=20, c=15, d=10, e=19))
    assert names_of(names) == "abcd", "not twice as much"
    names.rank(shares(a=30, b=20, c=15, d=8, e=19))
    assert names_of(names) == "abce"
    names.rank(shares(a=30, b=20, c=15, d=19, e=10))
    assert names_of(names) == "abce", "and so does its successor"


def test_many_that_have_next_to_nothing_do_not_take_turns() -> None:
    names = with_all("abcdefgh")
    names.rank(shares(a=0.4, b=0.4, c=0.4, d=0.4))
    names.rank(shares(e=0.9, f=0.9))
    assert names_of(names) == "abcd"
    names.rank(shares(e=1.1, f=0.9))
    assert "e" in names_of(names) and "f" not in names_of(names)


def test_an_adapter_that_is_gone_leaves_its_name_to_another() -> None:
    names = with_all("abcde")
    names.rank(shares(a=40, b=30, c=20, d=10, e=1))
    assert names.show(AdapterKey("acme", "a"), usable=False)
    assert names_of(names) == "bcd"
    names.rank(shares(a=40, b=30, c=20, d=10))
    assert names_of(names) == "bcde", "there are no more than names now, called or not"
    assert names.rank(shares(a=40)) == [], "what is gone is not called"


def test_names_are_given_so_often_and_no_more() -> None:
    names = with_all("abcdefghijkl")
    names.rank(shares(a=40, b=30, c=20, d=10))
    names.rank(shares(e=40, f=30, g=20, h=10))
    assert (names_of(names), names.given) == ("efgh", MOST_EVER)
    assert names.rank(shares(i=90, e=1, f=1, g=1, h=1)) == [Dropped.SPENT]
    assert names_of(names) == "efgh"
    names.rank(shares(i=50, a=40, e=1, f=1, g=1, h=1))
    assert "a" in names_of(names), "its series are there already"
    names.show(AdapterKey("acme", "m"), usable=True)
    assert "m" not in names_of(names)


def test_an_adapter_that_is_not_named_is_counted_once_while_it_is_called() -> None:
    names = with_all("abcdef")
    four = {"a": 30, "b": 20, "c": 15, "d": 10}
    assert names.rank(shares(**four, e=5)) == [Dropped.RANK]
    assert names.rank(shares(**four, e=6)) == []
    assert names.rank(shares(**four, e=6, f=1)) == [Dropped.RANK]
    names.rank(shares(**four))
    assert names.rank(shares(**four, e=5)) == [Dropped.RANK], "it was gone for a while"


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False))
def test_whatever_happens_names_are_few(draw: random.Random) -> None:
    names = AdapterNames()
    ever: set[AdapterKey] = set()
    pool = keys(f"{number}" for number in range(30))
    usable: set[AdapterKey] = set()
    for _ in range(60):
        key = draw.choice(pool)
        if draw.random() < 0.5:
            is_usable = draw.random() < 0.6
            (usable.add if is_usable else usable.discard)(key)
            names.show(key, is_usable)
        else:
            called = draw.sample(pool, draw.randrange(12))
            traffic = sorted((draw.random() for _ in called), reverse=True)
            names.rank(dict(zip(called, traffic, strict=True)))
        ever |= names.named
        assert len(names.named) <= MOST
        assert names.named <= usable
        assert len(ever) == names.given <= MOST_EVER
