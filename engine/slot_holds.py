"""Which of a shard's loaded versions may run, as one process knows it.

An engine computes with at most `max_loras` adapters in one batch, and the host shares these
slots out, to a version and for all processes at once (`engine/slots.py`). A version that has its
slot is entered without a message or a task switch, by any number of requests. For another one the
host is asked once, and its requests wait in their order. A slot that is recalled is entered no
more, and given back when nothing of this process runs in it, here or in the core (ADR 0012).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from engine.errors import ShardUnavailable
from engine.forgetting import until_forgotten
from engine.generation import VersionKey


@dataclass(slots=True, eq=False)
class Slot:
    """The slot of one version, and how many requests of this process run in it."""

    running: int = 0
    lora_int_id: int | None = None
    """Of the version, once a request has entered; None: the core has nothing of ours on it."""
    returned: Callable[[], None] | None = None
    """Set when it is recalled: called when nothing runs in it any more."""
    asking: asyncio.Task[None] | None = None
    """Asks the core whether it has forgotten the last of them."""


@dataclass(slots=True, eq=False)
class _Queue:
    """Requests of this process that wait for the slot of one version, in their order."""

    lora_int_id: int
    waiting: dict[asyncio.Future[Slot], None] = field(default_factory=dict)


class SlotHolds:
    """The slots of one shard, for one process."""

    def __init__(
        self,
        tell_waiting: Callable[[VersionKey, bool], None],
        in_core: Callable[[int], Awaitable[int]],
        observe_wait: Callable[[float], None] = lambda wait_s: None,
    ) -> None:
        """`tell_waiting` tells the host that requests wait for a version, or that none does any
        more. `in_core` counts the requests of this process that the core still knows, by
        `lora_int_id`. `observe_wait` is told how many seconds each request waited that had to."""
        self._tell_waiting = tell_waiting
        self._in_core = in_core
        self._observe_wait = observe_wait
        self._slots: dict[VersionKey, Slot] = {}
        self._recalled: dict[VersionKey, Slot] = {}
        self._queues: dict[VersionKey, _Queue] = {}

    def enter(self, key: VersionKey, lora_int_id: int) -> Slot | None:
        """Run one request of a version, and say so with `leave` when it has ended. None: it has no
        slot, and `wait` is for that. The caller holds the version: it is loaded."""
        # No coroutine: every request comes this way.
        slot = self._slots.get(key)
        if slot is not None:
            slot.running += 1
            slot.lora_int_id = lora_int_id
        return slot

    async def wait(self, key: VersionKey, lora_int_id: int) -> Slot:
        """Enter the version once it has a slot.

        Raises ShardUnavailable if the shard dies meanwhile.
        """
        begin_s = time.monotonic()
        entered: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = _Queue(lora_int_id)
            queue.waiting[entered] = None
            self._tell_waiting(key, True)
        else:
            queue.waiting[entered] = None
        try:
            return await entered
        except asyncio.CancelledError:
            if not entered.cancelled() and entered.done() and entered.exception() is None:
                self.leave(entered.result())  # it was entered for us just before
            self._give_up(key, queue, entered)
            raise
        finally:
            self._observe_wait(time.monotonic() - begin_s)

    def _give_up(self, key: VersionKey, queue: _Queue, entered: asyncio.Future[Slot]) -> None:
        queue.waiting.pop(entered, None)
        if not queue.waiting and self._queues.get(key) is queue:
            del self._queues[key]
            self._tell_waiting(key, False)

    def leave(self, slot: Slot) -> None:
        """End one request."""
        slot.running -= 1
        if slot.returned is not None and not slot.running:
            self._settle(slot)

    def granted(self, key: VersionKey) -> None:
        """Host: this version has a slot. Whoever waits for it enters at once."""
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = self._reopened(key) or Slot()
        queue = self._queues.pop(key, None)
        if queue is None:
            return
        for entered in queue.waiting:
            if not entered.done():
                slot.running += 1
                slot.lora_int_id = queue.lora_int_id
                entered.set_result(slot)

    def _reopened(self, key: VersionKey) -> Slot | None:
        """The slot that was being given back when it was granted again."""
        slot = self._recalled.pop(key, None)
        if slot is not None:
            _answer(slot)  # the host waits for it no more
        return slot

    def all_granted(self, keys: Iterable[VersionKey]) -> None:
        """Host: these versions have slots."""
        for key in keys:
            self.granted(key)

    def withdrawn(self, key: VersionKey) -> None:
        """Host: this version is not loaded any more, so nobody is in its slot, and it has none."""
        self._slots.pop(key, None)

    def recall(self, key: VersionKey, returned: Callable[[], None]) -> None:
        """Host: let nobody enter this slot, and call `returned` when nothing of this process
        runs in it, here or in the core."""
        slot = self._slots.pop(key, None)
        if slot is None:
            returned()
            return

        def done() -> None:
            if self._recalled.get(key) is slot:
                del self._recalled[key]
            returned()

        slot.returned = done
        self._recalled[key] = slot
        if not slot.running:
            self._settle(slot)

    def _settle(self, slot: Slot) -> None:
        if slot.lora_int_id is None:
            _answer(slot)
        elif slot.asking is None:
            slot.asking = asyncio.create_task(self._until_forgotten(slot, slot.lora_int_id))

    async def _until_forgotten(self, slot: Slot, lora_int_id: int) -> None:
        await until_forgotten(self._in_core, lora_int_id)
        slot.asking = None
        _answer(slot)

    def lose(self, shard: str) -> None:
        """Host: this shard is gone. Whoever waits is told with ShardUnavailable."""
        queues, self._queues = self._queues, {}
        self._slots.clear()
        for queue in queues.values():
            for entered in queue.waiting:
                if not entered.done():
                    entered.set_exception(ShardUnavailable(shard))

    async def close(self) -> None:
        """Ask the core no more."""
        asking = [slot.asking for slot in self._recalled.values() if slot.asking is not None]
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)


def _answer(slot: Slot) -> None:
    """Give it back, or go on with it: nobody asks the core about it from now on."""
    if slot.asking is not None:
        slot.asking.cancel()
        slot.asking = None
    returned, slot.returned = slot.returned, None
    if returned is not None:
        returned()
