"""Curves of a run as text."""

from __future__ import annotations

import pytest

from gateway.curves import EVALUATION, Curves


def test_a_chart_falls_with_the_loss_and_marks_evaluations() -> None:
    curves = Curves(loss={1: 4.0, 2: 3.0, 3: 2.0, 4: 1.0}, eval_loss={4: 5.0})
    *lines, steps = curves.chart(40, 9).splitlines()
    assert len(lines) == 8
    assert all(len(line) <= 40 for line in lines)
    assert lines[0].startswith("      5 │") and lines[0].endswith(EVALUATION)
    assert lines[-1].startswith("      1 │")
    assert steps.split() == ["1", "4"]
    ends = [len(line) for line in lines[2:]]
    assert ends == sorted(ends)
    assert ends[0] < ends[-1]


@pytest.mark.parametrize("loss", [{}, {1: 2.0}])
def test_a_chart_needs_two_steps(loss: dict[int, float]) -> None:
    assert Curves(loss=loss).chart(40, 9) == ""


def test_a_flat_curve_is_a_line() -> None:
    *lines, _ = Curves(loss={1: 2.0, 9: 2.0}).chart(30, 6).splitlines()
    assert sum(len(line) > 9 for line in lines) == 1
