"""The asyncio client of the gateway's `Training` service."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING

import grpc.aio

from lora_gateway._calls import Calls, Metadata
from lora_gateway.datasets import DatasetCalls
from lora_gateway.job_logs import JobLogs
from lora_gateway.job_spec import JobKeywords, job_spec
from lora_gateway.job_watch import JobWatch
from lora_gateway.v1.training_pb2 import (
    CancelJobRequest,
    Checkpoint,
    CreateJobRequest,
    DeleteJobRequest,
    Estimate,
    EstimateJobRequest,
    GetCapabilitiesRequest,
    GetCapabilitiesResponse,
    GetJobRequest,
    Job,
    JobSpec,
    JobState,
    ListCheckpointsRequest,
    ListJobsRequest,
    PauseJobRequest,
    Publication,
    PublishCheckpointRequest,
    PublishSpec,
    ResumeJobRequest,
)
from lora_gateway.v1.training_pb2_grpc import TrainingStub

if TYPE_CHECKING:
    from typing_extensions import Unpack


class TrainingClient(DatasetCalls):
    """From a dataset to an adapter version that answers. `GatewayClient.training`.

        dataset = await client.training.upload_dataset(Path("support.jsonl"))
        job = await client.training.create_job(
            dataset=dataset.name, adapter="support", traffic_percent=10
        )
        async for event in client.training.watch_job(job.name):
            print(event)

    Answers are the messages of `training.proto`, which tells what each field means. Every
    method takes `timeout_s` for the whole call and `metadata` for this call, and raises a
    GatewayError if the call failed and TypeError or ValueError if an argument fits into no
    message. Calls that can be repeated safely are tried again when UNAVAILABLE, four times in
    all; those that delete are not.
    """

    def __init__(self, channel: grpc.aio.Channel, calls: Calls) -> None:
        """`GatewayClient` makes one; it is the owner of the channel."""
        super().__init__(TrainingStub(channel), calls)

    async def create_job(
        self,
        spec: JobSpec | None = None,
        *,
        job_id: str = "",
        labels: Mapping[str, str] | None = None,
        priority: int = 0,
        request_id: str | None = None,
        validate_only: bool = False,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
        **keywords: Unpack[JobKeywords],
    ) -> Job:
        """Begin a job; answers at once, before the dataset is read.

        Args:
            spec: what to train, or give its fields as keywords.
            job_id: the job's name. Empty: made of the adapter's.
            labels: kept with the job and the version.
            priority: -10 to 10; higher ones are given a device first.
            request_id: calls with the same id make one job. None: one for this call.
            validate_only: check the request and create nothing.
            keywords: fields of `JobSpec` and of the messages in it; see `JobKeywords`.

        Raises:
            InvalidRequest: reason UNSERVABLE_ADAPTER: the gateway could not serve what the job
                would train; `violations` say why.
            FailedPrecondition: reason INIT_FROM_UNUSABLE: what `init_from` names cannot be
                trained further.
            GatewayError: the call failed otherwise; reason JOB_EXISTS if the name is taken.
        """
        request = CreateJobRequest(
            # Never empty: gRPC tries again, and the second try must find the first one's job.
            request_id=uuid.uuid4().hex if request_id is None else request_id,
            job_id=job_id,
            spec=job_spec(spec, keywords),
            labels=labels,
            priority=priority,
            validate_only=validate_only,
        )
        return (await self._calls.unary(self._stub.CreateJob, request, timeout_s, metadata)).job

    async def estimate_job(
        self,
        spec: JobSpec | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
        **keywords: Unpack[JobKeywords],
    ) -> Estimate:
        """What a job would cost; creates nothing. Reads the dataset, which takes its time.

        Args:
            spec: as for `create_job`, like the keywords.
            priority: for which its place in the queue is told.
            timeout_s: None: the client's default for jobs.

        Raises:
            InvalidRequest: `create_job` would refuse it.
        """
        request = EstimateJobRequest(spec=job_spec(spec, keywords), priority=priority)
        timeout_s = self._calls.job_timeout_s if timeout_s is None else timeout_s
        response = await self._calls.unary(self._stub.EstimateJob, request, timeout_s, metadata)
        return response.estimate

    async def get_job(
        self, name: str, *, timeout_s: float | None = None, metadata: Metadata | None = None
    ) -> Job:
        """One job with its state, progress and publication."""
        request = GetJobRequest(name=name)
        return (await self._calls.unary(self._stub.GetJob, request, timeout_s, metadata)).job

    async def list_jobs(
        self,
        *,
        states: Sequence[JobState.ValueType] = (),
        adapter: str = "",
        page_size: int = 0,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> AsyncGenerator[Job, None]:
        """Jobs, newest first; asks for the next page when it is needed.

        Args:
            states: to list. Empty: all.
            adapter: whose jobs. Empty: those of all.
            page_size: the most jobs of a page. 0: the gateway's default.
            timeout_s: for each page.
        """
        request = ListJobsRequest(states=states, adapter=adapter, page_size=page_size)
        while True:
            page = await self._calls.unary(self._stub.ListJobs, request, timeout_s, metadata)
            for job in page.jobs:
                yield job
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def cancel_job(
        self,
        name: str,
        *,
        discard: bool = False,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> Job:
        """Ask a job to end. Watch it to see when it has; cancelling again changes nothing.

        Args:
            discard: its checkpoints, instead of keeping the newest.
        """
        request = CancelJobRequest(name=name, discard=discard)
        return (await self._calls.unary(self._stub.CancelJob, request, timeout_s, metadata)).job

    async def pause_job(
        self, name: str, *, timeout_s: float | None = None, metadata: Metadata | None = None
    ) -> Job:
        """Ask a job to save, to leave its device and to wait. Pausing again changes nothing.

        FailedPrecondition with reason JOB_NOT_PAUSABLE: its adapter is saved already, or it is to
        end or has ended.
        """
        request = PauseJobRequest(name=name)
        return (await self._calls.unary(self._stub.PauseJob, request, timeout_s, metadata)).job

    async def resume_job(
        self, name: str, *, timeout_s: float | None = None, metadata: Metadata | None = None
    ) -> Job:
        """Queue a paused job again. Resuming one that is not to be paused changes nothing.

        FailedPrecondition with reason JOB_NOT_RESUMABLE: it is to end or has ended.
        """
        request = ResumeJobRequest(name=name)
        return (await self._calls.unary(self._stub.ResumeJob, request, timeout_s, metadata)).job

    async def delete_job(
        self, name: str, *, timeout_s: float | None = None, metadata: Metadata | None = None
    ) -> None:
        """Delete a job that has ended, with events, logs and checkpoints. Its versions stay.

        FailedPrecondition with reason JOB_ACTIVE: it has not ended.
        """
        request = DeleteJobRequest(name=name)
        await self._calls.unary(self._stub.DeleteJob, request, timeout_s, metadata)

    def watch_job(
        self,
        name: str,
        *,
        after_sequence: int = 0,
        reconnect: bool = True,
        metadata: Metadata | None = None,
    ) -> JobWatch:
        """Events as they happen, each once, in order and without a gap, until the job has ended.

        Has no timeout.

        Args:
            after_sequence: the last one that you have seen. 0: from the first.
            reconnect: call again when the gateway is gone, until it is back.
        """
        return JobWatch(
            lambda request: self._stub.WatchJob(request, metadata=self._calls.merged(metadata)),
            lambda: self.get_job(name, metadata=metadata),
            name,
            after_sequence=after_sequence,
            reconnect=reconnect,
        )

    def job_logs(
        self,
        name: str,
        *,
        offset: int = 0,
        follow: bool = False,
        metadata: Metadata | None = None,
    ) -> JobLogs:
        """What the training process printed. Calls again when the gateway is gone.

        Has no timeout.

        Args:
            offset: of the first byte.
            follow: until the job has ended.
        """
        return JobLogs(
            lambda request: self._stub.GetJobLogs(request, metadata=self._calls.merged(metadata)),
            name,
            offset=offset,
            follow=follow,
        )

    async def list_checkpoints(
        self, name: str, *, timeout_s: float | None = None, metadata: Metadata | None = None
    ) -> list[Checkpoint]:
        """What a job has saved, newest first."""
        request = ListCheckpointsRequest(name=name)
        method = self._stub.ListCheckpoints
        return list((await self._calls.unary(method, request, timeout_s, metadata)).checkpoints)

    async def publish_checkpoint(
        self,
        name: str,
        *,
        step: int | None = None,
        adapter: str = "",
        publish: PublishSpec | None = None,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> Publication:
        """Pass a checkpoint through the gate and make it a version; answers when it serves.

        Args:
            step: of the checkpoint. None: the newest.
            adapter: that it becomes a version of. Empty: as the job says.
            publish: traffic and gate. None: as the job says, else no traffic.
            timeout_s: None: the client's default for jobs.

        Raises:
            FailedPrecondition: reason GATE_REJECTED; `violations` say why.
            NotFound: reason CHECKPOINT_NOT_FOUND: there is no such checkpoint.
        """
        request = PublishCheckpointRequest(name=name, step=step, adapter=adapter, publish=publish)
        method = self._stub.PublishCheckpoint
        timeout_s = self._calls.job_timeout_s if timeout_s is None else timeout_s
        return (await self._calls.unary(method, request, timeout_s, metadata)).publication

    async def capabilities(
        self, *, timeout_s: float | None = None, metadata: Metadata | None = None
    ) -> GetCapabilitiesResponse:
        """What this gateway can train, and what it can serve."""
        request = GetCapabilitiesRequest()
        return await self._calls.unary(self._stub.GetCapabilities, request, timeout_s, metadata)
