"""How many steps a run has, and how many rows it holds out. Pure, and without torch."""

from __future__ import annotations

import math

from trainer.spec import JobSpec

FEWEST_ROWS_SPLIT = 20
"""From so many on, a fraction that is too small for a row holds out one."""


def held_out_count(rows: int, fraction: float) -> int:
    """How many rows a fraction holds out."""
    count = int(rows * fraction)
    if fraction and not count and rows >= FEWEST_ROWS_SPLIT:
        return 1
    return count


def training_rows(spec: JobSpec, rows: int) -> int:
    """How many of a dataset's rows are left to train on."""
    data = spec.data
    return rows if data.eval_dataset else rows - held_out_count(rows, data.eval_fraction or 0.0)


def steps_of(spec: JobSpec, rows: int) -> int:
    """Optimizer steps of a run over so many rows."""
    asked = spec.hyperparameters
    assert asked.epochs
    by_epochs = math.ceil(asked.epochs * an_epoch(spec, rows))
    return min(by_epochs, asked.max_steps or by_epochs)


def epochs_of(spec: JobSpec, rows: int) -> float:
    """How often a run over so many rows sees them."""
    asked = spec.hyperparameters
    assert asked.epochs
    steps = an_epoch(spec, rows)
    return min(asked.epochs, steps_of(spec, rows) / steps) if steps else 0.0


def an_epoch(spec: JobSpec, rows: int) -> int:
    """Optimizer steps of one epoch over so many rows."""
    asked = spec.hyperparameters
    assert asked.micro_batch_size and asked.gradient_accumulation
    return math.ceil(rows / (asked.micro_batch_size * asked.gradient_accumulation))
