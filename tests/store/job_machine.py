"""Any course of jobs, against a model: states, epochs, and events that have no gap."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from store.job_records import (
    TRANSITIONS,
    EventKind,
    Intent,
    JobActive,
    JobChange,
    JobChanged,
    JobRecord,
    JobState,
    JobTransitionRefused,
    NewEvent,
)
from tests.store.job_steps import MakeJobs, add_dataset, create

_database = itertools.count()
CHOICE = st.integers(0, 2**30)
STRENGTH = {Intent.RUN: 0, Intent.PAUSE: 0, Intent.CANCEL: 1, Intent.DISCARD: 2}
"""Of two wishes the later one counts, unless it is weaker."""

T = TypeVar("T")


@dataclass
class Model:
    """What a job should be."""

    seen: JobRecord
    """As the last change answered."""
    kinds: list[EventKind]
    """Of its events."""
    intent: Intent = Intent.RUN


class JobMachine(RuleBasedStateMachine):
    """Several jobs of one tenant; who changes them has sometimes seen an older state."""

    def __init__(self, make_jobs: MakeJobs) -> None:
        super().__init__()
        # A loop of its own: these tests are no coroutines, and the session's is not theirs.
        self.loop = asyncio.new_event_loop()
        self.context = make_jobs(f"jobs-{next(_database)}")
        self.store = self.run(self.context.__aenter__())
        self.run(add_dataset(self.store))
        self.models: list[Model] = []
        self.stale: list[JobRecord] = []

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(call)

    def teardown(self) -> None:
        self.run(self.context.__aexit__(None, None, None))
        self.run(self.loop.shutdown_default_executor())
        self.loop.close()

    @precondition(lambda self: len(self.models) < 4)
    @rule()
    def make(self) -> None:
        self.models.append(Model(self.run(create(self.store)), [EventKind.STATE_CHANGED]))

    @precondition(lambda self: self.models)
    @rule(
        choice=CHOICE,
        state=st.sampled_from(JobState),
        steps=st.integers(0, 3),
        intent=st.none() | st.sampled_from(Intent),
    )
    def move(self, choice: int, state: JobState, steps: int, intent: Intent | None) -> None:
        model = self.models[choice % len(self.models)]
        told = [NewEvent(EventKind.PROGRESS, {})] * steps
        change = JobChange(state=state, intent=intent, events=told)
        if state in TRANSITIONS[model.seen.state]:
            self.stale.append(model.seen)
            changed = self.run(self.store.change_job(model.seen, change))
            assert (changed.state, changed.epoch) == (state, model.seen.epoch + 1)
            model.seen = changed
            if intent is not None and STRENGTH[intent] >= STRENGTH[model.intent]:
                model.intent = intent
            model.kinds += [EventKind.STATE_CHANGED, *[EventKind.PROGRESS] * steps]
        else:
            with pytest.raises(JobTransitionRefused):
                self.run(self.store.change_job(model.seen, change))

    @precondition(lambda self: self.models)
    @rule(choice=CHOICE, events=st.lists(st.sampled_from(EventKind), max_size=3))
    def tell(self, choice: int, events: list[EventKind]) -> None:
        model = self.models[choice % len(self.models)]
        change = JobChange(events=[NewEvent(kind, {}) for kind in events])
        model.seen = self.run(self.store.change_job(model.seen, change))
        model.kinds += events

    @precondition(lambda self: self.stale)
    @rule(choice=CHOICE, state=st.none() | st.sampled_from(JobState))
    def change_what_was_not_seen(self, choice: int, state: JobState | None) -> None:
        seen = self.stale[choice % len(self.stale)]
        with pytest.raises(JobChanged):
            self.run(self.store.change_job(seen, JobChange(state=state, progress={"step": 1})))

    @precondition(lambda self: self.models)
    @rule(choice=CHOICE, intent=st.sampled_from(Intent))
    def intend(self, choice: int, intent: Intent) -> None:
        model = self.models[choice % len(self.models)]
        if not model.seen.state.is_final and STRENGTH[intent] >= STRENGTH[model.intent]:
            model.intent = intent
        self.run(self.store.intend("acme", model.seen.name, intent))

    @precondition(lambda self: self.models)
    @rule(choice=CHOICE)
    def delete(self, choice: int) -> None:
        model = self.models[choice % len(self.models)]
        call = self.store.delete_job("acme", model.seen.name)
        if model.seen.state.is_final:
            self.run(call)
            self.models.remove(model)
            self.stale.append(model.seen)
        else:
            with pytest.raises(JobActive):
                self.run(call)

    @invariant()
    def the_store_stands_where_the_model_does(self) -> None:
        jobs = self.run(self.store.jobs("acme", limit=99))
        assert [job.uid for job in jobs] == [model.seen.uid for model in reversed(self.models)]
        active = [model.seen.key for model in self.models if not model.seen.state.is_final]
        assert self.run(self.store.active_jobs()) == active
        for job, model in zip(reversed(jobs), self.models, strict=True):
            assert (job.state, job.epoch) == (model.seen.state, model.seen.epoch)
            assert job.intent is model.intent
            assert job.progress is None
            assert job.last_sequence == len(model.kinds)
            events = self.run(self.store.job_events("acme", job.name, after=0, limit=999))
            assert [event.sequence for event in events] == list(range(1, len(events) + 1))
            assert [event.kind for event in events] == model.kinds
