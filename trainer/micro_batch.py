"""Finds how many rows can be computed at once, by trying.

Rows a step stay what they are, so the run computes the same; it only computes more of it at
once, or keeps activations that it would compute twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from trainer.events import Notice
from trainer.spec import GradientCheckpointing, Hyperparameters

HEADROOM = 0.92
"""Of the limit that may be used: rows differ, and an allocator leaves gaps."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shape:
    """How a step is computed."""

    micro_batch_size: int
    checkpointing: GradientCheckpointing


@dataclass(frozen=True, slots=True)
class Probe:
    """What a shape took, on the longest rows."""

    peak_bytes: int
    rows_per_second: float


Prober = Callable[[Shape], Probe | None]
"""Tries a shape; None: out of memory."""


def fit(asked: Hyperparameters, limit_bytes: int, used_bytes: int, probe: Prober) -> Shape | None:
    """The fastest shape that was found to fit; None: not even one row at once does.

    `used_bytes` are taken whatever the shape. First without gradient checkpointing: where memory
    allows that, a third of the computing is saved, which no number of rows at once does.
    """
    assert asked.micro_batch_size and asked.gradient_accumulation and asked.gradient_checkpointing
    allowed = int(limit_bytes * HEADROOM)
    sizes = divisors(asked.micro_batch_size * asked.gradient_accumulation)
    larger = [size for size in sizes if size >= asked.micro_batch_size]
    smaller = [size for size in reversed(sizes) if size < asked.micro_batch_size]
    for mode in dict.fromkeys((GradientCheckpointing.OFF, asked.gradient_checkpointing)):
        tried = dict(_that_fit(larger, mode, allowed, used_bytes, probe))
        if tried:
            return max(tried, key=lambda shape: tried[shape].rows_per_second)
    mode = asked.gradient_checkpointing
    for size in smaller:
        for shape, _ in _that_fit([size], mode, allowed, used_bytes, probe):
            return shape
    return None


def _that_fit(
    sizes: list[int],
    mode: GradientCheckpointing,
    allowed: int,
    used_bytes: int,
    probe: Prober,
) -> Iterator[tuple[Shape, Probe]]:
    """Try ever larger sizes until one does not fit, or would not by what the last one took."""
    last: tuple[int, int] | None = None
    for size in sizes:
        if last and used_bytes + (last[1] - used_bytes) * size // last[0] > allowed:
            return
        shape = Shape(size, mode)
        found = probe(shape)
        logger.info("%s rows at once, %s: %s", size, mode.value, found or "out of memory")
        if found is None or found.peak_bytes > allowed:
            return
        yield shape, found
        last = size, found.peak_bytes


def fitted(asked: Hyperparameters, shape: Shape) -> tuple[Hyperparameters, tuple[Notice, ...]]:
    """The same step in another shape, and what its owner is told."""
    assert asked.micro_batch_size and asked.gradient_accumulation
    rows = asked.micro_batch_size * asked.gradient_accumulation
    changed = asked.model_copy(
        update={
            "micro_batch_size": shape.micro_batch_size,
            "gradient_accumulation": rows // shape.micro_batch_size,
            "gradient_checkpointing": shape.checkpointing,
        }
    )
    if changed == asked:
        return asked, ()
    notice = Notice(
        code="MICRO_BATCH_FITTED",
        message=f"{shape_text(asked, shape)}: the fastest that fits the memory",
    )
    return changed, (notice,)


def shape_text(asked: Hyperparameters, shape: Shape) -> str:
    """A shape of the step that was asked for, for people."""
    assert asked.micro_batch_size and asked.gradient_accumulation
    times = asked.micro_batch_size * asked.gradient_accumulation // shape.micro_batch_size
    return (
        f"{shape.micro_batch_size} rows at once and {times} times a step, with gradient "
        f"checkpointing {shape.checkpointing.value}"
    )


def divisors(number: int) -> list[int]:
    """Of a number from 1 up, in order."""
    return [size for size in range(1, number + 1) if number % size == 0]
