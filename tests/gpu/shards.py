"""Serves on two GPUs, kills an engine under load, and tells how the gateway does.

    PYTHONPATH=.:clients/python python tests/gpu/shards.py [--cpu] [--model MODEL]

Needs no network with the default model, which has random weights. What is asked for is what
`tests/e2e/test_shards.py` asks for on a CPU; here the engines are on GPUs of their own, compiled.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from engine.models import resolve_model
from tests.e2e.gateway_process import GatewayProcess, gateway_process
from tests.e2e.shard_calls import (
    NAMES,
    SPREAD,
    Stream,
    ask,
    ask_often,
    core_of,
    homes,
    loop_lags,
    restarts,
    until_up,
)
from tests.tiny_adapter import write_tiny_adapter

BACK_S = 240.0
VICTIM, OTHER = NAMES[1], NAMES[0]


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(description="Kill an engine of two on GPUs of their own.")
    parser.add_argument("--cpu", action="store_true", help="two engines on the CPU")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--utilization", default="0.5", help="share of each GPU's memory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpu-shards-") as folder:
        root = Path(folder)
        model = resolve_model(options.model, root / "state")
        adapters = {
            name: write_tiny_adapter(root / name, model, seed=int(name), rank=8) for name in SPREAD
        }
        flags = ["--shards", "2"]
        if not options.cpu:
            flags += ["--dtype", "bfloat16", "--gpu-memory-utilization", options.utilization]
        begun_s = time.monotonic()
        with gateway_process(
            root, model=options.model, workers=options.workers, adapters=adapters, extra=flags
        ) as gateway:
            print(f"serves after {time.monotonic() - begun_s:.1f} s")
            asyncio.run(kill_one(gateway, on_gpus=not options.cpu))


async def kill_one(gateway: GatewayProcess, *, on_gpus: bool) -> None:
    """Answers of all adapters before and after, and 40 streams in between."""
    if on_gpus:
        assert_on_gpus_of_their_own(gateway)
    before = await answers(gateway)
    print(
        f"{len(before) - 1} adapters and the base model answer from the shards that the ring names"
    )
    streams = [Stream(gateway.address, name) for name in (*SPREAD, "") for _ in range(6)][:40]
    for stream in streams:
        await stream.has_token.wait()
    assert not any(stream.done.done() for stream in streams), "all of them run"
    died, core, back = restarts(gateway, VICTIM), core_of(gateway, VICTIM), asyncio.Event()
    watching = asyncio.create_task(loop_lags(gateway, back))
    core.send_signal(signal.SIGKILL)
    killed_s = time.monotonic()
    await asyncio.gather(*(stream.done for stream in streams))
    hit = [stream for stream in streams if stream.shard == VICTIM]
    failed = [stream for stream in streams if stream.shard == OTHER and not stream.finished]
    ended_ms = [(stream.ended_s - killed_s) * 1000 for stream in hit]
    took_s = await until_up(gateway, VICTIM, died + 1, BACK_S)
    await asyncio.sleep(1.5)  # the workers attach within the last second
    back.set()
    lags_ms = sorted(lag * 1000 for lag in await watching)
    print(f"streams: {len(streams)}, of {VICTIM}: {len(hit)}, failed on {OTHER}: {len(failed)}")
    print(f"those of {VICTIM} ended within {max(ended_ms):.0f} ms")
    print(f"{VICTIM} was back after {took_s:.1f} s")
    print(f"loops late by {statistics.median(lags_ms):.1f} ms in the median, {lags_ms[-1]:.1f} max")
    if on_gpus:
        assert_on_gpus_of_their_own(gateway)
    after = await answers(gateway)
    same = sum(before[name] == after[name] for name in before)
    print(f"answers as before: {same} of {len(before)}")


async def answers(gateway: GatewayProcess) -> dict[str, str]:
    """A greedy answer of each adapter, at home. Fails where one is answered elsewhere."""
    found = {"": (await ask(gateway.address)).completions[0].text}
    for name, home in homes(SPREAD).items():
        each = await ask_often(gateway.address, name, 4)
        assert {answer.served_by.shard for answer in each} == {home}, name
        found[name] = each[0].completions[0].text
    assert len(set(found.values())) == len(found), "each adapter has an answer of its own"
    return found


def assert_on_gpus_of_their_own(gateway: GatewayProcess) -> None:
    """Each GPU has the memory of one core; where processes are told, they are the cores."""
    used_mib = [int(line) for line in smi("--query-gpu=memory.used")][: len(NAMES)]
    pids = [int(line) for line in smi("--query-compute-apps=pid")]
    cores = {core_of(gateway, shard).pid for shard in NAMES}
    print(f"GPUs have {used_mib} MiB in use, by processes {pids}; cores are {sorted(cores)}")
    assert len(used_mib) == len(NAMES) and min(used_mib) > 1024


def smi(query: str) -> list[str]:
    """What the driver's tool tells, by line."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return printed.split()


if __name__ == "__main__":
    main()
