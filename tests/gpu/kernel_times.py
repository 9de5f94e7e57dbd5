"""What vLLM's torch profiler recorded: time of the GPU by kernel."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path

from tests.gpu.turns import say

ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
MOST = 14


def newest(folder: Path, known: set[Path]) -> Path | None:
    """The trace that was written since `known`."""
    traces = [path for path in folder.glob("*.pt.trace.json*") if path not in known]
    return max(traces, key=lambda path: path.stat().st_mtime, default=None)


def show(name: str, trace: Path, steps: int) -> None:
    """Print the kernels that took most, and how much of the time the GPU computed."""
    opened = gzip.open if trace.suffix == ".gz" else open
    with opened(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    ours = [event for event in events if event.get("cat") in ON_GPU]
    ours = ours or [event for event in events if event.get("cat") == "cpu_op"]  # no GPU
    if not ours:
        say(f"{name}: nothing was recorded")
        return
    took_us: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    for event in ours:
        took_us[event["name"]] += event["dur"]
        count[event["name"]] += 1
    wall_us = max(event["ts"] + event["dur"] for event in ours) - min(e["ts"] for e in ours)
    busy_us = sum(took_us.values())
    lora_us = sum(us for kernel, us in took_us.items() if "lora" in kernel.lower())
    say(
        f"{name}: {steps} steps in {wall_us / 1000:.1f} ms, kernels {busy_us / 1000:.1f} ms "
        f"({busy_us / wall_us:.2f} of it), of that LoRA {lora_us / 1000:.1f} ms"
    )
    for kernel in sorted(took_us, key=took_us.__getitem__, reverse=True)[:MOST]:
        say(
            f"  {took_us[kernel] / steps:8.0f} us a step, {count[kernel] / steps:6.1f} times, "
            f"{took_us[kernel] / count[kernel]:7.1f} us each  {kernel[:90]}"
        )
