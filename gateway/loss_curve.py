"""The loss of a run by step, in a bounded number of points."""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_POINTS = 120


@dataclass(slots=True)
class _Point:
    step: int
    """The last of those that it stands for."""
    total: float
    count: int


class LossCurve:
    """Keeps means of as many steps as it takes to stay below MAX_POINTS points."""

    def __init__(self) -> None:
        self._stride = 1
        self._points: dict[int, _Point] = {}
        """By step divided by the stride, in ascending order."""
        self._last = -1

    def add(self, step: int, loss: float) -> None:
        """Take in the loss of a step. Told again, a later attempt began before it: what had come
        from there on counts no more."""
        if not math.isfinite(loss):
            return
        if step <= self._last:
            begin = step // self._stride
            self._points = {key: point for key, point in self._points.items() if key < begin}
        self._last = step
        self._put(step, loss, 1)
        if len(self._points) > MAX_POINTS:
            self._stride *= 2
            points, self._points = self._points, {}
            for point in points.values():
                self._put(point.step, point.total, point.count)

    def points(self) -> list[tuple[int, float]]:
        """Steps and losses, in ascending order."""
        return [(point.step, point.total / point.count) for point in self._points.values()]

    def _put(self, step: int, total: float, count: int) -> None:
        point = self._points.setdefault(step // self._stride, _Point(step, 0.0, 0))
        point.step = step
        point.total += total
        point.count += count
