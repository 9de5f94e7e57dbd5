"""The failure of a job that the gateway does not run, from what refused it."""

from __future__ import annotations

from trainer.errors import (
    DatasetInvalid,
    InitFromUnusable,
    TrainingError,
    TrainingUnavailable,
    UnservableAdapter,
)
from trainer.events import FailureReason, JobFailure


def refused(error: TrainingError, attempt: int) -> JobFailure:
    """What its owner is told."""
    match error:
        case DatasetInvalid():
            reason = FailureReason.DATASET_INVALID
            metadata = {
                "dataset": error.dataset,
                "total_lines": str(error.report.total_lines),
                "bad_lines": str(error.report.bad_lines),
            }
        case InitFromUnusable():
            reason = FailureReason.INIT_FROM_UNUSABLE
            metadata = {"init_from": error.init_from}
        case TrainingUnavailable():
            reason, metadata = FailureReason.TRAINING_UNAVAILABLE, {}
        case UnservableAdapter():
            reason = FailureReason.UNSERVABLE_ADAPTER
            metadata = {"field": error.findings[0].field}
        case _:
            reason, metadata = FailureReason.TRAINER_FAILED, {"attempt": str(attempt)}
    return JobFailure(reason=reason, message=str(error), metadata=metadata)


def unforeseen(error: Exception, attempt: int) -> JobFailure:
    """What its owner is told of an error of ours."""
    return JobFailure(
        reason=FailureReason.TRAINER_FAILED,
        message=f"the gateway failed to run it ({type(error).__name__}), and logged why: "
        "tell the operator",
        metadata={"attempt": str(attempt)},
    )
