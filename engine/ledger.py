"""The ledger: every change of an adapter goes through here, and is seen in the same order.

    transaction in the registry -> our view -> sent to every process -> watchers are woken

A change that was begun is finished, whoever asked for it leaves meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

from engine.generation import VersionKey
from engine.pool import ServedAdapter, ServedView
from engine.split import Split
from store.records import (
    AdapterRecord,
    Arm,
    Content,
    EventRecord,
    Guard,
    NewVersion,
    VersionRecord,
)
from store.registry import Registry
from store.shared_reads import SharedReads

EVENTS_PER_READ = 32
"""Events that a watcher reads at once; a slow one holds no more in memory."""

MAX_FINDINGS, MAX_FINDING_CHARACTERS = 64, 1000

Record = TypeVar("Record")


class Audience(Protocol):
    """All processes that resolve adapter names."""

    def show(self, tenant: str, adapter: str, served: ServedAdapter) -> Awaitable[None]:
        """Send the adapter to all at once; awaited, wait until they follow."""


Change: TypeAlias = Callable[[], Coroutine[Any, Any, tuple[Record, Awaitable[None]]]]
"""A transaction, which returns its outcome and what to wait for until all follow it."""


class Ledger:
    """The one writer of the registry. Owned by the host; `open` first, `close` last.

    The methods raise what the registry's do, and return when all processes follow the change.
    """

    def __init__(self, registry: Registry, audience: Audience) -> None:
        self._registry = registry
        self._audience = audience
        self.view = ServedView()
        """What may be asked for now, for processes that join."""
        self.guarded: dict[tuple[str, str], AdapterRecord] = {}
        """Adapters whose split a guard watches, by tenant and name."""
        self._order = asyncio.Lock()
        """Held from a transaction until its outcome was sent."""
        self._commits: set[asyncio.Task[Any]] = set()
        self._changed = asyncio.Event()
        self._reads = SharedReads()

    async def open(self) -> None:
        """Read what is registered."""
        for record, ready in await self._registry.snapshot():
            self._note_guard(record)
            self.view.show(record.tenant, record.adapter, ServedAdapter(Split(record.arms), ready))

    async def close(self) -> None:
        """Finish what was begun."""
        if self._commits:
            await asyncio.wait(self._commits)

    async def begin(self, new: NewVersion, *, request_id: str, actor: str) -> VersionRecord:
        """A version that is VALIDATING, or the one that this request made before."""

        async def change() -> tuple[VersionRecord, Awaitable[None]]:
            record = await self._registry.begin_version(new, request_id=request_id, actor=actor)
            adapter = await self._registry.adapter(new.tenant, new.adapter)
            return record, self._show(adapter)

        return await self._commit(change)

    async def complete(self, key: VersionKey, content: Content, *, actor: str) -> VersionRecord:
        """READY; the first one of its adapter takes all traffic if it was to."""

        async def change() -> tuple[VersionRecord, Awaitable[None]]:
            record, adapter = await self._registry.complete_version(*key, content, actor=actor)
            return record, self._show(adapter, add=key.version)

        return await self._commit(change)

    async def fail(self, key: VersionKey, findings: Sequence[str], *, actor: str) -> VersionRecord:
        """FAILED, for these reasons, as far as events and lists can carry them."""
        findings = [finding[:MAX_FINDING_CHARACTERS] for finding in findings[:MAX_FINDINGS]]

        async def change() -> tuple[VersionRecord, Awaitable[None]]:
            return await self._registry.fail_version(*key, findings, actor=actor), _nothing()

        return await self._commit(change)

    async def drain(self, key: VersionKey, *, actor: str) -> VersionRecord:
        """DRAINING: no request gets it any more. What is not READY is returned as it is."""

        async def change() -> tuple[VersionRecord, Awaitable[None]]:
            record = await self._registry.drain_version(*key, actor=actor)
            adapter = await self._registry.adapter(key.tenant, key.adapter)
            return record, self._show(adapter, remove=key.version)

        return await self._commit(change)

    async def delete(self, key: VersionKey, *, actor: str) -> VersionRecord:
        """DELETED."""

        async def change() -> tuple[VersionRecord, Awaitable[None]]:
            return await self._registry.delete_version(*key, actor=actor), _nothing()

        return await self._commit(change)

    async def set_traffic(
        self,
        tenant: str,
        adapter: str,
        arms: Sequence[Arm],
        *,
        guard: Guard | None,
        etag: str,
        actor: str,
    ) -> AdapterRecord:
        """Split traffic over these arms."""
        return await self._commit_split(
            self._registry.set_traffic(tenant, adapter, arms, guard=guard, etag=etag, actor=actor)
        )

    async def promote(self, key: VersionKey, *, etag: str, actor: str) -> AdapterRecord:
        """Give one version all traffic."""
        return await self._commit_split(self._registry.promote(*key, etag=etag, actor=actor))

    async def roll_back(
        self, tenant: str, adapter: str, *, etag: str, actor: str, reason: str = ""
    ) -> AdapterRecord:
        """Restore the split before the last change."""
        return await self._commit_split(
            self._registry.roll_back(tenant, adapter, etag=etag, actor=actor, reason=reason)
        )

    async def watch(
        self, tenant: str, *, after: int, adapter: str, heartbeat_s: float
    ) -> AsyncGenerator[EventRecord | int, None]:
        """Events after a sequence number, then new ones as they come, without a gap.

        At the begin, and where nothing came for `heartbeat_s`, the sequence number up to which
        everything was told.
        """
        yield after
        clock = asyncio.get_running_loop().time
        due_s = clock() + heartbeat_s
        while True:
            changed = self._changed  # before the reads: what comes after them sets this
            newest, events = await self._reads.read(
                (changed, tenant, adapter, after),
                functools.partial(self._news, tenant, adapter, after),
            )
            for event in events:
                after = event.sequence
                yield event
                due_s = clock() + heartbeat_s
            if len(events) == EVENTS_PER_READ:
                continue
            if clock() >= due_s:
                yield max(newest, after)
                due_s = clock() + heartbeat_s
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), max(0.0, due_s - clock()))

    async def _news(
        self, tenant: str, adapter: str, after: int
    ) -> tuple[int, Sequence[EventRecord]]:
        """The sequence number of the newest event, and the next events: in this order, and as one
        read for all, or a heartbeat would tell of an event that was not told."""
        newest = await self._registry.last_sequence()
        return newest, await self._registry.events(
            tenant, after=after, limit=EVENTS_PER_READ, adapter=adapter
        )

    async def _commit_split(self, transaction: Coroutine[Any, Any, AdapterRecord]) -> AdapterRecord:
        async def change() -> tuple[AdapterRecord, Awaitable[None]]:
            record = await transaction
            return record, self._show(record)

        return await self._commit(change)

    async def _commit(self, change: Change[Record]) -> Record:
        """Do one change to its end, in order, even if we are cancelled."""
        task = asyncio.create_task(self._in_order(change))
        self._commits.add(task)
        task.add_done_callback(self._commits.discard)
        return await asyncio.shield(task)

    async def _in_order(self, change: Change[Record]) -> Record:
        async with self._order:
            record, followed = await change()
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()
        await followed
        return record

    def _show(
        self, record: AdapterRecord, *, add: int | None = None, remove: int | None = None
    ) -> Awaitable[None]:
        """Send an adapter as it is now to all."""
        self._note_guard(record)
        shown = self.view.tenants.get(record.tenant, {}).get(record.adapter)
        ready = set(shown.ready) if shown is not None else set()
        ready.update(() if add is None else (add,))
        ready.discard(remove or 0)
        served = ServedAdapter(Split(record.arms), tuple(sorted(ready)))
        self.view.show(record.tenant, record.adapter, served)
        return self._audience.show(record.tenant, record.adapter, served)

    def _note_guard(self, record: AdapterRecord) -> None:
        if record.guard is not None:
            self.guarded[record.tenant, record.adapter] = record
        else:
            self.guarded.pop((record.tenant, record.adapter), None)


async def _nothing() -> None:
    """Nobody has to follow."""
