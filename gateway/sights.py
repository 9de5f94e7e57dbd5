"""What there is to see of a control plane. Its owner hands it to those who only look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.ledger import Ledger
from gateway.arms import Arms
from gateway.processes import Processes
from gateway.shards import Shards
from gateway.throughput import Throughput
from store.job_records import JobRecord
from store.jobs import JobStore
from store.registry import Registry


@dataclass(frozen=True, slots=True)
class Sights:
    """Parts of a control plane, to be read."""

    ledger: Ledger
    registry: Registry
    jobs: JobStore
    arms: Arms
    throughput: Throughput
    processes: Processes
    shards: Shards | None
    """None until the cores run."""
    queue_position: Callable[[JobRecord], int]
    """From 1 for the job that is next; 0 for one that is not QUEUED."""
