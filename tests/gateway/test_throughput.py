"""Tokens a second, by interval and by adapter."""

from __future__ import annotations

from engine.ring import AdapterKey
from gateway.throughput import INTERVAL_S, KEPT, LATELY, Throughput

SQL = AdapterKey("default", "sql")
MINUTE_S = LATELY * INTERVAL_S


class Clock:
    """Stands where a test puts it."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_intervals_are_told_when_they_are_over() -> None:
    clock = Clock()
    throughput = Throughput(clock)
    throughput.record({SQL: 30, None: 10})
    assert throughput.per_s() == [0.0] * (KEPT - 1), "the interval that runs is not whole yet"
    clock.now_s += INTERVAL_S
    throughput.record({SQL: 1})
    assert throughput.per_s()[-2:] == [0.0, 40 / INTERVAL_S]
    clock.now_s += 2 * INTERVAL_S
    assert throughput.per_s()[-3:] == [40 / INTERVAL_S, 1 / INTERVAL_S, 0.0]


def test_rates_of_adapters_are_of_the_last_minute() -> None:
    clock = Clock()
    throughput = Throughput(clock)
    throughput.record({SQL: 60, None: 120})
    assert throughput.by_adapter() == {SQL: 60 / MINUTE_S, None: 120 / MINUTE_S}
    clock.now_s += MINUTE_S - INTERVAL_S
    assert throughput.by_adapter()[SQL] == 60 / MINUTE_S
    clock.now_s += INTERVAL_S
    assert throughput.by_adapter() == {}


def test_a_long_silence_is_forgotten_and_costs_no_more_than_what_is_kept() -> None:
    clock = Clock()
    throughput = Throughput(clock)
    throughput.record({SQL: 60})
    clock.now_s += 1e9
    assert set(throughput.per_s()) == {0.0}
    assert len(throughput.per_s()) == KEPT - 1
