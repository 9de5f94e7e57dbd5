"""Figures measured in turns, so that what else the machine does falls on all of them."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path


class Turns:
    """Named measurements, each run once a round, until the rounds or the time are over."""

    def __init__(self, deadline_s: float) -> None:
        """`deadline_s` is of `time.monotonic`: no measurement begins after it."""
        self.figures: dict[str, list[float]] = {}
        """Of each measurement, by its name."""
        self._deadline_s = deadline_s
        self._failed: set[str] = set()

    def run(self, cells: dict[str, Callable[[], float]], rounds: int) -> None:
        """Measure all; one that fails is told, and left out from then on."""
        for number in range(rounds):
            names = list(cells)
            # Neither always follows the other.
            for name in names if number % 2 == 0 else reversed(names):
                if name in self._failed:
                    continue
                if self.over:
                    say(f"time is up in round {number + 1}")
                    return
                try:
                    figure = cells[name]()
                except Exception as error:
                    self._failed.add(name)
                    say(f"FAILED {name}: {type(error).__name__}: {error}")
                    continue
                self.figures.setdefault(name, []).append(figure)
                say(f"round {number + 1}: {name}: {figure:,.0f} tok/s")

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self._deadline_s

    def median(self, name: str) -> float | None:
        """Of a measurement; None if there is none."""
        found = self.figures.get(name)
        return statistics.median(found) if found else None

    def best(self, *names: str) -> float | None:
        """The highest median of these."""
        return max(filter(None, map(self.median, names)), default=None)

    def table(self) -> None:
        """Print all medians."""
        width = max(map(len, self.figures), default=0)
        for name, found in self.figures.items():
            spread = f"({min(found):,.0f} to {max(found):,.0f}, {len(found)} rounds)"
            say(f"{name:<{width}}  {statistics.median(found):>9,.0f} tok/s  {spread}")

    def ratio(self, what: str, over: float | None, under: float | None, target: float = 0) -> None:
        """Print a ratio, and whether it reaches its target."""
        if not over or not under:
            say(f"{what}: not measured")
            return
        verdict = ""
        if target:
            found = over / under
            verdict = f", target {target:.2f}: " + (
                "met" if found >= target else f"missed by {target - found:.3f}"
            )
        say(f"{what}: {over / under:.3f}{verdict}")

    def write(self, path: Path | None) -> None:
        """All figures as JSON."""
        if path is not None:
            path.write_text(json.dumps(self.figures, indent=1) + "\n")


_BEGUN_S = time.monotonic()


def say(what: str) -> None:
    """Print at once, with the seconds since the start."""
    print(f"[{time.monotonic() - _BEGUN_S:5.0f} s] {what}", flush=True)
