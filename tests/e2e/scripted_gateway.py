"""A real gateway whose training processes do as a script says, and that is killed and restarted.

Jobs without a script are trained for real.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import psutil

from lora_gateway.v1 import adapters_pb2 as ad
from lora_gateway.v1 import training_pb2 as pb
from lora_gateway.v1.adapters_pb2_grpc import AdaptersStub
from lora_gateway.v1.training_pb2_grpc import TrainingStub
from tests.e2e import training
from tests.e2e.gateway_process import GatewayProcess
from tests.trainer.scripted_worker import Script

ADAPTER = "facts"
"""Of all jobs."""
KILLED_S = 300.0
"""No job takes so long until it publishes, also on a busy machine."""
WORKER = Path(__file__).parents[1] / "trainer" / "scripted_worker.py"
INTERPRETER = """#!/bin/sh
if [ "$2" = trainer.worker ]; then
    job=$(sed -n 's/.*"job":"\\([^"]*\\)".*/\\1/p' "$3/plan.json")
    if [ -e "{scripts}/$job.json" ]; then exec {python} {worker} "$3"; fi
fi
exec {python} "$@"
"""


class ScriptedGateway:
    """`gateway serve` on one state folder, from one process to the next."""

    def __init__(
        self,
        folder: Path,
        extra: Sequence[str] = (),
        program: Sequence[str] = ("-m", "gateway"),
    ) -> None:
        """`program` as `GatewayProcess` has it."""
        self.folder = folder
        self._program = program
        self.state = folder / "state"
        self._scripts = self.state / "scripts"
        self._scripts.mkdir(parents=True)
        python = folder / "python"
        text = INTERPRETER.format(scripts=self._scripts, python=sys.executable, worker=WORKER)
        python.write_text(text)
        python.chmod(0o700)
        self._arguments = [
            *("--model", "tiny", "--dtype", "float32", "--max-model-len", "2048"),
            *("--training-python", str(python), *extra),
        ]
        self.starts = 0
        self.process = self._start()

    def _start(self) -> GatewayProcess:
        self.starts += 1
        log = self.folder / f"gateway-{self.starts}.log"
        process = GatewayProcess(self._arguments, self.state, log, self._program)
        try:
            process.wait_serving()
        except BaseException:
            process.close()
            raise
        return process

    def kill_and_start(self) -> None:
        """SIGKILL of the host; training processes go on, and all else of it ends by itself."""
        trains = {process.pid for process in self.training()}
        rest = [each for each in self.process.family() if each.pid not in trains]
        self.process.process.kill()
        self.process.process.wait()
        _, left = psutil.wait_procs(rest, timeout=60)
        assert not left, left
        self.process.close()
        self.process = self._start()

    def start_again_once_it_is_killed(self) -> None:
        """Wait until somebody has killed the host, and have the next one sweep what is left."""
        assert self.process.wait_exit(KILLED_S) == -signal.SIGKILL
        self.process.close()
        self.process = self._start()

    def channel(self) -> grpc.aio.Channel:
        """To the process that serves now."""
        return grpc.aio.insecure_channel(self.process.address)

    def training(self) -> list[psutil.Process]:
        """Training processes of any host of this state folder."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if any(str(self.state / "jobs") in part for part in process.cmdline()):
                    found.append(process)
        return found

    async def create(
        self,
        name: str,
        script: Script | None = None,
        *,
        dataset: str = "facts",
        publish: bool = False,
        checkpoint_interval_s: int = 0,
        **fields: int,
    ) -> pb.Job:
        """A job on a dataset that was uploaded."""
        if script is not None:
            (self._scripts / f"{name}.json").write_text(script.model_dump_json())
        spec = pb.JobSpec(dataset=dataset, adapter=ADAPTER, backend=pb.BACKEND_PEFT)
        spec.hyperparameters.CopyFrom(training.QUICK)
        spec.hyperparameters.epochs = 2
        for field, value in fields.items():
            setattr(spec.hyperparameters, field, value)
        if checkpoint_interval_s:
            spec.checkpoint_interval.FromSeconds(checkpoint_interval_s)
        if publish:
            spec.publish.SetInParent()
        async with self.channel() as channel:
            return await training.create(channel, spec, job_id=name)

    async def wish(self, word: str, name: str) -> pb.Job:
        """Pause, Resume or Cancel a job."""
        request = getattr(pb, f"{word}JobRequest")(name=name)
        async with self.channel() as channel:
            answer = await getattr(TrainingStub(channel), f"{word}Job")(request, timeout=30)
        return answer.job  # type: ignore[no-any-return]

    async def versions(self) -> list[str]:
        """States of all versions of the adapter that there ever were, from the first one on."""
        async with self.channel() as channel:
            stub = AdaptersStub(channel)
            try:
                found = await stub.GetAdapter(ad.GetAdapterRequest(adapter=ADAPTER), timeout=30)
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.NOT_FOUND
                return []
            requests = [
                ad.GetAdapterVersionRequest(adapter=ADAPTER, version=version)
                for version in range(1, found.adapter.latest_version + 1)
            ]
            answers = [await stub.GetAdapterVersion(request, timeout=30) for request in requests]
        return [ad.VersionState.Name(each.adapter_version.state) for each in answers]

    async def get(self, name: str) -> pb.Job:
        """A job as it stands."""
        async with self.channel() as channel:
            return await training.get(channel, name)

    def close(self) -> None:
        """End all of it."""
        self.process.close()
        for process in self.training():
            with contextlib.suppress(psutil.Error):
                process.kill()


