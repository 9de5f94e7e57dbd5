"""What becomes of a job whose training process is gone before its time. Pure.

A loss counts one attempt of the job's `max_attempts`, and two if the attempt saved no checkpoint,
so what dies again and again in the same place ends. A device that lacked memory counts none: the
same step is computed in smaller pieces, of which there are few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from store.job_records import JobRecord, JobState
from trainer.events import Checkpoint, FailureReason, JobFailure, Notice, Payload, Progress
from trainer.micro_batch import divisors
from trainer.spec import (
    DEFAULT_MAX_ATTEMPTS,
    MAX_ACCUMULATION,
    GradientCheckpointing,
    Hyperparameters,
    JobSpec,
)

BACKOFF_S, MAX_BACKOFF_S = 1.0, 60.0
"""After which a lost attempt is followed by the next: twice as long with each that counts."""
MAX_TRIED = 8
"""Losses of which the last failure tells."""


class Recovery(Payload):
    """What became of a job's attempts so far."""

    spent: int = 0
    """Of `max_attempts`."""
    tried: tuple[str, ...] = ()
    """How the last MAX_TRIED attempts were lost."""
    resumed_from: Checkpoint | None = None
    """That the newest attempt goes on from; None: it begins at the first step."""
    lost_steps: int = 0
    """That were computed again."""
    retry_time_ns: int = 0
    """Until then a RECOVERING job waits; since the epoch."""
    too_large: tuple[int, ...] = ()
    """Rows at once for which memory did not do, in the order in which they were tried."""


@dataclass(frozen=True, slots=True)
class GoOn:
    """Another attempt follows."""

    recovery: Recovery
    spec: JobSpec | None = None
    """What it is to do; None: the same."""
    notice: Notice | None = None


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The job has FAILED."""

    failure: JobFailure


def recovery_of(job: JobRecord) -> Recovery:
    """As the store has it."""
    return Recovery.model_validate(job.recovery)


def attempts_left(spec: JobSpec, recovery: Recovery) -> int:
    """How many attempts a job may still lose."""
    return max(0, _allowed(spec) - recovery.spent)


def after_loss(
    job: JobRecord, failure: JobFailure, newest: Checkpoint | None, now_ns: int
) -> GoOn | GiveUp:
    """What follows on an attempt that ended with this failure.

    `newest` is the job's newest checkpoint that is whole.
    """
    if failure.reason is FailureReason.OUT_OF_MEMORY:
        return _smaller(job, failure)
    if not failure.retryable:
        return GiveUp(failure)
    spec, before = JobSpec.model_validate(job.effective_spec), recovery_of(job)
    saved = newest is not None and newest.attempt == job.attempt
    spent = before.spent + (1 if saved else 2)
    step = Progress.model_validate(job.progress).step if job.progress else 0
    how = f"attempt {job.attempt} {failure.summary or 'failed'} at step {step}"
    tried = (*before.tried, how if saved else f"{how}, without a checkpoint")[-MAX_TRIED:]
    if spent >= _allowed(spec):
        return GiveUp(_all_lost(failure, spec, tried))
    wait_s = min(BACKOFF_S * 2 ** min(spent - 1, 16), MAX_BACKOFF_S)
    changed = {"spent": spent, "tried": tried, "retry_time_ns": now_ns + round(wait_s * 1e9)}
    return GoOn(before.model_copy(update=changed))


def resumed(
    job: JobRecord, newest: Checkpoint | None
) -> tuple[Recovery, Progress | None, Notice | None]:
    """What the next attempt of a job begins with: from that checkpoint, or from the first step.

    Where the run stands then is None if it never stood elsewhere.
    """
    before = recovery_of(job)
    if job.progress is None:
        return before.model_copy(update={"resumed_from": newest}), None, None
    reached = Progress.model_validate(job.progress)
    step = 0 if newest is None else newest.step
    if newest is not None and newest.progress is not None:
        stands = newest.progress
    else:
        stands = Progress(
            step=step,
            total_steps=reached.total_steps,
            epoch=reached.epoch * step / max(1, reached.step),
            tokens_seen=0,
            trained_tokens=0,
            tokens_per_second=0.0,
        )
    lost = max(0, reached.step - step)
    where = "begins at the first step" if newest is None else f"goes on from step {step}"
    notice = Notice(
        code="RESUMED",
        message=f"attempt {job.attempt + 1} {where}; {lost} steps are computed again",
    )
    changed = {"resumed_from": newest, "lost_steps": before.lost_steps + lost}
    return before.model_copy(update=changed), stands, notice


def too_large(alike: Sequence[JobRecord], spec: JobSpec) -> list[str]:
    """What jobs like one of this spec found out about memory: what did not do, and what did."""
    asked = spec.hyperparameters.micro_batch_size or 1
    for job in alike:
        ran, failed = JobSpec.model_validate(job.effective_spec), recovery_of(job).too_large
        shorter = (ran.data.max_sequence_tokens or 0) <= (spec.data.max_sequence_tokens or 0)
        if failed and asked >= min(failed) and shorter:
            did = ran.hyperparameters.micro_batch_size
            return [
                f"job {job.name!r}, which was like it, ran out of memory with {min(failed)} rows "
                f"at once and trained with {did}: the same would happen again, and takes time"
            ]
    return []


def _allowed(spec: JobSpec) -> int:
    return spec.max_attempts or DEFAULT_MAX_ATTEMPTS  # a job of an earlier release has none


def _all_lost(failure: JobFailure, spec: JobSpec, tried: tuple[str, ...]) -> JobFailure:
    message = (
        f"{failure.message}. Given up, as spec.max_attempts is {_allowed(spec)}: "
        + "; ".join(tried)
    )
    return failure.model_copy(update={"message": message})


def _smaller(job: JobRecord, failure: JobFailure) -> GoOn | GiveUp:
    """The same step in smaller pieces, once the device's memory did not do."""
    spec, before = JobSpec.model_validate(job.effective_spec), recovery_of(job)
    asked = spec.hyperparameters
    assert asked.micro_batch_size
    size = int(failure.metadata.get("micro_batch_size", asked.micro_batch_size))
    too_large = (*before.too_large, size)
    less = None if job.state is JobState.PREPARING else _less(asked, size)
    if less is None:
        return GiveUp(_never_fitted(failure, too_large))
    notice = Notice(
        code="MICRO_BATCH_HALVED",
        message=f"out of memory with {size} rows at once: {_shape(less)}, which computes the same",
    )
    return GoOn(
        before.model_copy(update={"too_large": too_large, "retry_time_ns": 0}),
        spec.model_copy(update={"hyperparameters": less}),
        notice,
    )


