"""Processors of a machine, divided among the engines that run on them.

Each engine's threads are bound to processors of their own, as those of one engine alone are by
vLLM. Two engines on the same processors would each wait for the other in every step.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def usable() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def shares(shards: int) -> list[tuple[int, ...]]:
    """The processors of each shard, of those that this process may use.

    One of each core where there are cores for all, because the second thread of a core adds next
    to nothing to an engine. One processor is left to the gateway's own processes if each shard
    has one without it. Raises ValueError if there are fewer processors than shards.
    """
    processors = sorted(os.sched_getaffinity(0))
    cores = _one_of_each_core(processors)
    return divide(cores if len(cores) >= shards else processors, shards)


def divide(processors: list[int], shards: int) -> list[tuple[int, ...]]:
    """`processors` in `shards` runs of neighbours, as even as can be; see `shares`."""
    if len(processors) < shards:
        raise ValueError(
            f"{shards} shards on {len(processors)} processors would wait for each other; give "
            "each at least one of its own"
        )
    if len(processors) > shards:
        processors = processors[:-1]  # the last, as vLLM does
    bounds = [len(processors) * number // shards for number in range(shards + 1)]
    return [tuple(processors[begin:end]) for begin, end in itertools.pairwise(bounds)]


def _one_of_each_core(processors: list[int]) -> list[int]:
    """The last of each core, as vLLM takes it."""
    cores: dict[str, int] = {}
    for processor in processors:
        try:
            core = Path(_SIBLINGS.format(processor)).read_text().strip()
        except OSError:  # not told: as good as a core of its own
            core = f"{processor}"
        cores[core] = processor
    return sorted(cores.values())
