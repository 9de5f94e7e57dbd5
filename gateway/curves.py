"""The curves of a run, gathered from its events, as a PNG or in a terminal."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_gateway import JobEvent

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of each dot in a Braille character, by row and column; Unicode's table of them."""
BRAILLE = 0x2800
EVALUATION = "◆"
LABEL_COLUMNS = 9
"""Left of the chart, for numbers."""


@dataclass(slots=True)
class Curves:
    """Values by step. What a later attempt tells of a step counts."""

    loss: dict[int, float] = field(default_factory=dict)
    """In nats a trained token, like the next one."""
    eval_loss: dict[int, float] = field(default_factory=dict)
    learning_rate: dict[int, float] = field(default_factory=dict)
    tokens_per_second: dict[int, float] = field(default_factory=dict)

    def add(self, event: JobEvent) -> None:
        """Take in one event; most kinds say nothing here."""
        if event.WhichOneof("payload") != "progress":
            return
        progress = event.progress
        for name in ("loss", "eval_loss", "learning_rate"):
            if progress.HasField(name):
                self._put(name, progress.step, getattr(progress, name))
        if progress.tokens_per_second:
            self._put("tokens_per_second", progress.step, progress.tokens_per_second)

    def _put(self, name: str, step: int, value: float) -> None:
        if math.isfinite(value):
            getattr(self, name)[step] = value

    def save(self, path: Path, title: str) -> None:
        """Draw all curves into a file, by its ending a PNG, SVG or PDF. Blocks.

        Raises:
            ValueError: there is nothing to draw, the ending is none that can be drawn, or the
                file cannot be written.
        """
        # It tells where it keeps its fonts, also while it is imported, which is nobody's concern.
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        # Takes as long to import as all of the command, and one command draws.
        from matplotlib.figure import Figure

        if not self.loss and not self.eval_loss:
            raise ValueError("the job has no step yet, so there is nothing to draw")
        figure = Figure(figsize=(9, 9), layout="constrained")
        above, middle, below = figure.subplots(3, 1, sharex=True)
        above.plot(*_axes(self.loss), label="loss", linewidth=1)
        if self.eval_loss:
            above.plot(*_axes(self.eval_loss), "o-", label="eval loss")
        above.legend()
        above.set(title=title, ylabel="loss (nats a token)")
        middle.plot(*_axes(self.learning_rate), linewidth=1)
        middle.set(ylabel="learning rate")
        below.plot(*_axes(self.tokens_per_second), linewidth=1)
        below.set(ylabel="tokens/s", xlabel="step")
        for axes in (above, middle, below):
            axes.grid(alpha=0.3)
        try:
            figure.savefig(path, dpi=120)
        except OSError as error:
            raise ValueError(f"{path} cannot be written ({error.strerror})") from error

    def chart(self, columns: int, rows: int) -> str:
        """The loss as text of that size, evaluations marked in it; empty without two steps."""
        if len(self.loss) < 2:
            return ""
        width, height = max(columns - LABEL_COLUMNS, 8), max(rows - 1, 3)
        canvas = _Canvas.around(width, height, self)
        canvas.line(self.loss)
        marks = {canvas.cell(step, value) for step, value in self.eval_loss.items()}
        first = str(canvas.begin)
        steps = f"{first}{canvas.end:>{width - len(first)}}"
        return "\n".join([*canvas.lines(marks), " " * LABEL_COLUMNS + steps])


@dataclass(slots=True)
class _Canvas:
    """Dots of Braille characters, two by four each, over the values of a curve."""

    width: int
    height: int
    """Both in characters."""
    begin: int
    end: int
    """First and last step."""
    low: float
    high: float
    bits: dict[tuple[int, int], int] = field(default_factory=dict)
    """Of each character that has dots, by row and column."""

    @classmethod
    def around(cls, width: int, height: int, curves: Curves) -> _Canvas:
        # Evaluations may lie outside of the steps' losses, and belong in the picture.
        steps = [*curves.loss, *curves.eval_loss]
        values = [*curves.loss.values(), *curves.eval_loss.values()]
        low, high = min(values), max(values)
        if low == high:
            low, high = low - 0.5, high + 0.5
        return cls(width, height, min(steps), max(steps), low, high)

    def dot(self, step: int, value: float) -> tuple[int, int]:
        """Row from the top and column, in dots."""
        x = (step - self.begin) / max(self.end - self.begin, 1) * (2 * self.width - 1)
        y = (self.high - value) / (self.high - self.low) * (4 * self.height - 1)
        return round(y), round(x)

    def cell(self, step: int, value: float) -> tuple[int, int]:
        """The character that holds the dot, by row and column."""
        y, x = self.dot(step, value)
        return y // 4, x // 2

    def line(self, curve: Mapping[int, float]) -> None:
        """Draw a curve; of steps that share a column of dots, their mean."""
        shared: dict[int, list[int]] = {}
        for step in sorted(curve):
            y, x = self.dot(step, curve[step])
            shared.setdefault(x, []).append(y)
        previous: tuple[int, int] | None = None
        for x, rows in shared.items():
            point = (round(sum(rows) / len(rows)), x)
            for y, column in _between(previous or point, point):
                key = (y // 4, column // 2)
                self.bits[key] = self.bits.get(key, 0) | DOTS[y % 4][column % 2]
            previous = point

    def lines(self, marks: set[tuple[int, int]]) -> Iterator[str]:
        """Each row with the value that it stands for."""
        for row in range(self.height):
            value = self.high - (self.high - self.low) * row / max(self.height - 1, 1)
            cells = "".join(
                EVALUATION
                if (row, column) in marks
                else chr(BRAILLE + self.bits.get((row, column), 0))
                for column in range(self.width)
            )
            yield f"{value:>{LABEL_COLUMNS - 2}.4g} │{cells}".rstrip(chr(BRAILLE))


def _axes(curve: Mapping[int, float]) -> tuple[list[int], list[float]]:
    steps = sorted(curve)
    return steps, [curve[step] for step in steps]


def _between(start: tuple[int, int], end: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """The dots of a line, both ends included."""
    count = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    for part in range(count + 1):
        yield (
            round(start[0] + (end[0] - start[0]) * part / count),
            round(start[1] + (end[1] - start[1]) * part / count),
        )