@contextlib.contextmanager
def scripted_gateway(
    folder: Path, extra: Sequence[str] = (), program: Sequence[str] = ("-m", "gateway")
) -> Iterator[ScriptedGateway]:
    """Until the end of the block."""
    gateway = ScriptedGateway(folder, extra, program)
    try:
        yield gateway
    finally:
        gateway.close()


class Watch:
    """The events of one job, across gateways that die: each once, in order, without a gap."""

    def __init__(self, gateway: ScriptedGateway, name: str) -> None:
        self._gateway = gateway
        self._name = name
        self.events: list[pb.JobEvent] = []

    async def until(self, *states: pb.JobState.ValueType, step: int = 0) -> pb.JobEvent:
        """The event of the first of these states, or the job's end; or of that step."""
        for event in self.events:
            if self._is_it(event, states, step):
                return event
        after = len(self.events)
        async with (
            self._gateway.channel() as channel,
            contextlib.aclosing(training.events(channel, self._name, after)) as events,
        ):
            async for event in events:
                assert event.sequence == len(self.events) + 1
                self.events.append(event)
                if self._is_it(event, states, step):
                    return event
        raise AssertionError(f"{self._name} ended: {self.states}")

    async def end(self) -> pb.Job:
        """The job, once it has ended."""
        while not self.events or self.events[-1].state_changed.state not in training.FINAL:
            await self.until(*training.FINAL)
        job = await self._gateway.get(self._name)
        assert len(self.events) == job.last_sequence
        ends = [state for state in self.states if f"JOB_STATE_{state}" in FINAL_NAMES]
        assert ends == [self.states[-1]], "once"
        return job

    @property
    def states(self) -> list[str]:
        """Through which it went."""
        return [
            pb.JobState.Name(event.state_changed.state).removeprefix("JOB_STATE_")
            for event in self.events
            if event.HasField("state_changed")
        ]

    @property
    def steps(self) -> list[int]:
        """That were told."""
        return [event.progress.step for event in self.events if event.HasField("progress")]

    @staticmethod
    def _is_it(event: pb.JobEvent, states: Sequence[pb.JobState.ValueType], step: int) -> bool:
        return event.state_changed.state in states or 0 < step <= event.progress.step


FINAL_NAMES = {pb.JobState.Name(state) for state in training.FINAL}
