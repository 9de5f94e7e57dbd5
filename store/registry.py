"""The registry as its users see it: what exists, what answers, and who changed it.

A seam. SQLite is behind it for one host (`store/sqlite_registry.py`); a database that several
hosts share can be, and passes the same tests (`tests/store/registry_contract.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from store.records import (
    AdapterRecord,
    Arm,
    Content,
    EventRecord,
    FeedbackSummary,
    Guard,
    NewVersion,
    VersionRecord,
    VersionState,
)


class Registry(Protocol):
    """Adapters, their versions and splits, and the trail of changes.

    Use as an async context manager, or `open` and `close` it. Each method is one transaction:
    what it returned survives a crash and a power cut, and what it raised wrote nothing. A call
    that is cancelled may still take effect. The database's own errors come through when the
    disk or the connection fails.

    Changes name their `actor`, and write their event in the same transaction. Two numbers are
    never handed out twice, because engines keep what they once loaded: a version's number, and
    its `lora_int_id` (a cached id wins over what it now stands for,
    vllm/lora/worker_manager.py:296).

    A method that names an adapter raises AdapterUnknown if there is none, and one that names a
    version also VersionUnknown, unless it says otherwise.
    """

    async def open(self) -> None:
        """Connect, and bring an older schema up to date. Raises RegistryUnusable."""

    async def close(self) -> None:
        """Finish what runs and let go of the database. Safe to call twice."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    # From a request to a version that is gone.

    async def begin_version(self, new: NewVersion, *, request_id: str, actor: str) -> VersionRecord:
        """The next version of its adapter, VALIDATING; the adapter is made if there is none.

        A `request_id` makes it safe to repeat, per tenant: the same fields again return the
        version that they made, as it stands now. Empty: every call makes a version. Raises
        InvalidName, or RequestIdReused if the id came with other fields before.
        """

    async def complete_version(
        self, tenant: str, adapter: str, version: int, content: Content, *, actor: str
    ) -> tuple[VersionRecord, AdapterRecord]:
        """VALIDATING to READY. If the adapter's split was never set, and the version was asked
        for with `take_traffic`, it gets all traffic at once.

        Raises TransitionRefused, or ValueError if the digest is no lower-case hex SHA-256.
        """

    async def fail_version(
        self, tenant: str, adapter: str, version: int, findings: Sequence[str], *, actor: str
    ) -> VersionRecord:
        """VALIDATING to FAILED; `findings` say why. Raises TransitionRefused."""

    async def drain_version(
        self, tenant: str, adapter: str, version: int, *, actor: str
    ) -> VersionRecord:
        """READY to DRAINING. One that is DRAINING, FAILED or DELETED stays as it is.

        Raises VersionInUse if it has traffic, TransitionRefused if it is VALIDATING.
        """

    async def delete_version(
        self, tenant: str, adapter: str, version: int, *, actor: str
    ) -> VersionRecord:
        """DRAINING or FAILED to DELETED. One that is DELETED stays as it is.

        Raises TransitionRefused.
        """

    async def mint_lora_int_id(self, tenant: str, adapter: str, version: int) -> int:
        """Give a version a fresh id, and return it.

        After a failed `add_lora` the old id may name half an adapter in the engine
        (vllm/lora/model_manager.py:363).
        """

    # Which version answers.

    async def set_traffic(
        self,
        tenant: str,
        adapter: str,
        arms: Sequence[Arm],
        *,
        guard: Guard | None = None,
        etag: str = "",
        actor: str,
        reason: str = "",
    ) -> AdapterRecord:
        """Replace the split and its guard, as a new revision even if they are the same.

        No arms: no version answers unasked. With an `etag`, only if the adapter still has it.
        Raises EtagMismatch, VersionUnknown or VersionNotReady, or ValueError if a version comes
        twice, a weight is below 1 or the guard's version is no arm.
        """

    async def promote(
        self, tenant: str, adapter: str, version: int, *, etag: str = "", actor: str
    ) -> AdapterRecord:
        """Give one version all traffic, unguarded. Raises EtagMismatch or VersionNotReady."""

    async def roll_back(
        self, tenant: str, adapter: str, *, etag: str = "", actor: str, reason: str = ""
    ) -> AdapterRecord:
        """Restore the split before the last `set_traffic` or `promote`, unguarded; called again,
        the one before that.

        Raises EtagMismatch, or NothingToRollBack if nothing was before, or a version of it is
        not READY any more.
        """

    # What there is.

    async def adapter(self, tenant: str, adapter: str) -> AdapterRecord:
        """The adapter as it stands."""

    async def adapters(
        self, tenant: str, *, after: str = "", prefix: str = "", limit: int
    ) -> list[AdapterRecord]:
        """The first `limit` adapters by name of those that are called above `after` and begin
        with `prefix`. Raises ValueError for a limit below 1.
        """

    async def version(self, tenant: str, adapter: str, version: int) -> VersionRecord:
        """The version as it stands, whatever its state."""

    async def versions(
        self,
        tenant: str,
        adapter: str,
        *,
        below: int | None = None,
        limit: int,
        deleted: bool = False,
    ) -> list[VersionRecord]:
        """The first `limit` versions below that number (None: from the top), newest first.

        Those that are DELETED are left out unless asked for. Raises ValueError for a limit
        below 1.
        """

    async def versions_in(self, state: VersionState) -> list[VersionRecord]:
        """All versions of all tenants that are in that state, by tenant, adapter and version."""

    async def find_ready(self, tenant: str, adapter: str, digest: str) -> VersionRecord | None:
        """The newest READY version with that content; None if there is none."""

    async def version_of_request(self, tenant: str, request_id: str) -> VersionRecord | None:
        """The version that a request made; None if it made none."""

    async def digest_in_use(self, digest: str) -> bool:
        """Whether any tenant's version has that content, and is neither FAILED nor DELETED."""

    async def snapshot(self) -> list[tuple[AdapterRecord, tuple[int, ...]]]:
        """All adapters of all tenants, each with its READY versions in ascending order."""

    # What happened.

    async def events(
        self, tenant: str, *, after: int, limit: int, adapter: str = ""
    ) -> list[EventRecord]:
        """The first `limit` events of a tenant, or of one adapter of it, with a sequence number
        above `after`, in their order. None if there is no such adapter.

        Raises ValueError for a limit below 1.
        """

    async def last_sequence(self) -> int:
        """The sequence number of the newest event of all tenants; 0 before the first."""

    async def record_feedback(
        self, tenant: str, adapter: str, version: int, request_id: str, score: float
    ) -> None:
        """Score the answer to a request; replaces the score that the request had.

        Raises ValueError for a score that is not finite.
        """

    async def feedback(self, tenant: str, adapter: str) -> dict[int, FeedbackSummary]:
        """The scores of each version that has any; empty if there is no such adapter."""
