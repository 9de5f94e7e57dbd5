"""The verdicts on the edge, from figures that are given."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.bench.edge_report import EdgeReport, EdgeRound, Memory, Point
from tests.bench.machine import Machine

MACHINE = Machine("a processor", 16, 0.0, "0.32.0", "1.85.1", "3.11.7")


def point(workers: int, *rates: int) -> Point:
    """Rounds of 2 s with so many streams a second, of 10 tokens and 1 ms of processor each."""
    rounds = [
        EdgeRound([rate * 2 // workers] * workers, rate * 20, rate * 24, 2.0, rate * 0.002)
        for rate in rates
    ]
    return Point(workers, rounds)


def report(*points: Point, machine: Machine = MACHINE, memory: Memory | None = None) -> EdgeReport:
    return EdgeReport(machine, "GenerateStream", 10, 128, 16, 0.001, 4.0, points, memory)


def test_a_round_is_counted_over_its_workers() -> None:
    measured = EdgeRound([300, 100], tokens=4000, messages=800, seconds=2.0, processor_s=0.4)
    assert (measured.streams_per_s, measured.tokens_per_s) == (200, 2000)
    assert measured.messages_per_s == 400
    assert measured.processor_us == pytest.approx(500)
    assert measured.spread == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("rates", "verdict"),
    [((380, 360, 200), "3.60, met"), ((340, 330, 900), "3.40, missed by 0.10")],
)
def test_the_speed_up_is_that_of_the_medians(rates: tuple[int, ...], verdict: str) -> None:
    text = report(point(1, 100, 20, 300), point(4, *rates)).text()
    assert f"target >= 3.5: {verdict}" in text


def test_too_few_processors_give_no_verdict() -> None:
    few = replace(MACHINE, cores=7)
    text = report(point(1, 100), point(4, 300), machine=few).text()
    assert "target >= 3.5: 3.00, needs 8 processors" in text
    assert "missed" not in text


def test_a_part_of_the_curve_has_no_verdict() -> None:
    assert "target >= 3.5: not measured" in report(point(2, 100)).text()


@pytest.mark.parametrize(
    ("each_kib", "verdict"), [(30, "30.0 KiB, met"), (37.5, "37.5 KiB, missed by 7.5 KiB")]
)
def test_memory_is_told_for_each_stream(each_kib: float, verdict: str) -> None:
    memory = Memory(100, 2, 50 * 2**20, 50 * 2**20 + int(100 * each_kib * 1024))
    assert f"target <= 30 KiB: {verdict}" in report(memory=memory).text()
