"""What the registry keeps: adapters, their versions and splits, and the trail of changes.

VALIDATING -> READY -> DRAINING -> DELETED
          \\-> FAILED ------------/
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
"""Names of tenants and adapters, as the contract has them."""
DIGEST = re.compile(r"[0-9a-f]{64}")
"""Lower-case hex SHA-256."""


class VersionState(enum.Enum):
    """Where a version stands. The values are stored; never change one."""

    VALIDATING = "validating"
    READY = "ready"
    FAILED = "failed"
    DRAINING = "draining"
    DELETED = "deleted"


TRANSITIONS: Mapping[VersionState, frozenset[VersionState]] = {
    VersionState.VALIDATING: frozenset({VersionState.READY, VersionState.FAILED}),
    VersionState.READY: frozenset({VersionState.DRAINING}),
    VersionState.FAILED: frozenset({VersionState.DELETED}),
    VersionState.DRAINING: frozenset({VersionState.DELETED}),
    VersionState.DELETED: frozenset(),
}
"""From a state to those that may follow it."""


class EventKind(enum.Enum):
    """What an event tells. The values are stored; never change one."""

    VERSION_CREATED = "version_created"
    VERSION_READY = "version_ready"
    VERSION_FAILED = "version_failed"
    VERSION_DRAINING = "version_draining"
    VERSION_DELETED = "version_deleted"
    TRAFFIC_SET = "traffic_set"
    VERSION_PROMOTED = "version_promoted"
    ADAPTER_ROLLED_BACK = "adapter_rolled_back"


@dataclass(frozen=True, slots=True)
class Arm:
    """One version of a split."""

    version: int
    weight: int
    """Relative to the other arms' weights, from 1 up."""


@dataclass(frozen=True, slots=True)
class Guard:
    """Limits of one arm; when it breaches one, the split is rolled back."""

    version: int
    min_requests: int
    max_error_ratio: float | None = None
    max_ttft_p95_ms: float | None = None
    max_total_p95_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Content:
    """What is known of a version once its files were read and checked."""

    digest: str
    """Of the adapter's files; see `store/artifacts.py`."""
    weights_sha256: str
    size_bytes: int
    rank: int
    target_modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """One version of an adapter."""

    tenant: str
    adapter: str
    version: int
    """From 1 up, per adapter; never used twice."""
    state: VersionState
    lora_int_id: int
    """Identifies the version to vLLM; from 1 up, over all tenants, never used twice."""
    source_uri: str
    expected_sha256: str
    """Of the weights, as the caller announced it; empty if not."""
    fingerprints: Mapping[str, str]
    """Of the base model, as the caller announced them; by the contract's field names."""
    labels: Mapping[str, str]
    take_traffic: bool
    """Whether it takes all traffic if it is the adapter's first READY version."""
    create_time_ns: int
    """When it was asked for, in nanoseconds since the epoch."""
    update_time_ns: int
    """When its state last changed."""
    content: Content | None = None
    """None until its files were read and checked, and for good if they were refused."""
    findings: tuple[str, ...] = ()
    """Why it FAILED."""


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """A name with its traffic split."""

    tenant: str
    adapter: str
    arms: tuple[Arm, ...]
    """By version; empty: no version answers unasked."""
    guard: Guard | None
    traffic_revision: int
    """Counts the changes of the split from 1 up; 0: it was never set."""
    latest_version: int
    create_time_ns: int
    traffic_time_ns: int
    """When the split last changed; the creation before that."""

    @property
    def etag(self) -> str:
        """Stands for what a caller has seen of the split."""
        return f"t{self.traffic_revision}"


@dataclass(frozen=True, slots=True)
class EventRecord:
    """One change, written in the transaction that made it."""

    sequence: int
    """From 1 up over all tenants, without a gap."""
    time_ns: int
    kind: EventKind
    tenant: str
    adapter: str
    version: int
    """0 for a change of the split."""
    actor: str
    reason: str = ""
    arms: tuple[Arm, ...] = ()
    """The split after a change of it."""


@dataclass(frozen=True, slots=True)
class FeedbackSummary:
    """Scores of one version."""

    count: int
    mean: float
    standard_deviation: float
    """Of the sample; 0.0 below two scores."""


@dataclass(frozen=True, slots=True)
class NewVersion:
    """What a caller asks for. Equal requests have equal fields."""

    tenant: str
    adapter: str
    source_uri: str
    expected_sha256: str = ""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    take_traffic: bool = True


class RegistryError(Exception):
    """Base of what the registry refuses. Then nothing was written."""


class RegistryUnusable(RegistryError):
    """The file is no registry, or a newer release wrote it. The message says what to do."""


class InvalidName(RegistryError, ValueError):
    """A tenant or an adapter is not called by the rules."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(
            f"{kind} {name!r} is no valid name; use 1 to 63 of a-z 0-9 . _ - and begin with a "
            "letter or a digit"
        )


class AdapterUnknown(RegistryError, LookupError):
    """There is no adapter of that name."""

    def __init__(self, adapter: str) -> None:
        super().__init__(f"adapter {adapter!r} is unknown")
        self.adapter = adapter


class VersionUnknown(AdapterUnknown):
    """The adapter has no such version."""

    def __init__(self, adapter: str, version: int) -> None:
        RegistryError.__init__(self, f"adapter {adapter!r} has no version {version}")
        self.adapter = adapter
        self.version = version


class RequestIdReused(RegistryError):
    """The request id was used with other fields before."""

    def __init__(self, request_id: str) -> None:
        super().__init__(
            f"request id {request_id!r} was used with other fields before; take a new one"
        )
        self.request_id = request_id


class EtagMismatch(RegistryError):
    """The adapter changed since its etag was read."""

    def __init__(self, adapter: str, etag: str) -> None:
        super().__init__(
            f"adapter {adapter!r} changed since the etag was read, and is at {etag!r} now; read "
            "it again and decide again"
        )
        self.adapter = adapter
        self.etag = etag


class VersionNotReady(RegistryError):
    """What is asked for needs a READY version."""

    def __init__(self, adapter: str, version: int, state: VersionState) -> None:
        super().__init__(
            f"version {version} of adapter {adapter!r} is {state.name}, and must be READY"
        )
        self.adapter = adapter
        self.version = version
        self.state = state


class VersionInUse(RegistryError):
    """The version has traffic."""

    def __init__(self, adapter: str, version: int) -> None:
        super().__init__(
            f"version {version} of adapter {adapter!r} has traffic; give its share to others "
            "with SetTraffic or PromoteVersion first"
        )
        self.adapter = adapter
        self.version = version


class NothingToRollBack(RegistryError):
    """There is no earlier split, or it needs a version that is not READY any more."""

    def __init__(self, adapter: str, reason: str) -> None:
        super().__init__(f"adapter {adapter!r} cannot be rolled back: {reason}")
        self.adapter = adapter


class TransitionRefused(RegistryError):
    """A version cannot go from the state that it is in to the one asked for."""

    def __init__(self, record: VersionRecord, state: VersionState) -> None:
        super().__init__(
            f"version {record.version} of adapter {record.adapter!r} cannot go from "
            f"{record.state.name} to {state.name}"
        )
        self.adapter = record.adapter
        self.version = record.version
        self.state = record.state
