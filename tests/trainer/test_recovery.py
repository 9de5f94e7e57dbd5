"""What follows on a lost attempt, decided without a process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from store.job_records import JobRecord, JobState
from tests.gateway.error_samples import JOB
from tests.trainer.training_run import resolved
from trainer import recovery
from trainer.events import Checkpoint, FailureReason, JobFailure, Progress
from trainer.failure import out_of_memory
from trainer.ingest import as_json
from trainer.recovery import GiveUp, GoOn, Recovery, after_loss, attempts_left, resumed
from trainer.spec import GradientCheckpointing, JobSpec

NOW_NS = 5_000_000_000
LOST = JobFailure(
    reason=FailureReason.TRAINER_LOST, message="it died", retryable=True, summary="died"
)
STANDS = Progress(
    step=6, total_steps=12, epoch=2.0, tokens_seen=60, trained_tokens=30, tokens_per_second=1.0
)


def job(
    before: Recovery | None = None, *, step: int = 9, attempt: int = 1, **fields: Any
) -> JobRecord:
    spec = resolved(fields)
    return replace(
        JOB,
        state=JobState.RUNNING,
        attempt=attempt,
        effective_spec=as_json(spec),
        progress=as_json(STANDS.model_copy(update={"step": step})),
        recovery=as_json(before or Recovery()),
    )


def checkpoint(attempt: int, step: int = 6) -> Checkpoint:
    return Checkpoint(
        step=step,
        folder=f"attempts/{attempt}/checkpoints/checkpoint-{step}",
        size_bytes=1,
        sha256="s",
        create_time_ns=1,
        attempt=attempt,
        progress=STANDS.model_copy(update={"step": step}),
    )


def goes_on(found: GoOn | GiveUp) -> GoOn:
    assert isinstance(found, GoOn), found
    return found


@pytest.mark.parametrize(
    ("newest", "spent"),
    [(checkpoint(2), 1), (checkpoint(1), 2), (None, 2)],
    ids=["it saved", "an earlier one saved", "none saved"],
)
def test_an_attempt_that_saved_nothing_counts_double(newest: Checkpoint | None, spent: int) -> None:
    found = goes_on(after_loss(job(attempt=2), LOST, newest, NOW_NS))
    assert found.recovery.spent == spent
    assert attempts_left(resolved({}), found.recovery) == 3 - spent


def test_it_waits_twice_as_long_each_time_up_to_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "BACKOFF_S", 1.0)
    waits, before = [], Recovery()
    for _ in range(10):
        found = goes_on(after_loss(job(before, max_attempts=100), LOST, checkpoint(1), NOW_NS))
        before = found.recovery
        waits.append((before.retry_time_ns - NOW_NS) / 1e9)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]


def test_the_last_loss_tells_all_that_was_tried() -> None:
    before: Recovery = Recovery()
    for attempt in (1, 2):
        lost = job(before, attempt=attempt, step=3 * attempt)
        before = goes_on(after_loss(lost, LOST, checkpoint(attempt), NOW_NS)).recovery
    found = after_loss(job(before, attempt=3), LOST, checkpoint(3), NOW_NS)
    assert isinstance(found, GiveUp)
    assert found.failure.message == (
        "it died. Given up, as spec.max_attempts is 3: attempt 1 died at step 3; attempt 2 died "
        "at step 6; attempt 3 died at step 9"
    )


def test_what_is_not_retryable_is_the_end() -> None:
    failure = LOST.model_copy(update={"retryable": False})
    assert after_loss(job(), failure, checkpoint(1), NOW_NS) == GiveUp(failure)


def test_a_job_of_a_release_that_knew_no_attempts_has_the_default() -> None:
    old = job()
    spec = {name: value for name, value in old.effective_spec.items() if name != "max_attempts"}
    old = replace(old, effective_spec=spec, recovery={})
    assert goes_on(after_loss(old, LOST, None, NOW_NS)).recovery.spent == 2


# --- memory


def test_memory_that_does_not_do_halves_what_is_computed_at_once() -> None:
    before, spec = Recovery(spent=1), resolved({"hyperparameters": {"micro_batch_size": 8}})
    shapes = [(8, 4)]
    while True:
        lost = replace(job(before), effective_spec=as_json(spec))
        found = after_loss(lost, out_of_memory(spec), None, NOW_NS)
        if isinstance(found, GiveUp):
            break
        assert found.spec is not None and found.notice is not None
        before, spec = found.recovery, found.spec
        asked = spec.hyperparameters
        assert asked.micro_batch_size and asked.gradient_accumulation
        assert asked.fit_micro_batch is False
        assert found.recovery.spent == 1, "it is counted apart"
        assert found.recovery.retry_time_ns == 0
        shapes.append((asked.micro_batch_size, asked.gradient_accumulation))
    assert shapes == [(8, 4), (4, 8), (2, 16), (1, 32), (1, 32)]
    assert spec.hyperparameters.gradient_checkpointing is GradientCheckpointing.UNSLOTH
    assert found.failure.reason is FailureReason.OUT_OF_MEMORY
    assert found.failure.metadata["tried"] == "8, 4, 2, 1, 1"
    assert "Tried, in this order: 8, 4, 2, 1, 1 rows at once" in found.failure.message
    assert "max_sequence_tokens" in found.failure.message


@pytest.mark.parametrize(
    ("micro", "accumulation", "then"), [(3, 4, (1, 12)), (6, 1, (3, 2)), (5, 2, (2, 5))]
)
def test_rows_a_step_stay_what_they_are(
    micro: int, accumulation: int, then: tuple[int, int]
) -> None:
    asked = {"micro_batch_size": micro, "gradient_accumulation": accumulation}
    spec = resolved({"hyperparameters": asked})
    lost = replace(job(), effective_spec=as_json(spec))
    found = goes_on(after_loss(lost, out_of_memory(spec), None, NOW_NS))
    assert found.spec is not None
    less = found.spec.hyperparameters
    assert (less.micro_batch_size, less.gradient_accumulation) == then


def test_a_model_that_does_not_fit_as_it_is_loaded_is_not_tried_in_pieces() -> None:
    loading = replace(job(), state=JobState.PREPARING)
    spec = JobSpec.model_validate(loading.effective_spec)
    found = after_loss(loading, out_of_memory(spec), None, NOW_NS)
    assert isinstance(found, GiveUp) and found.failure.metadata["tried"] == "2"


# --- the next attempt


def test_the_next_attempt_stands_where_its_checkpoint_does() -> None:
    found, stands, notice = resumed(job(Recovery(lost_steps=4)), checkpoint(1))
    assert (found.lost_steps, found.resumed_from) == (7, checkpoint(1))
    assert stands is not None and (stands.step, stands.tokens_seen) == (6, 60)
    assert notice is not None and "attempt 2 goes on from step 6; 3 steps" in notice.message


def test_without_a_checkpoint_it_stands_at_the_begin() -> None:
    found, stands, notice = resumed(job(Recovery(resumed_from=checkpoint(1))), None)
    assert (found.lost_steps, found.resumed_from) == (9, None)
    assert stands is not None and (stands.step, stands.total_steps, stands.epoch) == (0, 12, 0.0)
    assert notice is not None and "begins at the first step" in notice.message


def test_the_first_attempt_has_nothing_to_go_on_from() -> None:
    first = replace(job(), progress=None, attempt=0)
    assert resumed(first, None) == (Recovery(), None, None)
