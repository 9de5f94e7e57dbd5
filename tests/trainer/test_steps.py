"""How many steps a run has is one number, for the estimate and for the training process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.trainer.training_run import resolved
from trainer.spec import Backend
from trainer.steps import epochs_of, held_out_count, steps_of, training_rows


@pytest.mark.parametrize(
    ("asked", "rows", "steps", "epochs"),
    [
        ({}, 950, 3 * 119, 3.0),  # 475 micro-batches of 2, 4 a step
        ({}, 1, 3, 3.0),
        ({}, 0, 0, 0.0),
        ({"max_steps": 10}, 80, 10, 1.0),
        ({"max_steps": 1_000_000}, 80, 30, 3.0),  # ends a run earlier, and never later
        ({"epochs": 0.5}, 80, 5, 0.5),
        ({"epochs": 0.01}, 80, 1, 0.01),
    ],
)
def test_a_run_ends_with_its_epochs_or_its_steps_whichever_is_first(
    asked: dict[str, object], rows: int, steps: int, epochs: float
) -> None:
    spec = resolved({"hyperparameters": asked}, Backend.PEFT)
    assert (steps_of(spec, rows), epochs_of(spec, rows)) == (steps, epochs)


@pytest.mark.parametrize(
    ("rows", "fraction", "count"),
    [(100, 0.05, 5), (20, 0.04, 1), (19, 0.05, 0), (100, 0.0, 0), (10, 0.5, 5), (20, 0.001, 1)],
)
def test_a_fraction_of_twenty_rows_or_more_is_at_least_one(
    rows: int, fraction: float, count: int
) -> None:
    assert held_out_count(rows, fraction) == count
    spec = resolved({"data": {"eval_fraction": fraction}}, Backend.PEFT)
    assert training_rows(spec, rows) == rows - count


def test_an_eval_dataset_leaves_all_rows_to_train_on() -> None:
    assert training_rows(resolved({"data": {"eval_dataset": "e"}}, Backend.PEFT), 1000) == 1000


def test_the_host_counts_steps_without_torch() -> None:
    code = "import sys, trainer.estimate, trainer.admission; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
