"""What the job store of a host does while it is crashed: each of its methods that write."""

from __future__ import annotations

from store.job_records import EventKind, Intent, JobChange, JobState, NewEvent, NewJob
from tests.store.crash.host import Host, Operation

_SHA256 = "1" * 64


async def _add_dataset(host: Host, name: str) -> object:
    return await host.jobs.add_dataset("acme", name, sha256=_SHA256, size_bytes=9, format="chat")


async def _remove_dataset(host: Host, name: str) -> object:
    is_last = await host.jobs.remove_dataset("acme", name)
    return "the last name" if is_last else "one of its names"


async def _create(host: Host, request_id: str) -> object:
    new = NewJob("acme", "", "pirate", "sea", "", {"steps": 9}, {"of": request_id})
    return await host.jobs.create_job(
        new,
        effective_spec={"steps": 9, "seed": 1},
        fingerprints={"weights_sha256": _SHA256},
        publication={"state": "pending"},
        request_id=request_id,
        max_active=9,
    )


async def _change(host: Host, change: JobChange) -> object:
    (key,) = await host.jobs.active_jobs()
    return await host.jobs.change_job(await host.jobs.job(*key), change)


async def _cancel(host: Host) -> object:
    (key,) = await host.jobs.active_jobs()
    return await host.jobs.intend(*key, Intent.CANCEL)


async def _delete(host: Host) -> object:
    (job,) = await host.jobs.jobs("acme", limit=9)
    return await host.jobs.delete_job("acme", job.name)


def _moves(name: str, change: JobChange) -> Operation:
    return Operation(name, lambda host: _change(host, change))


_STEPS = [NewEvent(EventKind.PROGRESS, {"step": step, "loss": 1.5}) for step in range(100)]

JOBS = (
    Operation("open", Host.open),
    Operation("add a dataset", lambda host: _add_dataset(host, "sea")),
    Operation("give it another name", lambda host: _add_dataset(host, "ocean")),
    Operation("make a job", lambda host: _create(host, "first")),
    Operation("repeat the request of the job", lambda host: _create(host, "first")),
    _moves("queue it", JobChange(state=JobState.QUEUED)),
    _moves("start it", JobChange(state=JobState.PREPARING, attempt=1, device="cpu")),
    _moves("run it", JobChange(state=JobState.RUNNING, ingested_bytes=70)),
    _moves("tell 100 steps", JobChange(events=_STEPS, ingested_bytes=7000)),
    Operation("want it cancelled", _cancel),
    _moves("cancel it", JobChange(state=JobState.CANCELLING)),
    _moves("end it", JobChange(state=JobState.CANCELLED)),
    Operation("delete it", _delete),
    Operation("remove the dataset", lambda host: _remove_dataset(host, "sea")),
    Operation("remove its other name", lambda host: _remove_dataset(host, "ocean")),
    Operation("end", Host.close),
)
