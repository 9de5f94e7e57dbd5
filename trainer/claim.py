"""What a job that waits for a device says of itself."""

from __future__ import annotations

from dataclasses import dataclass

from store.job_records import JobRecord

MIN_PRIORITY, MAX_PRIORITY = -10, 10


@dataclass(frozen=True, slots=True)
class Claim:
    """A job's claim to a device."""

    uid: str
    tenant: str
    priority: int
    create_time_ns: int
    """Of the job, in nanoseconds since the epoch, as the next."""
    queue_time_ns: int
    """Since when it is queued."""

    @classmethod
    def of(cls, job: JobRecord) -> Claim:
        """The claim of a job that is or was QUEUED."""
        queued_ns = job.queue_time_ns  # a job of an earlier release has none
        queue_time_ns = job.create_time_ns if queued_ns is None else queued_ns
        return cls(job.uid, job.tenant, job.priority, job.create_time_ns, queue_time_ns)
