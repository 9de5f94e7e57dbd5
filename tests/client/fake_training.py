"""An honest fake of the Training service: it keeps datasets, jobs and events in memory, and fails
as told.

It speaks real gRPC from a real server; only reading, training and disk behind it are missing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import grpc
import grpc.aio
from google.rpc import status_pb2

from lora_gateway.v1 import training_pb2 as pb
from lora_gateway.v1.inference_pb2_grpc import add_InferenceServicer_to_server
from lora_gateway.v1.training_pb2_grpc import add_TrainingServicer_to_server
from tests.client.fake_adapters import Context, fail, page_of, precondition, refusal
from tests.client.fake_datasets import FakeDatasets
from tests.client.fake_inference import FakeInference

FINAL = (pb.JOB_STATE_SUCCEEDED, pb.JOB_STATE_CANCELLED, pb.JOB_STATE_FAILED)

Payload = pb.StateChanged | pb.Progress | pb.Checkpoint | pb.Publication | pb.Notice


class FakeTraining(FakeDatasets):
    """Jobs do what a test tells them, at once."""

    def __init__(self) -> None:
        super().__init__()
        self.watch_cuts: deque[tuple[int, status_pb2.Status | None]] = deque()
        """Each next watch takes one, and ends so after that many events; None: in order."""
        self.log_cuts: deque[int] = deque()
        """Each next log takes one, and is UNAVAILABLE after that many pieces."""
        self.silent_watches = 0
        """So many next watches send nothing at all."""
        self.forgetful = False
        """Watches replay every event, whatever their caller has seen."""
        self.lost: set[int] = set()
        """Sequences that no watch sends."""
        self.log_gap_bytes = 0
        """Logs begin so many bytes late."""
        self.unservable: status_pb2.Status | None = None
        """What specs are refused with, to estimate and to create."""
        self.script: list[Payload] = []
        """What a new job does as soon as it is created."""
        self.estimate = pb.Estimate(tokens=1000, steps=3, rows=2)
        self.capabilities = pb.GetCapabilitiesResponse(
            backends=[pb.BACKEND_PEFT], devices=["cpu"], base_model="tiny"
        )
        self.cancelled = asyncio.Event()
        """A watch or a log was left by its caller."""
        self.jobs: dict[str, pb.Job] = {}
        self.events: dict[str, list[pb.JobEvent]] = {}
        self.logs: dict[str, list[bytes]] = {}
        self.checkpoints: dict[str, list[pb.Checkpoint]] = {}
        self._changed = asyncio.Condition()
        self._made: dict[str, pb.Job] = {}

    # --- jobs

    async def CreateJob(
        self, request: pb.CreateJobRequest, context: Context
    ) -> pb.CreateJobResponse:
        await self._arrive(request, context)
        await self._servable(request.spec, context)
        if request.validate_only:
            return pb.CreateJobResponse(job=pb.Job(name=request.job_id, spec=request.spec))
        if request.request_id in self._made:
            return pb.CreateJobResponse(job=self._made[request.request_id])
        name = request.job_id or f"{request.spec.adapter}-{len(self.jobs) + 1}"
        if name in self.jobs:
            exists = refusal(grpc.StatusCode.ALREADY_EXISTS, "JOB_EXISTS", f"job {name!r} exists")
            await fail(context, exists)
        job = await self.add_job(name, request.spec)
        job.labels.update(request.labels)
        job.priority = request.priority
        if request.request_id:
            self._made[request.request_id] = job
        answer = pb.Job.FromString(job.SerializeToString())
        await self.tell(name, *self.script)
        return pb.CreateJobResponse(job=answer)

    async def EstimateJob(
        self, request: pb.EstimateJobRequest, context: Context
    ) -> pb.EstimateJobResponse:
        await self._arrive(request, context)
        await self._servable(request.spec, context)
        return pb.EstimateJobResponse(estimate=self.estimate)

    async def GetJob(self, request: pb.GetJobRequest, context: Context) -> pb.GetJobResponse:
        await self._arrive(request, context)
        return pb.GetJobResponse(job=await self._job(request.name, context))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsResponse:
        await self._arrive(request, context)
        found = [
            job
            for job in reversed(self.jobs.values())
            if (not request.states or job.state in request.states)
            and request.adapter in ("", job.spec.adapter)
        ]
        begin, end = page_of(request.page_token, request.page_size)
        return pb.ListJobsResponse(
            jobs=found[begin:end], next_page_token=str(end) if end < len(found) else ""
        )

    async def CancelJob(
        self, request: pb.CancelJobRequest, context: Context
    ) -> pb.CancelJobResponse:
        await self._arrive(request, context)
        job = await self._job(request.name, context)
        if job.state not in FINAL:
            await self.tell(request.name, pb.StateChanged(state=pb.JOB_STATE_CANCELLING))
        return pb.CancelJobResponse(job=job)

    async def PauseJob(self, request: pb.PauseJobRequest, context: Context) -> pb.PauseJobResponse:
        await self._arrive(request, context)
        job = await self._job(request.name, context)
        if job.state in FINAL:
            await fail(context, precondition("JOB_NOT_PAUSABLE", "there is nothing to pause"))
        await self.tell(request.name, pb.StateChanged(state=pb.JOB_STATE_PAUSING))
        return pb.PauseJobResponse(job=job)

    async def ResumeJob(
        self, request: pb.ResumeJobRequest, context: Context
    ) -> pb.ResumeJobResponse:
        await self._arrive(request, context)
        job = await self._job(request.name, context)
        if job.state in FINAL:
            await fail(context, precondition("JOB_NOT_RESUMABLE", "it does not go on"))
        await self.tell(request.name, pb.StateChanged(state=pb.JOB_STATE_QUEUED))
        return pb.ResumeJobResponse(job=job)

    async def DeleteJob(
        self, request: pb.DeleteJobRequest, context: Context
    ) -> pb.DeleteJobResponse:
        await self._arrive(request, context)
        if (await self._job(request.name, context)).state not in FINAL:
            await fail(context, precondition("JOB_ACTIVE", "it has not ended; cancel it first"))
        del self.jobs[request.name]
        return pb.DeleteJobResponse()

    async def WatchJob(
        self, request: pb.WatchJobRequest, context: Context
    ) -> AsyncIterator[pb.WatchJobResponse]:
        await self._arrive(request, context)
        job = await self._job(request.name, context)
        events = self.events[request.name]
        position = 0 if self.forgetful else request.after_sequence
        cut = self.watch_cuts.popleft() if self.watch_cuts else None
        left = cut[0] if cut else None
        try:
            if self.silent_watches:
                self.silent_watches -= 1
                await asyncio.Event().wait()
            while left is None or left > 0:
                if position >= len(events):
                    if job.state in FINAL:
                        return
                    yield pb.WatchJobResponse(
                        heartbeat=pb.Heartbeat(sequence=len(events), state=job.state)
                    )
                async with self._changed:
                    while len(events) <= position:
                        await self._changed.wait()
                position += 1
                if position not in self.lost:
                    yield pb.WatchJobResponse(event=events[position - 1])
                    left = None if left is None else left - 1
            if cut is not None and cut[1] is not None:
                await fail(context, cut[1])
        except (asyncio.CancelledError, GeneratorExit):  # the latter amid a message
            self.cancelled.set()
            raise

    async def GetJobLogs(
        self, request: pb.GetJobLogsRequest, context: Context
    ) -> AsyncIterator[pb.GetJobLogsResponse]:
        await self._arrive(request, context)
        job = await self._job(request.name, context)
        left = self.log_cuts.popleft() if self.log_cuts else None
        # Whole pieces, from the one that holds the offset: more than was asked for.
        index, begin = 0, 0
        try:
            while True:
                pieces = self.logs[request.name]
                while index < len(pieces):
                    piece, offset = pieces[index], begin + self.log_gap_bytes
                    index, begin = index + 1, begin + len(piece)
                    if begin <= request.offset:
                        continue
                    if left == 0:
                        text = "the control plane ends"
                        await fail(context, refusal(grpc.StatusCode.UNAVAILABLE, "DRAINING", text))
                    yield pb.GetJobLogsResponse(offset=offset, data=piece)
                    left = None if left is None else left - 1
                if not request.follow or job.state in FINAL:
                    return
                async with self._changed:
                    await self._changed.wait()
        except (asyncio.CancelledError, GeneratorExit):  # the latter amid a message
            self.cancelled.set()
            raise

    async def ListCheckpoints(
        self, request: pb.ListCheckpointsRequest, context: Context
    ) -> pb.ListCheckpointsResponse:
        await self._arrive(request, context)
        await self._job(request.name, context)
        return pb.ListCheckpointsResponse(checkpoints=self.checkpoints.get(request.name, []))

    async def PublishCheckpoint(
        self, request: pb.PublishCheckpointRequest, context: Context
    ) -> pb.PublishCheckpointResponse:
        await self._arrive(request, context)
        job = await self._job(request.name, context)
        steps = [found.step for found in self.checkpoints.get(request.name, [])]
        if (request.step if request.HasField("step") else max(steps, default=0)) not in steps:
            text = "the job has no such checkpoint"
            await fail(context, refusal(grpc.StatusCode.NOT_FOUND, "CHECKPOINT_NOT_FOUND", text))
        return pb.PublishCheckpointResponse(
            publication=pb.Publication(
                state=pb.PUBLICATION_STATE_SERVING,
                adapter=request.adapter or job.spec.adapter,
                version=7,
                traffic_percent=request.publish.traffic_percent,
            )
        )

    async def GetCapabilities(
        self, request: pb.GetCapabilitiesRequest, context: Context
    ) -> pb.GetCapabilitiesResponse:
        await self._arrive(request, context)
        return self.capabilities

    # --- what tests do

    async def add_job(self, name: str, spec: pb.JobSpec | None = None) -> pb.Job:
        """One more job, which VALIDATES its dataset."""
        job = pb.Job(name=name, spec=spec or pb.JobSpec(dataset="data", adapter="support"))
        job.create_time.FromJsonString("2026-01-02T03:04:05Z")
        self.jobs[name], self.events[name], self.logs[name] = job, [], []
        await self.tell(name, pb.StateChanged(state=pb.JOB_STATE_VALIDATING))
        return job

    async def tell(self, name: str, *payloads: Payload) -> None:
        """Let these happen to the job."""
        async with self._changed:
            for payload in payloads:
                self._happen(self.jobs[name], payload)
            self._changed.notify_all()

    async def log(self, name: str, data: bytes) -> None:
        """Let the training process print."""
        async with self._changed:
            self.logs[name].append(data)
            self._changed.notify_all()

    def _happen(self, job: pb.Job, payload: Payload) -> None:
        event = pb.JobEvent(sequence=len(self.events[job.name]) + 1, attempt=1)
        event.time.FromJsonString("2026-01-02T03:04:05Z")
        match payload:
            case pb.StateChanged():
                event.state_changed.CopyFrom(payload)
                event.state_changed.previous_state = job.state
                job.state = payload.state
                if payload.HasField("error"):
                    job.error.CopyFrom(payload.error)
            case pb.Progress():
                event.progress.CopyFrom(payload)
                job.progress.MergeFrom(payload)  # an evaluation leaves the step's loss
            case pb.Checkpoint():
                event.checkpoint.CopyFrom(payload)
                self.checkpoints.setdefault(job.name, []).insert(0, payload)
                job.checkpoint_step = payload.step
            case pb.Publication():
                event.publication.CopyFrom(payload)
                job.publication.CopyFrom(payload)
            case pb.Notice():
                event.notice.CopyFrom(payload)
                job.notices.append(payload)
        self.events[job.name].append(event)
        job.last_sequence = event.sequence

    async def _servable(self, spec: pb.JobSpec, context: Context) -> None:
        await self._dataset(spec.dataset, context)
        if self.unservable is not None:
            await fail(context, self.unservable)

    async def _job(self, name: str, context: Context) -> pb.Job:
        if name not in self.jobs:
            text = f"job {name!r} is unknown"
            await fail(context, refusal(grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND", text))
        return self.jobs[name]


def progress(step: int, total_steps: int, loss: float, **fields: float) -> pb.Progress:
    """A step that has ended."""
    made = pb.Progress(
        step=step,
        total_steps=total_steps,
        epoch=step / total_steps,
        tokens_per_second=123.4,
        loss=loss,
        learning_rate=2e-4 * (1 - step / total_steps),
    )
    for name, value in fields.items():
        setattr(made, name, value)
    made.eta.FromSeconds(total_steps - step)
    made.elapsed.FromSeconds(step)
    return made


def states(*names: str) -> Iterable[pb.StateChanged]:
    """Transitions to these states, by the names without their prefix."""
    return [pb.StateChanged(state=pb.JobState.Value(f"JOB_STATE_{name}")) for name in names]


@asynccontextmanager
async def served(
    training: FakeTraining, inference: FakeInference | None = None
) -> AsyncIterator[str]:
    """Serve on a free port of the loopback; gives the target."""
    server = grpc.aio.server()
    add_TrainingServicer_to_server(training, server)
    if inference is not None:
        add_InferenceServicer_to_server(inference, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=None)
