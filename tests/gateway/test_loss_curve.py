"""A loss curve keeps its shape in a bounded number of points."""

from __future__ import annotations

import math
import random

import pytest

from gateway.loss_curve import MAX_POINTS, LossCurve


def curve_of(losses: list[float], begin: int = 1) -> LossCurve:
    curve = LossCurve()
    for step, loss in enumerate(losses, begin):
        curve.add(step, loss)
    return curve


def test_a_short_run_is_kept_as_it_is() -> None:
    assert curve_of([3.0, 2.0, 1.5]).points() == [(1, 3.0), (2, 2.0), (3, 1.5)]


@pytest.mark.parametrize("length", [1, MAX_POINTS, MAX_POINTS + 1, 2 * MAX_POINTS + 2, 5000])
def test_a_long_run_is_thinned_out_to_means_up_to_its_last_step(length: int) -> None:
    dice = random.Random(length)
    losses = [dice.uniform(0, 100) for _ in range(length)]
    points = curve_of(losses).points()
    assert len(points) <= MAX_POINTS
    assert len(points) >= min(len(losses), MAX_POINTS // 2)
    steps = [step for step, _ in points]
    assert steps == sorted(set(steps)) and steps[-1] == len(losses)
    begins = [0, *steps[:-1]]
    for begin, (step, mean) in zip(begins, points, strict=True):
        part = losses[begin:step]
        assert mean == pytest.approx(sum(part) / len(part), abs=1e-9)


def test_what_is_no_number_is_left_out() -> None:
    assert curve_of([1.0, math.nan, math.inf, 2.0]).points() == [(1, 1.0), (4, 2.0)]


def test_a_later_attempt_takes_the_place_of_what_it_trains_again() -> None:
    curve = curve_of([9.0, 8.0, 7.0, 6.0])
    for step, loss in ((3, 5.0), (4, 4.0), (5, 3.0)):
        curve.add(step, loss)
    assert curve.points() == [(1, 9.0), (2, 8.0), (3, 5.0), (4, 4.0), (5, 3.0)]
