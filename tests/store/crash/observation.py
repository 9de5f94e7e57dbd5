"""All that a host tells of its state: to compare two of them, and to judge one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from store.job_records import DatasetRecord, JobEventRecord, JobRecord
from store.records import (
    AdapterRecord,
    EventRecord,
    FeedbackSummary,
    VersionRecord,
    VersionState,
)
from tests.store.crash.host import Host

PAGE = 1000
"""More than a script makes of anything."""
SERVED = (VersionState.READY, VersionState.DRAINING)
"""Engines may be told to load these."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What there is, of all tenants."""

    adapters: tuple[AdapterRecord, ...]
    versions: tuple[VersionRecord, ...]
    events: tuple[EventRecord, ...]
    last_sequence: int
    feedback: tuple[tuple[int, FeedbackSummary], ...]
    """By version, adapter after adapter."""
    requests: tuple[VersionRecord | None, ...]
    """What each request id that was asked for had made."""
    artifacts: tuple[str, ...]
    """Digests that have a folder."""
    datasets: tuple[DatasetRecord, ...]
    jobs: tuple[tuple[JobRecord, tuple[JobEventRecord, ...]], ...]
    """Each with its events."""


async def observe(host: Host, requests: Sequence[tuple[str, str]]) -> Observation:
    """Ask an open host for everything; `requests` are tenants and request ids to look up."""
    registry = host.registry
    adapters = tuple(adapter for adapter, _ in await registry.snapshot())
    versions: list[VersionRecord] = []
    feedback: list[tuple[int, FeedbackSummary]] = []
    for found in adapters:
        name = found.tenant, found.adapter
        versions += await registry.versions(*name, limit=PAGE, deleted=True)
        scores = await registry.feedback(*name)
        feedback += [(version, scores[version]) for version in sorted(scores)]
    events: list[EventRecord] = []
    for tenant in sorted({found.tenant for found in adapters}):
        events += await registry.events(tenant, after=0, limit=PAGE)
    jobs = []
    for job in await host.jobs.jobs("acme", limit=PAGE):
        told = await host.jobs.job_events("acme", job.name, after=0, limit=PAGE)
        jobs.append((job, tuple(told)))
    return Observation(
        adapters=adapters,
        versions=tuple(versions),
        events=tuple(sorted(events, key=lambda event: event.sequence)),
        last_sequence=await registry.last_sequence(),
        feedback=tuple(feedback),
        requests=tuple([await registry.version_of_request(*request) for request in requests]),
        artifacts=tuple(sorted(path.name for path in (host.state_path / "adapters").iterdir())),
        datasets=tuple(await host.jobs.datasets("acme", limit=PAGE)),
        jobs=tuple(jobs),
    )


def contradictions(seen: Observation) -> list[str]:
    """What may be in no registry, whatever happened to it; empty if all is well."""
    wrong = []
    sequences = [event.sequence for event in seen.events]
    if sequences != list(range(1, seen.last_sequence + 1)):
        wrong.append(f"events {sequences} up to {seen.last_sequence} have a gap")
    for job, told in seen.jobs:
        if [event.sequence for event in told] != list(range(1, job.last_sequence + 1)):
            wrong.append(f"the events of job {job.name} up to {job.last_sequence} have a gap")
    numbers = Counter((each.tenant, each.adapter, each.version) for each in seen.versions)
    ids = Counter(each.lora_int_id for each in seen.versions)
    for what, count in [*numbers.items(), *ids.items()]:
        if count > 1:
            wrong.append(f"{what} was given out {count} times")
    ready = {
        (each.tenant, each.adapter, each.version)
        for each in seen.versions
        if each.state is VersionState.READY
    }
    for found in seen.adapters:
        for arm in found.arms:
            if (found.tenant, found.adapter, arm.version) not in ready:
                wrong.append(f"{found.adapter} sends traffic to {arm.version}, which is not READY")
    for each in seen.versions:
        if each.state in SERVED and (
            each.content is None or each.content.digest not in seen.artifacts
        ):
            wrong.append(f"{each.adapter} {each.version} is {each.state.name}, and has no files")
    return wrong
