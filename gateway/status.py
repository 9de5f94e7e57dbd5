"""What the status page shows of a gateway, and its one encoding.

Nothing in it is secret: no prompts, no answers, and of files their names only. Times are seconds
since the epoch, so that a page can tell ages without being sent anything.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter


class Phase(enum.Enum):
    """Where the gateway stands. It is told from what runs, and not kept."""

    STARTING = "starting"
    SERVING = "serving"
    UNAVAILABLE = "unavailable"
    """No shard takes requests: none is up, or those that are, are drained. All calls of `Inference`
    fail."""
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class ResidentStatus:
    """One version that a shard has loaded."""

    adapter: str
    version: int
    load_time_s: float
    load_duration_s: float
    holds: int
    """Requests that run on it."""
    last_use_time_s: float | None
    """When one last began; None: none did."""


@dataclass(frozen=True, slots=True)
class TurnStatus:
    """One version that has a slot of a shard's batch, or waits for one (ADR 12)."""

    adapter: str
    version: int
    state: str
    """A value of `engine.slots.TurnState`."""
    since_s: float
    """When it got into that state."""


@dataclass(frozen=True, slots=True)
class ShardStatus:
    """One engine."""

    name: str
    state: str
    since_s: float
    """When it got into that state."""
    reason: str
    """Why it is in it; empty if that needs no reason."""
    restarts: int
    """Cores that were started in place of one that died."""
    answers: bool
    """Whether the core has told its load, or the next three mean nothing."""
    running: int
    waiting: int
    """Requests that are not in the batch yet, the next ones among them."""
    deferred: int
    """Of those that wait, the ones for which adapters of the batch leave no room."""
    kv_cache_usage: float
    """0 to 1."""
    slots_left: int
    """Fresh client slots; each new worker takes one."""
    batch_slots: int
    """Versions that it computes with at once (`--max-loras`)."""
    turns: Sequence[TurnStatus]
    """Versions that have a slot, those that give theirs back, then those that wait, each the one
    that does so for longest first."""
    turns_held: int
    """Of `turns` and beyond them, how many slots are taken, those on their way back among them."""
    turns_waiting: int
    """Likewise, how many versions wait."""
    places: int
    """Versions that it may have loaded."""
    resident_count: int
    residents: Sequence[ResidentStatus]
    """Those in use first, then those used last."""


@dataclass(frozen=True, slots=True)
class ArmStatus:
    """One version of a split, and how it did in the last minute."""

    version: int
    share: float
    """Of the adapter's traffic, 0 to 1."""
    guard: str
    """What rolls the split back if this version breaches it, in words; empty: it is not guarded."""
    requests: int
    requests_per_s: float
    tokens_per_s: float
    """Of completions, by the end of their requests."""
    error_ratio: float | None
    """Errors of the server; None: no requests."""
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """One adapter that callers may name."""

    name: str
    ready: int
    """Versions that are READY."""
    shards: Sequence[str]
    """Where it is at home now."""
    tokens_per_s: float
    """Of prompts and completions, in the last minute."""
    arms: Sequence[ArmStatus]
    """Largest share first; none: no version answers unasked."""


@dataclass(frozen=True, slots=True)
class JobStatus:
    """One training job."""

    name: str
    adapter: str
    state: str
    is_final: bool
    priority: int
    queue_position: int
    """From 1 for the one that is next; 0: it does not wait for a device."""
    device: str
    time_s: float
    """When it was made, or ended."""
    step: int
    total_steps: int
    epoch: float
    loss: float | None
    eval_loss: float | None
    tokens_per_s: float
    eta_s: float | None
    publication: str
    """What became of its adapter; empty: nothing yet, or nothing to tell."""
    message: str
    """Why it FAILED."""
    curve: Sequence[tuple[int, float]]
    """Loss by step, thinned out; of steps that share a point, their mean."""
    eval_curve: Sequence[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class EventStatus:
    """Something that happened."""

    time_s: float
    subject: str
    """What it happened to: an adapter, a version, a shard."""
    text: str
    is_trouble: bool


@dataclass(frozen=True, slots=True)
class Status:
    """A gateway at one moment."""

    phase: Phase
    model: str
    version: str
    """Of the gateway."""
    start_time_s: float
    workers_wanted: int
    workers: Mapping[str, int]
    """How many are in each state, those without any left out."""
    tokens_per_s: Sequence[float]
    """Of prompts and completions, by the end of their calls, in the last two minutes; the newest
    last."""
    interval_s: float
    """Between two of those."""
    shards: Sequence[ShardStatus]
    adapters: Sequence[AdapterStatus]
    """The busiest."""
    adapter_count: int
    jobs: Sequence[JobStatus]
    """Those that have not ended, newest first, then the newest that have."""
    active_job_count: int
    """Of `jobs` and beyond them, how many have not ended."""
    events: Sequence[EventStatus]
    """Newest first."""


_ADAPTER = TypeAdapter(Status)


def encode(status: Status) -> bytes:
    """JSON in one line. What is no finite number is null, as in a loss that diverged."""
    return _ADAPTER.dump_json(status)
