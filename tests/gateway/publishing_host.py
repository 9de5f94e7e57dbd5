"""Hosts that publish a trained adapter, and are killed while they do.

    python -m tests.gateway.publishing_host FOLDER

kills one host at each point of publishing, has another go on, and prints what came of it: one
`Outcome` a line. Each host is a fork of this process, which has imported everything and begun
nothing. All is real but the engine.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from gateway.catalog_library import CatalogLibrary
from store.datasets import DatasetFiles
from store.job_records import EventKind, JobChange, JobState, NewJob
from store.sqlite_jobs import SqliteJobs
from tests.engine.drafts import base_llama
from tests.engine.library import TENANT
from tests.gateway.publishing_points import install
from tests.gateway.trained import JOB, STEP, UID, Trained, resolved, trained
from tests.trainer.job_stage import CountingPreparations, served
from trainer.checkpoint import as_checkpoint, verify
from trainer.devices import CPU, Device
from trainer.events import Manifest, Publication, PublicationState
from trainer.ingest import as_json
from trainer.jobs import Jobs
from trainer.spec import PublishSpec

PERCENT = 30
"""That the new version gets of what the one before it has."""


class Outcome(BaseModel):
    """What there is once a host has published what another was killed with."""

    point: str
    killed: bool
    """Whether the first one reached the point, and died there."""
    versions: dict[int, str]
    """States."""
    traffic: dict[int, int]
    job: str
    """Its state."""
    ends: list[str]
    """Final states that its events tell."""
    served: int
    """How often they tell that it serves."""
    sequences_whole: bool
    stored: int
    """Adapters whose files are kept."""
    left_over: list[str]


def main(folder: Path) -> None:
    """Kill a host at each point that there is."""
    points = _points(folder / "counted")
    for number, point in enumerate(points, 1):
        root = folder / str(number)
        _prepared(root)
        killed = _fork(_host, root, number) == -signal.SIGKILL
        _fork(_host, root, 0)
        outcome = root / "outcome.json"
        _fork(_look, root, point, killed, outcome)
        print(outcome.read_text(), flush=True)


def _points(root: Path) -> list[str]:
    """Names of all points that a host passes that nobody kills."""
    _prepared(root)
    _fork(_host, root, 0)
    return (root / "points").read_text().splitlines()


def _prepared(root: Path) -> None:
    root.mkdir()
    _fork(_prepare, root)


def _fork(work: Callable[..., Coroutine[None, None, None]], *arguments: Any) -> int:
    """Do it in a process of its own; its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            asyncio.run(work(*arguments))
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code > 0:
        sys.exit("a host failed")
    return code


async def _prepare(root: Path) -> None:
    """A job that is trained, of an adapter of which a version has all the traffic."""
    async with trained(root) as at, _jobs(root) as store:
        await at.library.make_ready(at.library.source("before"))
        folder = at.checkpoint()
        checkpoint = as_checkpoint(folder, verify(folder), 1, final=True)
        spec = as_json(resolved(publish=PublishSpec(traffic_percent=PERCENT)))
        await store.add_dataset(TENANT, "faq", sha256="d" * 64, size_bytes=1, format="")
        job = await store.create_job(
            NewJob(TENANT, JOB, "sql", "faq", "", {"dataset": "faq", "adapter": "sql"}),
            effective_spec=spec,
            fingerprints={},
            publication=as_json(Publication(state=PublicationState.PENDING, adapter="sql")),
            request_id="",
            max_active=10,
        )
        manifest = Manifest(
            dataset_sha256="d" * 64,
            rows_sha256="0" * 64,
            base_model="tiny",
            fingerprints={},
            versions={},
            seed=1,
            device="cpu",
            files={},
            final_loss=0.5,
            effective_spec={},
            checkpoint=checkpoint,
        )
        for change in (
            JobChange(state=JobState.QUEUED),
            JobChange(state=JobState.PREPARING, attempt=1, device=CPU),
            JobChange(state=JobState.RUNNING),
            JobChange(state=JobState.FINALIZING, manifest=as_json(manifest)),
        ):
            job = await store.change_job(job, change)
    assert checkpoint.step == STEP


async def _host(root: Path, kill_at: int) -> None:
    """Publish what is trained; die at the point of that number, from 1."""
    passed = 0

    def reached(name: str) -> None:
        nonlocal passed
        passed += 1
        if passed == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with (root / "points").open("a") as file:
            file.write(f"{name}\n")

    install(reached)
    async with trained(root) as at, _jobs(root) as store:
        await at.library.catalog.resume()
        jobs = Jobs(
            store,
            DatasetFiles(root / "state"),
            CountingPreparations(root),
            at.publisher,
            served(root),
            [Device(CPU)],
            root / "state",
            library=CatalogLibrary(at.library.catalog, at.library.registry, base_llama().linear),
            python=sys.executable,
            environment={},
        )
        running = asyncio.create_task(jobs.run())
        while not (await store.job(TENANT, JOB)).state.is_final:
            await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await jobs.close()


async def _look(root: Path, point: str, killed: bool, into: Path) -> None:
    async with trained(root) as at, _jobs(root) as store:
        job = await store.job(TENANT, JOB)
        events = await store.job_events(TENANT, JOB, after=0, limit=1000)
        states = [e.payload["state"] for e in events if e.kind is EventKind.STATE_CHANGED]
        published = [e.payload["state"] for e in events if e.kind is EventKind.PUBLICATION]
        outcome = Outcome(
            point=point,
            killed=killed,
            versions={n: (await at.library.state(n)).name for n in await at.versions()},
            traffic=await at.weights(),
            job=job.state.name,
            ends=[state for state in states if JobState(state).is_final],
            served=published.count(PublicationState.SERVING.value),
            sequences_whole=[e.sequence for e in events] == list(range(1, len(events) + 1)),
            stored=len(at.library.digests),
            left_over=_left_over(at, root),
        )
    await asyncio.to_thread(into.write_text, outcome.model_dump_json())


def _left_over(at: Trained, root: Path) -> list[str]:
    found = [*at.library.staged, *(root / "state" / "jobs").rglob("*.new")]
    return [str(path) for path in found]


def _jobs(root: Path) -> SqliteJobs:
    return SqliteJobs(root / "registry.sqlite", make_uid=lambda: UID)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
