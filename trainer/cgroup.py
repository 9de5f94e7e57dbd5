"""What a cgroup leaves of the machine's memory: a container sees all of it, and has its limit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

NO_LIMIT = "max"
"""What version 2 says where there is none. Version 1 says a number above any machine's memory."""


@dataclass(frozen=True, slots=True)
class CgroupMemory:
    """Memory of one group."""

    limit_bytes: int
    available_bytes: int
    """Of the limit, what is not used by anything that would have to stay."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a version of cgroups has what is asked for."""

    mount: str
    limit: str
    usage: str
    idle_cache: str
    """The field of `memory.stat`."""


_V1 = _Layout(
    "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
)
_V2 = _Layout("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def cgroup_memory(root: Path = Path("/")) -> Iterator[CgroupMemory]:
    """Each limit that this process has to keep, of its group and of those above it.

    `root` has `proc` and `sys`. Raises nothing: a system without cgroups limits nothing.
    """
    layout, group = _V2, PurePosixPath("/")
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            group = PurePosixPath(path)
        elif "memory" in controllers.split(","):  # there, it is not managed by version 2
            layout, group = _V1, PurePosixPath(path)
            break
    mount = root / layout.mount
    # Without a namespace of its own a container sees the path on the machine and mounts its own
    # group: what is not there is passed by, up to the mount itself.
    for folder in (group, *group.parents):
        if ".." not in folder.parts and (found := _memory(mount / str(folder)[1:], layout)):
            yield found


def _memory(folder: Path, layout: _Layout) -> CgroupMemory | None:
    limit, usage = _text(folder / layout.limit).strip(), _text(folder / layout.usage).strip()
    if not limit or not usage or limit == NO_LIMIT:
        return None
    # Files that were read and are not in use go when memory is needed, as in MemAvailable.
    stat = dict(line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines())
    left = int(limit) - int(usage) + int(stat.get(layout.idle_cache, 0))
    return CgroupMemory(int(limit), min(int(limit), max(0, left)))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
