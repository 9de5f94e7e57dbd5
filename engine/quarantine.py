"""Who crashed an engine twice, and is kept from it for a while.

    crash -> its requests are suspects -> seen in a second crash: quarantined -> released
                    '-> answered to the end somewhere: no suspect any more

One crash accuses all that were computed in it, and the second one tells them apart. Pure: the
clock is its owner's, which is the host.
"""

from __future__ import annotations

import enum
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from engine.step_record import Steps

WINDOW_S = 3600.0
"""Crashes further apart than that have nothing to do with each other."""
QUARANTINE_S = 3600.0
MAX_CRASHES = 16
"""Unexplained ones that are remembered."""
MAX_TOGETHER = 8
"""More requests than that in two crashes were there because they are always there."""
MAX_HELD = 256
"""In quarantine at once, of each kind. The oldest are released for more."""


class Kind(enum.Enum):
    """What is in quarantine; the values are a metric's label."""

    REQUEST = "request"
    ADAPTER_VERSION = "adapter_version"


@dataclass(frozen=True, slots=True)
class Quarantined:
    """All that is in quarantine, as every process knows it."""

    requests: Mapping[int, float] = field(default_factory=dict)
    """Until when, in seconds since the epoch, by fingerprint."""
    versions: Mapping[str, float] = field(default_factory=dict)
    """The same by `ServedVersion.lora_name`."""
    suspects: frozenset[int] = frozenset()
    """Fingerprints that were in one crash. Whoever sees one answered to its end says so."""


@dataclass(slots=True)
class _Crash:
    """One that nobody is quarantined for yet."""

    time_s: float
    fresh: set[int]
    requests: set[int]
    versions: set[str]


class Quarantine:
    """The host's memory of crashes. Bounded, and gone with the host."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """`clock` tells seconds since the epoch."""
        self._clock = clock
        self._crashes: deque[_Crash] = deque(maxlen=MAX_CRASHES)
        self._requests: dict[int, float] = {}
        self._versions: dict[str, float] = {}

    @property
    def state(self) -> Quarantined:
        """What every process should know now."""
        self._forget()
        suspects = frozenset().union(*(crash.requests for crash in self._crashes))
        return Quarantined(dict(self._requests), dict(self._versions), suspects)

    def crashed(self, steps: Steps) -> list[tuple[Kind, int | str]]:
        """Note what an engine was computing when it crashed. Returns who is quarantined for it.

        Judged in this order, and the first that names somebody stands:
        1. Requests that were in their first step in two crashes: most that crash do so at once.
        2. Requests that were in two crashes.
        3. The one version that was in two crashes, with no other and not the base model.
        Crashes that are explained so accuse nobody else. The base model is never quarantined.
        """
        self._forget()
        now = _Crash(
            self._clock(),
            {request.fingerprint for request in steps.fresh},
            {request.fingerprint for request in steps.requests},
            set(steps.versions),
        )
        # A fingerprint in quarantine that is here all the same came before it was, elsewhere.
        now.requests -= self._requests.keys()
        now.fresh &= now.requests
        if not now.requests:
            return []
        guilty: list[tuple[Kind, int | str]]
        if requests := self._in_two(now):
            self._hold(self._requests, requests)
            guilty = [(Kind.REQUEST, fingerprint) for fingerprint in sorted(requests)]
            self._crashes = _without(
                [*self._crashes, now], lambda crash: not crash.requests.isdisjoint(requests)
            )
        elif version := self._version_in_two(now):
            self._hold(self._versions, {version})
            guilty = [(Kind.ADAPTER_VERSION, version)]
            self._crashes = _without([*self._crashes, now], lambda crash: version in crash.versions)
        else:
            guilty = []
            self._crashes.append(now)
        return guilty

    def _in_two(self, now: _Crash) -> set[int]:
        in_both = (
            [crash.fresh & now.fresh for crash in self._crashes],
            [crash.requests & now.requests for crash in self._crashes],
        )
        for common in in_both:
            times = Counter(itertools.chain(*common))
            # Of too many, those that were in more crashes than the others.
            most = max(times.values(), default=0)
            for least in (1, most):
                found = {fingerprint for fingerprint, count in times.items() if count >= least}
                if 0 < len(found) <= MAX_TOGETHER:
                    return found
        return set()

    def _version_in_two(self, now: _Crash) -> str | None:
        common = {version for crash in self._crashes for version in crash.versions & now.versions}
        return common.pop() or None if len(common) == 1 else None

    def acquit(self, fingerprint: int) -> None:
        """An engine answered it to its end: crashes so far were not its doing."""
        for crash in self._crashes:
            crash.requests.discard(fingerprint)
            crash.fresh.discard(fingerprint)

    def lift(self, kind: Kind, name: int | str) -> bool:
        """Release one at once, by fingerprint or `ServedVersion.lora_name`. False if it is not in
        quarantine."""
        self._forget()
        held: dict[int, float] | dict[str, float]
        held = self._requests if kind is Kind.REQUEST else self._versions
        return held.pop(name, None) is not None  # type: ignore[arg-type]  # the kind says which

    def holds_version(self, lora_name: str) -> bool:
        """Whether this version is in quarantine."""
        return self._versions.get(lora_name, 0.0) > self._clock()

    def counts(self) -> dict[Kind, int]:
        """How many are in quarantine."""
        now_s = self._clock()
        held = (
            (Kind.REQUEST, [*self._requests.values()]),
            (Kind.ADAPTER_VERSION, [*self._versions.values()]),
        )
        return {kind: sum(until_s > now_s for until_s in untils) for kind, untils in held}

    def _hold(self, held: dict, names: Iterable[int | str]) -> None:  # type: ignore[type-arg]
        until_s = self._clock() + QUARANTINE_S
        for name in names:
            held[name] = until_s
        while len(held) > MAX_HELD:
            del held[next(iter(held))]

    def _forget(self) -> None:
        now_s = self._clock()
        while self._crashes and now_s - self._crashes[0].time_s >= WINDOW_S:
            self._crashes.popleft()
        self._requests = {k: until_s for k, until_s in self._requests.items() if until_s > now_s}
        self._versions = {k: until_s for k, until_s in self._versions.items() if until_s > now_s}


def _without(crashes: Iterable[_Crash], explained: Callable[[_Crash], bool]) -> deque[_Crash]:
    return deque((crash for crash in crashes if not explained(crash)), maxlen=MAX_CRASHES)
