"""A run that was stopped, killed and gone on with learns what an unbroken one does, to the bit."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from engine.models import resolve_model
from tests.trainer.training_run import STARTED, Ended, Running, read, start, write_rows
from trainer.checkpoint import folder_of, steps_of
from trainer.events import WorkerEventKind
from trainer.run_folder import RunFolder
from trainer.spec import Backend

FIELDS: dict[str, Any] = {
    "hyperparameters": {
        "epochs": 2,
        "micro_batch_size": 1,
        "gradient_accumulation": 4,
        "precision": "float32",
        "quantization": "none",
        "warmup_ratio": 0.2,
    },
    "data": {"eval_fraction": 0.1},
}
"""6 steps an epoch, 12 in all; with dropout, evaluations, a schedule, and four micro-batches a
step, so that a stop mostly comes within one."""
TOLD = (
    *("step", "loss", "eval_loss", "learning_rate", "grad_norm", "epoch"),
    *("tokens_seen", "trained_tokens", "total_steps"),
)
"""All that a step or an evaluation tells, but for times and memory."""


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Ends training processes of a test that failed."""
    yield
    while STARTED:
        STARTED.pop().kill()


class Story:
    """The attempts of one job."""

    def __init__(
        self, folder: Path, backend: Backend, tiny: Path, rows: Path, held_out: str = ""
    ) -> None:
        self._folder = folder
        self._begun = (backend, tiny, rows)
        self._held_out = held_out
        self.ended: list[Ended] = []
        self.resumed_from: list[int] = []

    def attempt(self, **fields: Any) -> Running:
        """The next, from the newest checkpoint of those before."""
        backend, tiny, rows = self._begun
        number, resume = len(self.ended) + 1, ""
        if self.ended:
            run = next(ended.run for ended in reversed(self.ended) if steps_of(ended.run))
            self.resumed_from.append(steps_of(run)[-1])
            resume = str(folder_of(run, self.resumed_from[-1]))
        return start(
            self._folder / str(number),
            tiny,
            rows,
            {**FIELDS, **fields},
            backend=backend,
            eval_rows=self._held_out,
            resume=resume,
            attempt=number,
        )

    def wait(self, running: Running, code: int) -> None:
        ended = running.wait()
        assert ended.code == code, ended.log[-3000:]
        self.ended.append(ended)


def told(ended: Ended) -> list[tuple[Any, ...]]:
    progress = ended.payloads(WorkerEventKind.PROGRESS)
    return [tuple(payload[name] for name in TOLD) for payload in progress]


def has_loaded(run: RunFolder) -> bool:
    return '"loaded"' in read(run.events)


def weights(run: RunFolder) -> dict[str, Any]:
    last = folder_of(run, steps_of(run)[-1])
    return dict(load_file(last / "adapter" / "adapter_model.safetensors"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", list(Backend))
def test_resume_equals_an_unbroken_run(backend: Backend, tmp_path: Path) -> None:
    tiny = resolve_model("tiny", tmp_path / "models")
    rows = write_rows(tmp_path / "rows")
    unbroken = Story(tmp_path / "unbroken", backend, tiny, rows)
    unbroken.wait(unbroken.attempt(), 0)
    expected = told(unbroken.ended[0])
    assert [entry[0] for entry in expected if entry[1] is not None] == list(range(1, 13))

    broken = Story(tmp_path / "broken", backend, tiny, rows)
    running = broken.attempt()
    running.wait_for_step(2)
    running.stop(save=True)  # within an epoch, and mostly within a step
    broken.wait(running, 3)
    # It saves within the epoch by time, too, which the unbroken run does not.
    running = broken.attempt(checkpoint_interval_s=1.0)
    running.wait_for_step(9)
    running.kill()
    broken.wait(running, -9)
    broken.wait(broken.attempt(), 0)

    within, killed = broken.resumed_from
    assert 2 <= within < 12 and within <= killed < 12
    for ended, after in zip(broken.ended, [0, within, killed], strict=True):
        steps = told(ended)
        begin = next(at for at, entry in enumerate(expected) if entry[0] == after + 1)
        assert steps == expected[begin : begin + len(steps)]
    assert told(broken.ended[-1])[-1] == expected[-1]
    ours, theirs = weights(broken.ended[-1].run), weights(unbroken.ended[0].run)
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
    print(
        f"{backend.value}: stopped at step {within}, killed after 9, gone on from {killed}: "
        f"{len(expected)} losses and {len(ours)} tensors are the same to the bit"
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", list(Backend))
def test_resume_equals_one_that_was_not_stopped_in_an_evaluation(
    backend: Backend, tmp_path: Path
) -> None:
    tiny = resolve_model("tiny", tmp_path / "models")
    rows = write_rows(tmp_path / "rows")
    # So many that a stop comes within.
    held_out = str(write_rows(tmp_path / "held-out", count=600, seed=2, longest=100))
    unbroken = Story(tmp_path / "unbroken", backend, tiny, rows, held_out)
    unbroken.wait(unbroken.attempt(), 0)
    expected = told(unbroken.ended[0])
    assert [entry[0] for entry in expected] == [*range(1, 7), 6, *range(7, 13), 12]

    broken = Story(tmp_path / "broken", backend, tiny, rows, held_out)
    for step in (6, None, 12, None):
        running = broken.attempt()
        if step is None:  # in the evaluation that it owes, or in the first step after it
            running.wait_until(functools.partial(has_loaded, running.run))
        else:
            running.wait_for_step(step)
        running.stop(save=True)
        broken.wait(running, 3)
    broken.wait(broken.attempt(), 0)

    assert broken.resumed_from == [6, 6, 12, 12]
    # Those that learned nothing saved nothing.
    assert [len(ended.payloads(WorkerEventKind.CHECKPOINT)) for ended in broken.ended] == [
        *(1, 0, 1, 0, 1)
    ]
    assert [entry for ended in broken.ended for entry in told(ended)] == expected
    ours, theirs = weights(broken.ended[-1].run), weights(unbroken.ended[0].run)
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    last, unbroken_last = (
        story.ended[-1].payloads(WorkerEventKind.CHECKPOINT)[-1] for story in (broken, unbroken)
    )
    assert last["eval_loss"] == unbroken_last["eval_loss"] and last["final"]
    print(f"{backend.value}: stopped in evaluations after 6 and 12, and in those that were owed")
