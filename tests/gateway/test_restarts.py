"""One death costs no wait; a crash loop costs more and more, until it has ended."""

from __future__ import annotations

import pytest

from gateway.restarts import LONGEST_DELAY_S, WITHIN_S, Restarts


class Clock:
    """Seconds, as a test says."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def deaths(restarts: Restarts, clock: Clock, count: int, every_s: float) -> list[float]:
    """The delays after so many deaths, the first one now."""
    delays = []
    for _ in range(count):
        delays.append(restarts.died())
        clock.now_s += every_s
    return delays


def test_the_third_death_in_five_minutes_opens_the_breaker(clock: Clock) -> None:
    restarts = Restarts(clock)
    assert deaths(restarts, clock, 2, 10.0) == [0.0, 0.0]
    assert not restarts.breaker_open
    assert restarts.died() == 1.0 and restarts.breaker_open


def test_the_delay_doubles_up_to_a_minute(clock: Clock) -> None:
    delays = deaths(Restarts(clock), clock, 12, 40.0)
    assert delays == [0.0, 0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, *[LONGEST_DELAY_S] * 4]


def test_deaths_that_are_far_apart_open_nothing(clock: Clock) -> None:
    assert set(deaths(Restarts(clock), clock, 20, WITHIN_S / 2)) == {0.0}


def test_a_shard_that_lived_for_long_begins_anew(clock: Clock) -> None:
    restarts = Restarts(clock)
    deaths(restarts, clock, 6, 1.0)
    assert restarts.breaker_open
    restarts.up()
    clock.now_s += WITHIN_S
    assert restarts.died() == 0.0 and not restarts.breaker_open
    assert restarts.died() == 0.0
    assert restarts.died() == 1.0


def test_long_loads_between_deaths_do_not_close_the_breaker(clock: Clock) -> None:
    restarts = Restarts(clock)
    deaths(restarts, clock, 3, 1.0)
    for _ in range(5):
        clock.now_s += 2 * WITHIN_S  # it waits, and a large model loads
        restarts.up()
        clock.now_s += 1.0
        assert restarts.died() > 1.0


def test_a_core_that_was_renewed_goes_on_with_the_life_of_the_one_before(clock: Clock) -> None:
    restarts = Restarts(clock)
    deaths(restarts, clock, 6, 1.0)
    restarts.up()
    clock.now_s += WITHIN_S - 1
    restarts.up()
    clock.now_s += 1
    assert restarts.died() == 0.0 and not restarts.breaker_open
