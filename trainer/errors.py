"""What training refuses. One line each: what is wrong, what to do.

TrainingError
├── InvalidSpec           fields of a request
├── UnservableAdapter     the server could not serve the result
├── BaseModelUnknown
├── TrainingUnavailable
├── DatasetInvalid
├── CheckpointUnknown
├── InitFromUnusable      the adapter to begin with
├── JobNotPausable
├── JobNotResumable
└── GateRejected
"""

from __future__ import annotations

from collections.abc import Sequence

from store.job_records import JobState
from trainer.events import Publication
from trainer.publisher import Finding
from trainer.report import DatasetReport


class TrainingError(Exception):
    """Base of what training refuses."""


class InvalidSpec(TrainingError, ValueError):
    """Fields of a request are wrong."""

    def __init__(self, *findings: Finding) -> None:
        super().__init__("; ".join(f"{finding.field}: {finding.text}" for finding in findings))
        self.findings = findings


class UnservableAdapter(TrainingError):
    """The running server could not serve what the job would train."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        super().__init__("; ".join(f"{finding.field}: {finding.text}" for finding in findings))
        self.findings = tuple(findings)


class BaseModelUnknown(TrainingError):
    """The gateway serves another base model."""

    def __init__(self, asked: str, served: str) -> None:
        super().__init__(
            f"base model {asked!r} is not served here; leave spec.base_model empty, or name "
            f"{served!r}"
        )
        self.served = served


class TrainingUnavailable(TrainingError):
    """Nothing here can train that. The message says what to do."""


class DatasetInvalid(TrainingError):
    """Too many lines are bad, or none is left to train on."""

    def __init__(self, dataset: str, report: DatasetReport) -> None:
        super().__init__(f"dataset {dataset!r}: " + "; ".join(report.reasons))
        self.dataset = dataset
        self.report = report


class CheckpointUnknown(TrainingError, LookupError):
    """The job has no such checkpoint."""

    def __init__(self, job: str, step: int | None) -> None:
        what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        super().__init__(f"job {job!r} has {what}; list what there is with ListCheckpoints")
        self.job = job
        self.step = "newest" if step is None else str(step)


class InitFromUnusable(TrainingError):
    """What a job is to begin with cannot be trained further."""

    def __init__(self, init_from: str, why: str) -> None:
        super().__init__(f"{init_from}, which spec.init_from names, {why}")
        self.init_from = init_from
        """As `InitFrom.text` has it."""


class JobNotPausable(TrainingError):
    """There is no training to pause."""

    def __init__(self, job: str, state: JobState) -> None:
        super().__init__(
            f"job {job!r} is {state.name}, or to end: there is no training to pause; wait, or "
            "cancel it"
        )
        self.job = job
        self.state = state


class JobNotResumable(TrainingError):
    """The job does not go on."""

    def __init__(self, job: str, state: JobState) -> None:
        super().__init__(
            f"job {job!r} is {state.name}, or to end, and does not go on; create it again"
        )
        self.job = job
        self.state = state


class GateRejected(TrainingError):
    """A checkpoint did not pass the gate."""

    def __init__(self, job: str, step: int, publication: Publication) -> None:
        super().__init__(
            f"step {step} of job {job!r} did not pass the gate: " + "; ".join(publication.reasons)
        )
        self.job = job
        self.step = step
        self.publication = publication
