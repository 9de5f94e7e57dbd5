"""What one shard has loaded, as the host decides it: loads, single flight, room, removal.

    wanted -> (room is made) -> loaded -> resident -> (nobody holds it) -> removed

The shard has as many places as vLLM keeps adapters in memory (`max_cpu_loras`). They are never
overbooked, so vLLM never drops an adapter by itself and never has to read one again in the
middle of a step, where a file that is damaged or gone ends the engine (vllm/lora/
worker_manager.py:286; ADR 0007). Loads run one at a time, because each holds up decoding, and those
first that a request waits for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from engine.adapter_loader import LoadPhase, LoadTimes
from engine.errors import (
    AdapterLoadFailed,
    EngineError,
    GenerationFailed,
    LoadFault,
    ShardUnavailable,
)
from engine.generation import ServedVersion, VersionKey
from engine.load_queue import LoadQueue, retrieve
from engine.loader import Holders, Loader, Versions
from engine.residents import Use

logger = logging.getLogger(__name__)

LOAD_ATTEMPTS = 2
"""A failed `add_lora` may be passing; each attempt gets a new id (ADR 0004)."""
FAILURE_KEPT_S = 2.0
"""How long requests are answered with the last failure, before a load is tried again."""

UNLOAD_RETRY_S = 1.0
"""Between two tries to remove a version that the engine may hold still."""

SURVEY_INTERVAL_S = 1.0
"""How often is looked for an idle version, while all are in use."""


ObserveLoad = Callable[[str, LoadPhase, float, bool], None]


@dataclass(frozen=True, slots=True)
class Place:
    """One resident version."""

    version: ServedVersion
    load_time_s: float
    """When it was loaded, in seconds since the epoch."""
    load_duration_s: float
    last_use_s: float = 0.0
    """When it had last been used elsewhere before, on the machine's monotonic clock."""


@dataclass(frozen=True, slots=True)
class _Leaving:
    """A version on its way out; it takes a place until the engine has confirmed that."""

    removed: asyncio.Future[None]
    """Whether the first try did it; raises ShardUnavailable if not."""
    task: asyncio.Task[None]
    """Ends when it is out for sure."""


@dataclass(frozen=True, slots=True)
class _Failure:
    reason: str
    time_s: float


