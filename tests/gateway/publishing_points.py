"""The points of publishing a trained adapter at which a host may die: around all that lasts.

Used by a host that is killed at each of them in turn, and by a real gateway at some.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from gateway import gating, publishing
from store.artifacts import ArtifactStore
from store.job_records import JobChange
from store.sqlite_jobs import SqliteJobs
from store.sqlite_registry import SqliteRegistry

WRITES = ("begin_version", "complete_version", "fail_version", "set_traffic", "promote")


def install(reached: Callable[[str], None]) -> None:
    """Have it called at each point of this process, with the point's name: "before ..." a change,
    or "after ..." it is durable. It may be called by threads."""
    for name in WRITES:
        _wrap_async(SqliteRegistry, name, lambda *arguments, name=name: name, reached)
    _wrap_async(SqliteJobs, "change_job", _change, reached)
    _wrap(ArtifactStore, "stage", "stage", reached)
    _wrap(ArtifactStore, "_keep", "keep", reached)
    _wrap(publishing, "write_note", "write_note (begin)", reached)
    _wrap(gating, "write_note", "write_note (gate)", reached)


def _change(_store: SqliteJobs, _seen: Any, change: JobChange) -> str:
    what = change.state.value if change.state is not None else ""
    if change.publication is not None:
        what += f"publication {change.publication['state']}"
    return f"change_job ({what})"


def _wrap_async(
    owner: Any, attribute: str, name: Callable[..., str], reached: Callable[[str], None]
) -> None:
    function = getattr(owner, attribute)

    @functools.wraps(function)
    async def wrapped(*arguments: Any, **options: Any) -> Any:
        reached(f"before {name(*arguments)}")
        result = await function(*arguments, **options)
        reached(f"after {name(*arguments)}")
        return result

    setattr(owner, attribute, wrapped)


def _wrap(owner: Any, attribute: str, name: str, reached: Callable[[str], None]) -> None:
    function = getattr(owner, attribute)

    @functools.wraps(function)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        reached(f"before {name}")
        result = function(*arguments, **options)
        reached(f"after {name}")
        return result

    setattr(owner, attribute, wrapped)
