"""Whether devices were given in a fair order, told from what the store wrote down alone.

It has the rules of `trainer/fair_order.py` in words of its own, and all events from the first one
on. A host hears of a job a moment after the store or before it; so every claim is a range, and what
may have been right is not judged.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from store.device_use import DeviceUse
from store.job_records import HAS_PROCESS, EventKind, JobEventRecord, JobRecord, JobState
from tests.trainer.simulation.machine import Broken

AGEING_S, HALF_LIFE_S, ADVANCE_S = 8.0, 20.0, 3.0
"""Of the simulation, in which jobs take seconds."""
QUEUED_S, GIVEN_S, HOST_S = 2.0, 1.0, 6.0
"""At the most: from QUEUED until it waits, from a device until PREPARING, and from a host's begin
until it knows all jobs."""
WISHED_S = 3.0
"""The same as GIVEN_S where somebody wished for something meanwhile."""
NEVER_S = math.inf


@dataclass(frozen=True, slots=True)
class Span:
    """A time for which a job was in some state."""

    begin_s: float
    end_s: float
    then: JobState | None = None

    def has(self, at_s: float) -> bool:
        return self.begin_s <= at_s < self.end_s


@dataclass(frozen=True, slots=True)
class Course:
    """What the store says of one job."""

    job: JobRecord
    calm: bool
    """Whether nobody wished for anything."""
    queued: Sequence[Span]
    preparing: Sequence[Span]
    held: Sequence[Span]

    @classmethod
    def of(cls, job: JobRecord, events: Iterable[JobEventRecord], calm: bool) -> Course:
        moves = [
            (event.time_ns / 1e9, JobState(event.payload["state"]))
            for event in events
            if event.kind is EventKind.STATE_CHANGED
        ]
        ends = [*moves[1:], (NEVER_S, None)]
        stays = [
            (state, Span(at_s, end_s, then))
            for (at_s, state), (end_s, then) in zip(moves, ends, strict=True)
        ]
        held, holds = list[Span](), False
        for state, span in stays:
            if state is JobState.PREPARING:
                held.append(span)
            elif holds and state in HAS_PROCESS:
                held[-1] = Span(held[-1].begin_s, span.end_s)
            holds = state is JobState.PREPARING or (holds and state in HAS_PROCESS)
        return cls(
            job,
            calm,
            [span for state, span in stays if state is JobState.QUEUED],
            [span for state, span in stays if state is JobState.PREPARING],
            held,
        )

    @property
    def slack_s(self) -> float:
        return GIVEN_S if self.calm else WISHED_S

    def waits(self, at_s: float) -> bool:
        """Whether it surely waits in the queue of a host that has long begun."""
        return self.calm and any(
            span.begin_s + QUEUED_S <= at_s < span.end_s - GIVEN_S for span in self.queued
        )


class Fairness:
    """All jobs of one story, once they have ended."""

    def __init__(self, courses: Sequence[Course], hosts_s: Sequence[float]) -> None:
        """`hosts_s` is when each host began."""
        self._courses = courses
        self._hosts_s = hosts_s

    def check(self) -> int:
        """Raise Broken where a device went to another than the next one; how often one went to a
        job while others waited."""
        judged = 0
        for course in self._courses:
            for span in course.held if course.calm else ():
                at_s = span.begin_s
                if max(each for each in self._hosts_s if each <= at_s) + HOST_S > at_s:
                    continue
                for other in self._courses:
                    if other is not course and other.waits(at_s - GIVEN_S):
                        judged += 1
                        self._judge(course, other, at_s)
        return judged

    def check_uses(self, uses: Iterable[DeviceUse], now_s: float) -> None:
        """Raise Broken unless the store counts what its events say."""
        told = {(use.tenant, use.priority): use.used_at(round(now_s * 1e9)) for use in uses}
        for key in {(course.job.tenant, course.job.priority) for course in self._courses}:
            had_s = sum(
                _remembered_s(span, now_s)
                for course in self._courses
                if (course.job.tenant, course.job.priority) == key
                for span in course.held
            )
            if abs(told.get(key, 0.0) - had_s) > 1e-5:
                raise Broken(f"{key} had {had_s} s of the devices, and not {told.get(key)}")

    def _judge(self, given: Course, other: Course, at_s: float) -> None:
        one, two = given.job, other.job
        what = f"{one.name} was given a device at {at_s:.2f} s before {two.name}"
        if one.priority != two.priority:
            ours, theirs = self._rank_s(one.priority, at_s), self._rank_s(two.priority, at_s)
            if theirs[0] > ours[1]:
                raise Broken(f"{what}, which comes first: {theirs}, {ours}")
        elif one.tenant != two.tenant:
            ours, theirs = self._used_s(one.tenant, at_s), self._used_s(two.tenant, at_s)
            if theirs[1] < ours[0]:
                raise Broken(f"{what}, whose tenant had less: {theirs}, {ours}")
        elif two.create_time_ns < one.create_time_ns:
            raise Broken(f"{what}, which is older")

    def _rank_s(self, priority: int, at_s: float) -> tuple[float, float]:
        """What a priority counts at the least and at the most, in seconds of waiting."""
        alike = [course for course in self._courses if course.job.priority == priority]
        given_s, maybe_s, queued_s, known_s = [0.0], [0.0], [at_s], [at_s]
        for course in alike:
            given = [each.begin_s for each in course.held if each.begin_s < at_s]
            given_s += [each - course.slack_s for each in given]
            maybe_s += given
            for span in course.queued:
                if span.begin_s < at_s and span.end_s > at_s - course.slack_s:
                    queued_s.append(span.begin_s)
                    if not course.calm:
                        maybe_s.append(at_s)
                elif span.end_s <= at_s and span.then is not JobState.PREPARING:
                    maybe_s.append(span.end_s)  # it may have been given one, and left it
            if course.waits(at_s - GIVEN_S):
                known_s += [each.begin_s for each in course.queued if each.has(at_s - GIVEN_S)]
            for span in course.preparing:
                if self._begun_in(span):  # a host that died may have left it to wait again
                    maybe_s.append(min(span.end_s, at_s))
                    if span.has(at_s):
                        queued_s.append(0.0)
        late_s, early_s = max(*maybe_s, min(known_s)), max(*given_s, min(queued_s))
        counts_s = priority * AGEING_S + at_s
        return counts_s - late_s - GIVEN_S, counts_s - early_s + GIVEN_S

    def _used_s(self, tenant: str, at_s: float) -> tuple[float, float]:
        """What a tenant had at the least and at the most."""
        least_s = most_s = 0.0
        for course in self._courses:
            if course.job.tenant != tenant:
                continue
            most_s += WISHED_S * (not course.calm) * len(course.queued)
            for span in course.held:
                if span.begin_s >= at_s + course.slack_s:
                    continue
                had_s = _remembered_s(span, at_s)
                slack_s = course.slack_s + 1.5 + HOST_S * self._begun_in(span)
                preparing = any(self._begun_in(each) for each in course.preparing)
                least_s += 0.0 if preparing else max(0.0, had_s - slack_s)
                holds = span.end_s > at_s - HOST_S
                most_s += max(had_s, ADVANCE_S * holds) + slack_s
        return least_s, most_s

    def _begun_in(self, span: Span) -> bool:
        return any(span.begin_s <= each <= span.end_s for each in self._hosts_s)


def _remembered_s(span: Span, at_s: float) -> float:
    """Seconds of a device that are not forgotten; each one is forgotten by itself."""
    rate = math.log(2) / HALF_LIFE_S
    end_s, begin_s = min(span.end_s, at_s), min(span.begin_s, at_s)
    return (math.exp(rate * (end_s - at_s)) - math.exp(rate * (begin_s - at_s))) / rate


def courses(
    told: Iterable[tuple[JobRecord, Sequence[JobEventRecord]]], wished: Collection[str]
) -> list[Course]:
    """Of jobs and their events; of those whose names are in `wished` something was wished."""
    return [Course.of(job, events, job.name not in wished) for job, events in told]