class Residency:
    """The places of one shard. `run` owns its loads."""

    def __init__(
        self,
        shard: Loader,
        places: int,
        versions: Versions,
        holders: Holders,
        observe_load: ObserveLoad = lambda shard, phase, duration_s, ok: None,
        observe_resident: Callable[[str, int], None] = lambda shard, count: None,
        observe_failure: Callable[[LoadFault], None] = lambda fault: None,
        left: Callable[[VersionKey], None] = lambda key: None,
    ) -> None:
        """`observe_load` is told of each phase of each load: shard, phase, seconds, whether it
        worked. And `observe_resident` how many versions the shard has loaded, whenever that
        changes; `observe_failure` why a version is not, whenever those who wait for it are told.
        `left` is told of each version that nobody holds any more, before it is removed."""
        self._shard = shard
        self._capacity = places
        self._used_elsewhere: dict[VersionKey, float] = {}
        """Of those that are wanted; see Place."""
        self._versions = versions
        self._holders = holders
        self._observe_load = observe_load
        self._observe_resident = observe_resident
        self._observe_failure = observe_failure
        self._tell_left = left
        self._places: dict[VersionKey, Place] = {}
        self._wanted = LoadQueue()
        self._leaving: dict[VersionKey, _Leaving] = {}
        self._failures: dict[VersionKey, _Failure] = {}
        self._changed = asyncio.Event()
        self._ended = False
        """Whether `run` is over: nothing is loaded any more."""

    @property
    def shard(self) -> str:
        """Name of the shard."""
        return self._shard.name

    def place(self, key: VersionKey) -> Place | None:
        """Where a version is resident; None if it is not."""
        return self._places.get(key)

    @property
    def capacity(self) -> int:
        """How many versions it may have."""
        return self._capacity

    def places(self) -> list[Place]:
        """All that is resident, and since when."""
        return list(self._places.values())

    def resident(self) -> list[ServedVersion]:
        """All that is resident, for a process that joins."""
        return [place.version for place in self._places.values()]

    def wanted(self) -> list[VersionKey]:
        """What is being loaded, or is about to be."""
        return self._wanted.keys

    @property
    def places_left(self) -> int:
        """Versions that can be loaded without another one leaving."""
        return self._capacity - len(self._places) - len(self._leaving)

    def want(self, key: VersionKey) -> None:
        """A process waits for this version. All are told when it is resident, or why not."""
        if (place := self._places.get(key)) is not None:
            self._holders.loaded(self.shard, place.version)  # their messages crossed
        elif (failure := self._recent_failure(key)) is not None:
            self._holders.failed(self.shard, key, failure.reason)
        else:
            self._enqueue(key, awaited=True)

    async def ensure(self, key: VersionKey, last_use_s: float = 0.0) -> ServedVersion:
        """Load a version unless it is resident. One that comes from another shard was last used
        there at `last_use_s`, on the monotonic clock.

        Raises what kept it from being loaded: AdapterLoadFailed, AdapterNotFound or
        ShardUnavailable.
        """
        if (place := self._places.get(key)) is not None:
            return place.version
        if last_use_s:
            self._used_elsewhere[key] = last_use_s
        return await asyncio.shield(self._enqueue(key, awaited=False))

    async def remove(self, key: VersionKey) -> None:
        """Take a version out, when nothing runs on it any more. Cancelled, it goes on.

        Raises ShardUnavailable if the engine did not do it yet; it is tried again until it did.
        """
        if (wanted := self._wanted.future(key)) is not None and key not in self._leaving:
            await asyncio.wait((wanted,))  # it is being loaded, or about to be
        if key not in self._leaving and key in self._places:
            self._begin_leave(key)
        if (leaving := self._leaving.get(key)) is not None:
            await asyncio.shield(leaving.removed)

    async def run(self) -> None:
        """Load what is wanted, one after the other, until cancelled."""
        try:
            while True:
                key = await self._next()
                await self._serve(key)
        finally:
            self._ended = True
            tasks = [leaving.task for leaving in self._leaving.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._wanted.cancel()

    def lose(self) -> None:
        """The engine is gone, and all that it had loaded. `run` is to be cancelled after this."""
        self._ended = True
        for leaving in self._leaving.values():
            if not leaving.removed.done():
                leaving.removed.set_result(None)
        self._wanted.fail(ShardUnavailable(self.shard))
        self._places.clear()

    def _enqueue(self, key: VersionKey, *, awaited: bool) -> asyncio.Future[ServedVersion]:
        wanted = self._wanted.add(key, awaited=awaited)
        if self._ended:
            self._wanted.fail(ShardUnavailable(self.shard))
        self._changed.set()
        return wanted

    async def _next(self) -> VersionKey:
        """What is to be loaded next, and not on its way out."""
        while True:
            self._changed.clear()
            if (key := self._wanted.next(self._leaving)) is not None:
                return key
            await self._changed.wait()

    async def _serve(self, key: VersionKey) -> None:
        try:
            version = await self._load(key)
        except EngineError as error:
            logger.error("%s: %s", self.shard, error)
            self._fail(key, error)
        except Exception:  # one adapter's trouble must not end the loads of all
            logger.exception("%s: could not load %s", self.shard, key)
            reason = "the gateway failed, and logged why; tell the operator"
            self._fail(key, AdapterLoadFailed(key.adapter, key.version, reason))
        else:
            self._failures.pop(key, None)
            self._holders.loaded(self.shard, version)
            self._wanted.take(key).set_result(version)

    def _fail(self, key: VersionKey, error: EngineError) -> None:
        reason = error.reason if isinstance(error, AdapterLoadFailed) else str(error)
        self._failures[key] = _Failure(reason, time.monotonic())
        self._observe_failure(_fault_of(error))
        self._used_elsewhere.pop(key, None)
        self._holders.failed(self.shard, key, reason)
        self._wanted.take(key).set_exception(error)

    async def _load(self, key: VersionKey) -> ServedVersion:
        turn_s = time.monotonic()
        self._observe_load(self.shard, LoadPhase.QUEUE, self._wanted.waited_s(key), True)
        version = await self._versions.find(key)
        await self._make_room()
        self._observe_load(self.shard, LoadPhase.PREPARE, time.monotonic() - turn_s, True)
        for attempt in range(1, LOAD_ATTEMPTS + 1):
            begin_s = time.monotonic()
            try:
                times = await self._shard.load(version)
            except GenerationFailed as error:
                self._observe_attempt(begin_s, {}, False)
                logger.warning("%s: %s: attempt %d: %s", self.shard, key, attempt, error)
                refusal = AdapterLoadFailed(
                    *(key.adapter, key.version, f"the engine refuses it: {error}"),
                    LoadFault.ENGINE,
                )
                version = await self._versions.with_new_id(version)
            except ShardUnavailable:
                self._observe_attempt(begin_s, {}, False)
                # The engine may still load or remove it under this id.
                await self._versions.with_new_id(version)
                raise
            else:
                duration_s = self._observe_attempt(begin_s, times, True)
                self._places[key] = Place(
                    version, time.time(), duration_s, self._used_elsewhere.pop(key, 0.0)
                )
                self._note_count()
                return version
        raise refusal

    def _observe_attempt(self, begin_s: float, times: LoadTimes, ok: bool) -> float:
        """Tell of one that ends now. How long it took, in seconds."""
        duration_s = time.monotonic() - begin_s
        for phase, phase_s in [*times.items(), (LoadPhase.ALL, duration_s)]:
            self._observe_load(self.shard, phase, phase_s, ok)
        return duration_s

    async def _make_room(self) -> None:
        """Free a place if none is: that of the version which was idle for longest, also elsewhere.

        While all are in use, the one whose last request began first takes no new ones; should
        another become idle before it has drained, that one goes too.
        """
        while self.places_left <= 0:
            uses = await self._holders.uses(self.shard)
            if self.places_left > 0:  # something was removed while they answered
                return
            unused = Use(0, 0.0)
            by_last_use = sorted(
                self._places,
                key=lambda key: max(uses.get(key, unused).last_use_s, self._places[key].last_use_s),
            )
            idle = [key for key in by_last_use if not uses.get(key, unused).holds]
            if idle:
                self._begin_leave(idle[0])
            elif not self._leaving:
                self._begin_leave(by_last_use[0])
            await asyncio.wait(
                [leaving.task for leaving in self._leaving.values()],
                timeout=SURVEY_INTERVAL_S,
                return_when=asyncio.FIRST_COMPLETED,
            )

    def _begin_leave(self, key: VersionKey) -> None:
        # From here on no process that joins is told of it, and whoever wants it waits.
        place = self._places.pop(key)
        removed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        removed.add_done_callback(retrieve)
        task = asyncio.create_task(self._leave(key, place.version, removed))
        self._leaving[key] = _Leaving(removed, task)
        task.add_done_callback(lambda task: self._left(key, task))

    async def _leave(
        self, key: VersionKey, version: ServedVersion, removed: asyncio.Future[None]
    ) -> None:
        try:
            await self._holders.leave(self.shard, key)
            self._tell_left(key)
            while not await self._try_unload(key, version, removed):  # noqa: ASYNC110  # a call each
                await asyncio.sleep(UNLOAD_RETRY_S)
        finally:
            if not removed.done():
                removed.cancel()

    async def _try_unload(
        self, key: VersionKey, version: ServedVersion, removed: asyncio.Future[None]
    ) -> bool:
        """Whether the engine has let go of it for sure."""
        try:
            await self._shard.unload(version)
        except EngineError as error:
            # Its place is not free: a load into it might be one too many for the engine.
            if not removed.done():
                logger.error("%s: %s may not be removed yet: %s", self.shard, key, error)
                removed.set_exception(error)
            return False
        if not removed.done():
            removed.set_result(None)
        return True

    def _left(self, key: VersionKey, task: asyncio.Task[None]) -> None:
        del self._leaving[key]
        self._note_count()
        self._changed.set()
        retrieve(task)

    def _note_count(self) -> None:
        self._observe_resident(self.shard, len(self._places) + len(self._leaving))

    def _recent_failure(self, key: VersionKey) -> _Failure | None:
        failure = self._failures.get(key)
        if failure is not None and time.monotonic() - failure.time_s > FAILURE_KEPT_S:
            del self._failures[key]
            return None
        return failure


def _fault_of(error: EngineError) -> LoadFault:
    if isinstance(error, AdapterLoadFailed):
        return error.fault
    return LoadFault.SHARD if isinstance(error, ShardUnavailable) else LoadFault.OTHER
