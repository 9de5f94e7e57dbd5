"""A container's limit counts, and not the machine that it sees."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.cgroup import CgroupMemory, cgroup_memory
from trainer.devices import cpu_memory

GIB = 1024**3
UNLIMITED_V1 = 0x7FFFFFFFFFFFF000


def machine(root: Path, cgroup: str, *, total_gib: int = 64, available_gib: int = 60) -> Path:
    """A system's root with that much memory, and a process in that group."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    lines = f"MemTotal: {total_gib * 2**20} kB\nMemAvailable: {available_gib * 2**20} kB\n"
    (root / "proc/meminfo").write_text(lines)
    return root


def group(
    folder: Path, limit: str, used_bytes: int, idle: str = "", *, names: tuple[str, str]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(names, (limit, str(used_bytes)), strict=True):
        (folder / name).write_text(f"{text}\n")
    if idle:
        (folder / "memory.stat").write_text(f"anon 1\n{idle}\nother 2\n")


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
V2 = ("memory.max", "memory.current")


def test_a_machine_without_groups_has_what_it_says(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/\n")
    assert list(cgroup_memory(root)) == []
    assert cpu_memory(root) == (64 * GIB, 60 * GIB)
    (root / "proc/self/cgroup").unlink()
    assert cpu_memory(root) == (64 * GIB, 60 * GIB)


@pytest.mark.parametrize("path", ["/", "/pod/box", "/../else"])
def test_the_limit_of_a_container_counts(tmp_path: Path, path: str) -> None:
    root = machine(tmp_path, f"0::{path}\n")
    group(root / "sys/fs/cgroup", str(4 * GIB), 3 * GIB, names=V2)
    assert cpu_memory(root) == (4 * GIB, 1 * GIB)


def test_the_tightest_group_of_those_above_counts(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/pod/box/inner\n")
    groups = root / "sys/fs/cgroup"
    group(groups / "pod/box/inner", "max", GIB, names=V2)
    group(groups / "pod/box", str(8 * GIB), 2 * GIB, names=V2)
    group(groups / "pod", str(32 * GIB), 30 * GIB, names=V2)
    assert list(cgroup_memory(root)) == [
        CgroupMemory(8 * GIB, 6 * GIB),
        CgroupMemory(32 * GIB, 2 * GIB),
    ]
    assert cpu_memory(root) == (8 * GIB, 2 * GIB)


def test_files_that_are_only_kept_in_memory_do_not_count_as_used(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/\n")
    idle = f"inactive_file {2 * GIB}"
    group(root / "sys/fs/cgroup", str(4 * GIB), 4 * GIB, idle, names=V2)
    assert cpu_memory(root) == (4 * GIB, 2 * GIB)


def test_a_group_that_is_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/\n")
    group(root / "sys/fs/cgroup", str(4 * GIB), 5 * GIB, names=V2)
    assert cpu_memory(root) == (4 * GIB, 0)


def test_version_1_is_read_where_it_manages_memory(tmp_path: Path) -> None:
    root = machine(tmp_path, "9:name=systemd:/\n4:cpu,memory:/docker/box\n0::/\n")
    groups = root / "sys/fs/cgroup/memory"
    idle = f"total_inactive_file {GIB}"
    group(groups / "docker/box", str(4 * GIB), 3 * GIB, idle, names=V1)
    group(groups, str(UNLIMITED_V1), 9 * GIB, names=V1)
    group(root / "sys/fs/cgroup", "1", 1, names=V2)  # not in charge
    assert cpu_memory(root) == (4 * GIB, 2 * GIB)


def test_the_machine_counts_where_it_has_less_than_the_limit(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/\n", total_gib=8, available_gib=1)
    group(root / "sys/fs/cgroup", str(16 * GIB), GIB, names=V2)
    assert cpu_memory(root) == (8 * GIB, 1 * GIB)
