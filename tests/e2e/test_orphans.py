"""The host is killed: what must end with it, what goes on, and what the next start finds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import grpc
import psutil
import pytest

from engine.core import CLIENT_SLOTS
from gateway.pid_file import FILE, Entries, Entry, PidFile
from lora_gateway.v1 import training_pb2 as pb
from lora_gateway.v1.training_pb2_grpc import TrainingStub
from tests.e2e import training
from tests.e2e.gateway_process import GatewayProcess, gateway_process
from tests.e2e.shard_calls import ask, core_of

GONE_S = 5.0
LONG = pb.Hyperparameters(
    epochs=1000,
    learning_rate=1e-4,
    quantization=pb.QUANTIZATION_NONE,
    precision=pb.PRECISION_FLOAT32,
)
"""Trains until it is killed."""

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]


async def test_orphans_are_none_when_the_host_is_killed_and_the_next_start_finds_its_job(
    adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    with contextlib.ExitStack() as left:
        with gateway_process(
            tmp_path, workers=2, adapters=adapters, extra=["--shards", "2"]
        ) as gateway:
            answer = (await ask(gateway.address, "alpha")).completions[0].text
            async with grpc.aio.insecure_channel(gateway.address) as channel:
                seen, reading = await train_and_read(gateway, channel)
                trainers = running(gateway.family(), "trainer.worker")
                left.callback(end, trainers)
                # One of each kind, and what is below them.
                family = running(gateway.family(), "")
                for kind in ("EngineCore", "VLLM::Worker", "spawn_main", "resource_tracker"):
                    assert running(family, kind), kind
                assert running(family, "trainer.prepare")
                assert {entry.what for entry in recorded(tmp_path)} == {
                    *("worker", "core of shard-0", "core of shard-1")
                }
                left_dir = gateway.run_dir
                sockets = sum(map(Path.is_socket, left_dir.iterdir()))
                assert sockets > 2 * 2 * CLIENT_SLOTS, "those of both cores are in it"
                assert [*left_dir.glob("pymp-*")], "so is that by which descriptors are handed on"
                # This one can see nothing any more.
                core_of(gateway, "shard-1").send_signal(signal.SIGSTOP)
                took_s = killed(gateway, [one for one in family if one not in trainers])
                await asyncio.gather(reading, return_exceptions=True)
                assert left_dir.exists(), "nobody was left to remove it"
            print(
                f"{len(family) - len(trainers)} processes were gone {took_s:.2f} s after the host"
            )
            assert all(trainer.is_running() for trainer in trainers), "training goes on"

        # As if one of its processes could not end: a disk or a driver held it up.
        stuck = left.enter_context(sleeper())
        PidFile(tmp_path / "state").add(stuck.pid, "core of shard-1")
        began_s = time.monotonic()
        with gateway_process(tmp_path, workers=1) as gateway:
            print(f"the next start served {time.monotonic() - began_s:.1f} s later")
            line = (
                f"process {stuck.pid} (core of shard-1) was left by a gateway that is gone: killed"
            )
            assert gateway.log.index(line) < gateway.log.index("shard-0 runs in process")
            assert stuck.wait(0) == -signal.SIGKILL
            assert (await ask(gateway.address, "alpha")).completions[0].text == answer
            async with (
                asyncio.timeout(120),
                grpc.aio.insecure_channel(gateway.address) as channel,
                contextlib.aclosing(training.events(channel, "long", seen)) as events,
            ):
                event = await anext(events)
                assert event.sequence == seen + 1
                assert (await training.get(channel, "long")).state not in training.FINAL
            assert all(trainer.is_running() for trainer in trainers)
            assert not running(gateway.family(), "trainer.worker"), "it is the same one"


@pytest.mark.parametrize("moment", ["imports", "loads"])
async def test_orphans_are_none_when_the_host_is_killed_while_a_core_starts(
    moment: str, tmp_path: Path
) -> None:
    """Before any code of ours runs in it, and while it loads the model."""
    arguments = ["--model", "tiny", "--workers", "1"]
    gateway = GatewayProcess(arguments, tmp_path / "state", tmp_path / "gateway.log")
    try:
        if moment == "imports":
            await until(lambda: any("core" in entry.what for entry in recorded(tmp_path)))
            assert not running(gateway.family(), "EngineCore"), "it has its name after its imports"
        else:
            await until(lambda: bool(running(gateway.family(), "VLLM::Worker")))
        assert "runs in process" not in gateway.log
        family = gateway.family()
        took_s = killed(gateway, family)
        print(f"while the core {moment}: {len(family)} were gone after {took_s:.2f} s")
    finally:
        gateway.close()


async def train_and_read(
    gateway: GatewayProcess, channel: grpc.aio.Channel
) -> tuple[int, asyncio.Task[pb.ValidateDatasetResponse]]:
    """Have a job train and a dataset be read; returns the job's newest event, and the call that
    waits for the reading."""
    await training.upload(channel, "few", training.facts())
    await training.upload(channel, "many", training.facts(40_000))
    spec = pb.JobSpec(dataset="few", adapter="long", hyperparameters=LONG, backend=pb.BACKEND_PEFT)
    await training.create(channel, spec, job_id="long")
    await until(lambda: bool(running(gateway.family(), "trainer.worker")))
    seen = (await training.get(channel, "long")).last_sequence
    reading = asyncio.create_task(validate(channel, "many"))
    await until(lambda: bool(running(gateway.family(), "trainer.prepare")))
    return seen, reading


async def validate(channel: grpc.aio.Channel, dataset: str) -> pb.ValidateDatasetResponse:
    request = pb.ValidateDatasetRequest(dataset=dataset)
    return await TrainingStub(channel).ValidateDataset(request)


def killed(gateway: GatewayProcess, family: list[psutil.Process]) -> float:
    """Kill the host; the seconds until the rest is gone, GONE_S at most."""
    host = gateway.process.pid
    gateway.process.kill()
    began_s = time.monotonic()
    _, alive = psutil.wait_procs(family, GONE_S)
    took_s = time.monotonic() - began_s
    assert not alive
    assert not list(of_session(host)), "those that were started in the last moment, too"
    return took_s


def of_session(host: int) -> Iterator[int]:
    """Processes that the host has started into its own session."""
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(pid) == host and pid != host:
                yield pid


def running(processes: list[psutil.Process], name: str) -> list[psutil.Process]:
    """Those with that in their command line or title."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


def recorded(folder: Path) -> list[Entry]:
    """What the gateway's file has."""
    try:
        return Entries.model_validate_json((folder / "state" / FILE).read_bytes()).processes
    except FileNotFoundError:
        return []


@contextlib.contextmanager
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does not end by itself."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(180):
        while not condition():
            await asyncio.sleep(0.02)
