"""What happened lately to adapters, shards and workers, for the status page."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

from gateway.judgement import GUARD
from gateway.note import Note
from gateway.status import EventStatus
from gateway.words import for_people
from store.records import EventKind, EventRecord
from store.registry import Registry

EVENTS_SHOWN = 12
EVENTS_PER_READ = 100

_TEXTS = {
    EventKind.VERSION_CREATED: "created",
    EventKind.VERSION_READY: "is ready",
    EventKind.VERSION_FAILED: "failed",
    EventKind.VERSION_DRAINING: "is being deleted",
    EventKind.VERSION_DELETED: "deleted",
    EventKind.TRAFFIC_SET: "traffic set to",
    EventKind.VERSION_PROMOTED: "promoted to",
    EventKind.ADAPTER_ROLLED_BACK: "rolled back to",
}
_TROUBLE = frozenset({EventKind.VERSION_FAILED})


class EventSight:
    """Reads the trail of adapters as it grows, and what was noted of shards and workers."""

    def __init__(self) -> None:
        self._newest: deque[EventStatus] = deque(maxlen=EVENTS_SHOWN)
        self._sequence: int | None = None
        """Of the last event that was read; None: none was."""

    async def read(
        self, registry: Registry | None, tenant: str, notes: Mapping[str, Iterable[Note]]
    ) -> list[EventStatus]:
        """What happened last, the newest first. `notes` are of each subject, the newest last."""
        if registry is not None:
            await self._follow(registry, tenant)
        noted = [
            EventStatus(note.time_s, subject, for_people(note.text), note.is_trouble)
            for subject, of_subject in notes.items()
            for note in reversed([*of_subject])
        ]
        # Events of one transaction have one time, and stay as they are here: the last one first.
        ordered = sorted([*reversed(self._newest), *noted], key=lambda event: -event.time_s)
        return ordered[:EVENTS_SHOWN]

    async def _follow(self, registry: Registry, tenant: str) -> None:
        if self._sequence is None:
            # Some of these numbers may be of other tenants.
            self._sequence = max(0, await registry.last_sequence() - EVENTS_PER_READ)
        events = await registry.events(tenant, after=self._sequence, limit=EVENTS_PER_READ)
        for event in events:
            self._sequence = event.sequence
            self._newest.append(_status(event))


def _status(event: EventRecord) -> EventStatus:
    subject = f"{event.adapter}@{event.version}" if event.version else event.adapter
    words = [_TEXTS[event.kind]]
    if not event.version:
        total = sum(arm.weight for arm in event.arms)
        shares = (f"{arm.version} = {100 * arm.weight / total:.3g} %" for arm in event.arms)
        words.append(", ".join(shares) or "nothing")
    if event.actor == GUARD:
        words.append("by the guard")
    text = " ".join(words) + (f": {event.reason}" if event.reason else "")
    is_trouble = event.kind in _TROUBLE or event.actor == GUARD
    return EventStatus(event.time_ns / 1e9, subject, for_people(text), is_trouble)
