"""Which adapters have series of their own, and what all others are called in a label.

A series is for ever. In multiprocess mode a child that is removed stays in its file, and in a
list of prometheus_client's own (prometheus_client/values.py:57), and with each scrape it is read
again. So names are few, the host gives them out, and it gives no more than so many in its life
(ADR 6).
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Mapping
from itertools import islice

from engine.ring import AdapterKey

OTHER_LABEL = "(other)"
"""Stands for all adapters that are not named; no adapter can be called that."""

MAX_NAMED = 200
"""Adapters that have a name in labels at once. Gateways with no more adapters name them all."""
MAX_NAMES_GIVEN = 2 * MAX_NAMED
"""In the life of one gateway. An adapter that is called in all ways takes 70 kB of each worker, and
1 to 2 ms of each scrape for each worker that there ever was (docs/benchmarks.md)."""
OUTRANKS = 2.0
"""How many times the tokens of a named adapter another has that takes its place."""
LEAST_SHARE = 1 / (10 * MAX_NAMED)
"""Of all tokens, for an adapter that takes a place: with many adapters of which each has next to
nothing, who has a little more is chance."""


class Dropped(enum.Enum):
    """Why an adapter that is called has no series of its own; the values are a metric's label."""

    RANK = "rank"
    """Others have more traffic."""
    SPENT = "spent"
    """The gateway has given all names that it gives in its life."""


class AdapterLabels:
    """The names as a process knows them, for the labels of its metrics."""

    def __init__(self, named: frozenset[AdapterKey] = frozenset()) -> None:
        self.named = named
        """Replaced as a whole, when the host says so."""

    def of(self, key: AdapterKey) -> str:
        """What an adapter is called in labels."""
        return key.adapter if key in self.named else OTHER_LABEL


class AdapterNames:
    """Gives out the names. One process does.

    While there are no more adapters than names, each has one from the moment when it can be
    called. Later it is the tokens that count: who has a name keeps it until another clearly
    outranks it.
    """

    def __init__(self) -> None:
        self.named: frozenset[AdapterKey] = frozenset()
        """Those with a name now."""
        self._usable: set[AdapterKey] = set()
        self._given: set[AdapterKey] = set()
        """All that ever had one, and may have series."""
        self._dropped: dict[AdapterKey, Dropped] = {}
        """Those that are called now and have no name."""

    @property
    def given(self) -> int:
        """How many names were given so far."""
        return len(self._given)

    def show(self, key: AdapterKey, usable: bool) -> bool:
        """Hear whether an adapter can be called from now on. Returns whether names changed."""
        before = self.named
        if usable:
            self._usable.add(key)
            if len(self._usable) <= MAX_NAMED:
                self._name([key])
        else:
            self._usable.discard(key)
            self.named -= {key}
        return self.named != before

    def show_all(self, keys: Collection[AdapterKey]) -> None:
        """Hear which adapters can be called when the gateway starts."""
        self._usable.update(keys)
        if len(self._usable) <= MAX_NAMED:
            self._name(keys)

    def rank(self, shares: Mapping[AdapterKey, float]) -> list[Dropped]:
        """Give names to those with the largest shares of the tokens; `shares` has the largest
        first. Returns why adapters are counted under OTHER_LABEL that were not before."""
        called = [key for key in shares if key in self._usable]
        free = MAX_NAMED - len(self.named)
        # No more adapters than names: each gets one, as far as there are any left to give.
        waiting = list(self._usable) if len(self._usable) <= MAX_NAMED else called
        self._name(islice((key for key in waiting if key not in self.named), free))
        self._displace(shares, [key for key in called if key not in self.named])
        return self._note_dropped(called)

    def _displace(self, shares: Mapping[AdapterKey, float], others: list[AdapterKey]) -> None:
        """Let those of `others` in who clearly outrank the least of the named."""
        if len(self.named) < MAX_NAMED:
            return
        weakest = sorted(self.named, key=lambda key: (shares.get(key, 0.0), key))
        for least, other in zip(weakest, others, strict=False):
            outranked = shares[other] > OUTRANKS * shares.get(least, 0.0)
            if not outranked or shares[other] < LEAST_SHARE:
                return
            if self._may_name(other):
                self.named -= {least}
                self._name([other])

    def _may_name(self, key: AdapterKey) -> bool:
        return key in self._given or len(self._given) < MAX_NAMES_GIVEN

    def _name(self, keys: Iterable[AdapterKey]) -> None:
        for key in keys:
            if self._may_name(key):
                self._given.add(key)
                self.named |= {key}

    def _note_dropped(self, called: list[AdapterKey]) -> list[Dropped]:
        before, self._dropped = (
            self._dropped,
            {
                key: Dropped.RANK if self._may_name(key) else Dropped.SPENT
                for key in called
                if key not in self.named
            },
        )
        return [reason for key, reason in self._dropped.items() if key not in before]
