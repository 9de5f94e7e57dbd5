"""What host and workers tell each other, over `gateway/channel.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.base_model import ModelFingerprints
from engine.core import ClientSlot
from engine.generation import ServedVersion, VersionKey
from engine.model_info import ModelInfo
from engine.pool import ServedAdapter, ServedView
from engine.quarantine import Quarantined
from engine.ring import AdapterKey, Plan
from gateway.arms import Outcome
from gateway.settings import Settings
from gateway.token_meter import Tokens


@dataclass(frozen=True, slots=True)
class Orders:
    """Host: attach to these cores, bind the public address, take calls."""

    slots: Sequence[ClientSlot]
    """Of the shards that are up."""
    shards: Sequence[str]
    """Names of all shards."""
    model: ModelInfo
    """What each of them serves."""
    listen: str
    """The public address with the port that the host holds."""
    control_address: str
    """Where the host answers the services that are not a worker's."""
    settings: Settings
    fingerprints: ModelFingerprints
    view: ServedView
    resident: Mapping[str, Sequence[ServedVersion]]
    """What each shard has loaded, by its name."""
    granted: Mapping[str, Sequence[VersionKey]]
    """Which of that has a slot, by the shard's name."""
    plan: Plan
    """How many replicas hot adapters have."""
    named: frozenset[AdapterKey]
    """The adapters that have series of their own."""
    drained: frozenset[str]
    """Shards that take no requests, whether they are up or not."""
    quarantined: Quarantined
    """To screen by."""
    lent: frozenset[str] = frozenset()
    """Shards that are lent to training, or about to be."""


@dataclass(frozen=True, slots=True)
class Drain:
    """Host: announce NOT_SERVING, refuse new calls, let running ones finish, then exit."""

    delay_s: float
    grace_s: float


@dataclass(frozen=True, slots=True)
class ShardDied:
    """Host: the core of this shard is gone; end what ran on it, and send nothing there."""

    shard: str
    crashed: bool
    """Whether it may have been the doing of what it computed."""
    quarantined: Quarantined
    """To screen by from now on."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Host: this version is resident on the shard, and may be used."""

    shard: str
    version: ServedVersion


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """Host: this version could not be loaded, for this reason."""

    shard: str
    key: VersionKey
    reason: str


@dataclass(frozen=True, slots=True)
class NameAdapters:
    """Host: these adapters have series of their own from now on, and no others."""

    named: frozenset[AdapterKey]


@dataclass(frozen=True, slots=True)
class SlotGranted:
    """Host: this version has a slot of the shard, and may run."""

    shard: str
    key: VersionKey


@dataclass(frozen=True, slots=True)
class SlotWithdrawn:
    """Host: this version, which is not loaded any more, has no slot either."""

    shard: str
    key: VersionKey


@dataclass(frozen=True, slots=True)
class ShowAdapter:
    """Question: an adapter is like this from now on. Answered once that is followed."""

    tenant: str
    adapter: str
    served: ServedAdapter


@dataclass(frozen=True, slots=True)
class FollowPlan:
    """Question: hot adapters have so many replicas from now on. Answered once that is followed."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class FollowDrains:
    """Question: these shards take no requests from now on, and all others do. Answered once that
    is followed."""

    shards: frozenset[str]
    lent: frozenset[str] = frozenset()
    """As of `Orders`."""


@dataclass(frozen=True, slots=True)
class TellPlaced:
    """Question: what is placed where? Answered with `Placed`."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Answer: requests of one process that are placed now, by shard, and those that ever were."""

    in_flight: Mapping[str, int]
    ever: int


@dataclass(frozen=True, slots=True)
class Explain:
    """Question: where would this request go? Answered with an `Explanation`; None: the version is
    not known there."""

    tenant: str
    adapter: str
    version: int | None
    session: str


@dataclass(frozen=True, slots=True)
class Leave:
    """Question: use this version no more. Answered once nothing runs on it."""

    shard: str
    key: VersionKey


@dataclass(frozen=True, slots=True)
class RecallSlot:
    """Question: begin no more requests of this version. Answered once none runs."""

    shard: str
    key: VersionKey


@dataclass(frozen=True, slots=True)
class TellUses:
    """Question: how is what the shard has loaded used? Answered with `Residents.uses`, and then
    once with `WentIdle`."""

    shard: str


@dataclass(frozen=True, slots=True)
class Flush:
    """Question: send the outcomes of all requests that have ended. Answered after them."""


@dataclass(frozen=True, slots=True)
class AreYouThere:
    """Question: answered at once."""


@dataclass(frozen=True, slots=True)
class ShardUp:
    """Question: the shard has a new core; attach to it. Answered once requests go there."""

    slot: ClientSlot
    resident: Sequence[ServedVersion]
    """What it has loaded."""
    granted: Sequence[VersionKey]
    """Which of that has a slot."""


@dataclass(frozen=True, slots=True)
class FollowQuarantine:
    """Question: screen by this from now on. Answered once that is followed."""

    quarantined: Quarantined


Question = (
    ShowAdapter
    | FollowPlan
    | FollowDrains
    | FollowQuarantine
    | ShardUp
    | Leave
    | RecallSlot
    | TellUses
    | TellPlaced
    | Explain
    | Flush
    | AreYouThere
)


@dataclass(frozen=True, slots=True)
class Ask:
    """Host: a question, to be answered under the same ticket."""

    ticket: int
    question: Question


@dataclass(frozen=True, slots=True)
class Imported:
    """Worker: imports are done; `Orders` are followed at once now."""


@dataclass(frozen=True, slots=True)
class Serving:
    """Worker: taking calls."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Worker: could not serve, and exits. The message is one line for people."""

    message: str


@dataclass(frozen=True, slots=True)
class Want:
    """Worker: requests wait for this version on the shard."""

    shard: str
    key: VersionKey


@dataclass(frozen=True, slots=True)
class WaitsForSlot:
    """Worker: requests wait for a slot of the shard for this version, or none does any more."""

    shard: str
    key: VersionKey
    process: int
    """Process id of the worker."""
    waits: bool


@dataclass(frozen=True, slots=True)
class WentIdle:
    """Worker: nothing runs any more on some version of the shard; look again."""

    shard: str


@dataclass(frozen=True, slots=True)
class Ended:
    """Worker: these requests ended."""

    outcomes: Sequence[Outcome]


@dataclass(frozen=True, slots=True)
class Used:
    """Worker: requests used so many tokens."""

    tokens: Tokens


@dataclass(frozen=True, slots=True)
class Acquitted:
    """Worker: this suspect was answered to its end."""

    fingerprint: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Worker: the answer to the question with that ticket."""

    ticket: int
    value: Any = None


Told = Loaded | LoadFailed | SlotGranted | SlotWithdrawn | ShardDied | NameAdapters
"""What the host tells all workers."""
HostMessage = Orders | Ask | Told | Drain
Unasked = Want | WaitsForSlot | WentIdle | Ended | Used | Acquitted
"""What a worker says of itself while it serves."""
WorkerMessage = Imported | Serving | Unasked | Answer | Failed
