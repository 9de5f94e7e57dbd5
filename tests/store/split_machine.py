"""Any course of versions, splits, promotions and rollbacks, against a stack of splits."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from store.records import (
    Arm,
    EtagMismatch,
    NothingToRollBack,
    VersionInUse,
    VersionNotReady,
    VersionUnknown,
)
from tests.store.registry_steps import ACTOR, MakeRegistry, begin, content

SQL = ("acme", "sql")
NUMBERS = st.integers(1, 6)
_database = itertools.count()

T = TypeVar("T")


class SplitMachine(RuleBasedStateMachine):
    """One adapter. The model: a stack of splits, the top one stands; a rollback pops it."""

    def __init__(self, make_registry: MakeRegistry) -> None:
        super().__init__()
        # A loop of its own: these tests are no coroutines, and the session's is not theirs.
        self.loop = asyncio.new_event_loop()
        self.context = make_registry(f"splits-{next(_database)}")
        self.registry = self.run(self.context.__aenter__())
        self.stack: list[dict[int, int]] = []
        self.ready: set[int] = set()
        self.made = 0
        self.revision = 0
        self.events = 0

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(call)

    def teardown(self) -> None:
        self.run(self.context.__aexit__(None, None, None))
        self.run(self.loop.shutdown_default_executor())
        self.loop.close()

    def push(self, split: dict[int, int]) -> None:
        self.stack.append(split)
        self.changed()

    def changed(self) -> None:
        self.revision += 1
        self.events += 1

    @rule(take_traffic=st.booleans(), good=st.booleans())
    def make(self, take_traffic: bool, good: bool) -> None:
        self.made = self.run(begin(self.registry, take_traffic=take_traffic)).version
        self.events += 2
        if not good:
            self.run(self.registry.fail_version(*SQL, self.made, ["bad"], actor=ACTOR))
            return
        self.run(self.registry.complete_version(*SQL, self.made, content(), actor=ACTOR))
        self.ready.add(self.made)
        if take_traffic and not self.revision:
            self.push({self.made: 100})

    @precondition(lambda self: self.made)
    @rule(split=st.dictionaries(NUMBERS, st.integers(1, 9), max_size=4), stale=st.booleans())
    def set_traffic(self, split: dict[int, int], stale: bool) -> None:
        etag = f"t{self.revision + 1}" if stale else f"t{self.revision}"
        arms = [Arm(version, weight) for version, weight in split.items()]
        call = self.registry.set_traffic(*SQL, arms, etag=etag, actor=ACTOR)
        if stale:
            with pytest.raises(EtagMismatch):
                self.run(call)
        elif split.keys() <= self.ready:
            self.run(call)
            self.push(split)
        else:
            with pytest.raises((VersionNotReady, VersionUnknown)):
                self.run(call)

    @precondition(lambda self: self.made)
    @rule(version=NUMBERS)
    def promote(self, version: int) -> None:
        call = self.registry.promote(*SQL, version, actor=ACTOR)
        if version in self.ready:
            self.run(call)
            self.push({version: 100})
        else:
            with pytest.raises((VersionNotReady, VersionUnknown)):
                self.run(call)

    @precondition(lambda self: self.made)
    @rule()
    def roll_back(self) -> None:
        call = self.registry.roll_back(*SQL, actor=ACTOR)
        if len(self.stack) > 1 and self.stack[-2].keys() <= self.ready:
            self.run(call)
            self.stack.pop()
            self.changed()
        else:
            with pytest.raises(NothingToRollBack):
                self.run(call)

    @precondition(lambda self: self.ready)
    @rule(data=st.data())
    def drain(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(sorted(self.ready)))
        call = self.registry.drain_version(*SQL, version, actor=ACTOR)
        if self.stack and version in self.stack[-1]:
            with pytest.raises(VersionInUse):
                self.run(call)
        else:
            self.run(call)
            self.ready.remove(version)
            self.events += 1

    @precondition(lambda self: self.made)
    @invariant()
    def the_registry_stands_where_the_model_does(self) -> None:
        split = self.stack[-1] if self.stack else {}
        ((adapter, ready),) = self.run(self.registry.snapshot())
        assert adapter.arms == tuple(Arm(version, split[version]) for version in sorted(split))
        assert adapter.traffic_revision == self.revision
        assert adapter.latest_version == self.made
        assert set(ready) == self.ready
        events = self.run(self.registry.events("acme", after=0, limit=1000))
        assert [event.sequence for event in events] == list(range(1, self.events + 1))