def _less(asked: Hyperparameters, size: int) -> Hyperparameters | None:
    """The step with at most half as many rows at once; in the end with activations computed
    twice. None: there is nothing left to save."""
    assert asked.micro_batch_size and asked.gradient_accumulation
    rows = asked.micro_batch_size * asked.gradient_accumulation
    sizes = [
        fewer
        for fewer in divisors(rows)
        if fewer <= size // 2 and rows // fewer <= MAX_ACCUMULATION
    ]
    changed: Mapping[str, object]
    if sizes:
        changed = {"micro_batch_size": sizes[-1], "gradient_accumulation": rows // sizes[-1]}
    elif asked.gradient_checkpointing is GradientCheckpointing.OFF:
        changed = {"gradient_checkpointing": GradientCheckpointing.UNSLOTH}
    else:
        return None
    # What fitted when it was tried did not fit in the end, so it is not tried again.
    return asked.model_copy(update={**changed, "fit_micro_batch": False})


def _shape(less: Hyperparameters) -> str:
    assert less.gradient_checkpointing
    return (
        f"now {less.micro_batch_size} at once and {less.gradient_accumulation} times a step, with "
        f"gradient checkpointing {less.gradient_checkpointing.value}"
    )


def _never_fitted(failure: JobFailure, too_large: tuple[int, ...]) -> JobFailure:
    tried = ", ".join(str(size) for size in too_large)
    message = f"{failure.message}. Tried, in this order: {tried} rows at once"
    metadata = {**failure.metadata, "tried": tried}
    return failure.model_copy(update={"message": message, "metadata": metadata})
