"""The Training service, as the host answers it: decode, call, encode."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from engine.errors import Violation
from gateway import dataset_codec, job_codec, spec_codec
from gateway.adapter_codec import (
    MAX_REQUEST_ID_BYTES,
    decode_number_token,
    decode_page_size,
    decode_page_token,
    label_violations,
    name_violations,
    refuse,
    upload_id_violations,
)
from gateway.admission import Admission, Slots
from gateway.call import current_call
from gateway.exceptions import SequenceUnknown
from gateway.preview import Previews
from gateway.upload_stream import read_header, receive
from gateway.wrap import Context
from lora_gateway.v1 import training_pb2 as pb
from lora_gateway.v1.inference_pb2 import ModelFingerprints
from lora_gateway.v1.training_pb2_grpc import TrainingServicer
from store.job_records import JobEventRecord, JobRecord
from store.jobs import JobStore
from trainer.data_limits import require_usable
from trainer.datasets import Datasets
from trainer.jobs import Jobs
from trainer.preparation import Preparations
from trainer.served import ServedModel
from trainer.spec import DatasetFormat, DataSpec

HEARTBEAT_S = 10.0

PATIENT_METHODS = frozenset(
    {
        "UploadDataset",
        "ValidateDataset",
        "EstimateJob",
        "WatchJob",
        "GetJobLogs",
        "PublishCheckpoint",
    }
)
"""They take as long as a dataset is large, an adapter is checked or a caller looks on."""


class Training(TrainingServicer):
    """Answers from datasets and jobs."""

    def __init__(
        self,
        store: JobStore,
        datasets: Datasets,
        preparations: Preparations,
        previews: Previews,
        jobs: Jobs,
        served: ServedModel,
        admission: Admission,
        watches: Slots,
    ) -> None:
        """Changes go through `datasets` and `jobs`; `store` is read. `watches` are held by those
        who follow, `admission` by those who work."""
        self._store = store
        self._datasets = datasets
        self._preparations = preparations
        self._previews = previews
        self._jobs = jobs
        self._served = served
        self._admission = admission
        self._watches = watches

    # --- datasets -----------------------------------------------------------

    async def UploadDataset(
        self, request_iterator: AsyncIterator[pb.UploadDatasetRequest], context: Context
    ) -> pb.UploadDatasetResponse:
        plan = dataset_codec.decode_header(await read_header(request_iterator))
        tenant = _tenant()
        record = await self._datasets.expected(tenant, plan)
        if record is None:
            await receive(request_iterator, lambda: self._datasets.uploads.open(tenant, plan))
            record = await self._datasets.keep(tenant, plan)
        return pb.UploadDatasetResponse(dataset=dataset_codec.encode_dataset(record))

    async def QueryUpload(
        self, request: pb.TrainingQueryUploadRequest, context: Context
    ) -> pb.TrainingQueryUploadResponse:
        refuse(upload_id_violations(request.upload_id))
        uploads = self._datasets.uploads
        status = await asyncio.to_thread(uploads.find, _tenant(), request.upload_id)
        return dataset_codec.encode_upload(status)

    async def ValidateDataset(
        self, request: pb.ValidateDatasetRequest, context: Context
    ) -> pb.ValidateDatasetResponse:
        max_issues = dataset_codec.decode_max_issues(request)
        data = spec_codec.decode_data(request.data, name_violations(request.dataset, "dataset"))
        record = await self._store.dataset(_tenant(), request.dataset)
        resolved = self._resolved(data, record.format)
        with self._admission.slot():
            prepared = await self._preparations.prepare(
                record, self._datasets.path(record), resolved
            )
        report = dataset_codec.encode_report(prepared.report, max_issues)
        return pb.ValidateDatasetResponse(report=report)

    async def PreviewTokens(
        self, request: pb.PreviewTokensRequest, context: Context
    ) -> pb.PreviewTokensResponse:
        wrong = list(name_violations(request.dataset, "dataset"))
        if not request.line:
            wrong.append(Violation("line", "is required; lines count from 1"))
        data = spec_codec.decode_data(request.data, wrong)
        record = await self._store.dataset(_tenant(), request.dataset)
        resolved = self._resolved(data, record.format)
        with self._admission.slot():
            return await self._previews.preview(
                record, self._datasets.path(record), request.line, resolved
            )

    async def GetDataset(
        self, request: pb.GetDatasetRequest, context: Context
    ) -> pb.GetDatasetResponse:
        refuse(name_violations(request.name, "name"))
        record = await self._store.dataset(_tenant(), request.name)
        return pb.GetDatasetResponse(dataset=dataset_codec.encode_dataset(record))

    async def ListDatasets(
        self, request: pb.ListDatasetsRequest, context: Context
    ) -> pb.ListDatasetsResponse:
        size = decode_page_size(request.page_size)
        after = decode_page_token(request.page_token)
        records = await self._store.datasets(_tenant(), after=after, limit=size + 1)
        return pb.ListDatasetsResponse(
            datasets=[dataset_codec.encode_dataset(record) for record in records[:size]],
            next_page_token=records[size - 1].name if len(records) > size else "",
        )

    async def DeleteDataset(
        self, request: pb.DeleteDatasetRequest, context: Context
    ) -> pb.DeleteDatasetResponse:
        refuse(name_violations(request.name, "name"))
        await self._datasets.remove(_tenant(), request.name)
        return pb.DeleteDatasetResponse()

    # --- jobs ---------------------------------------------------------------

    async def CreateJob(
        self, request: pb.CreateJobRequest, context: Context
    ) -> pb.CreateJobResponse:
        wrong = [
            *label_violations(request.labels, "labels"),
            *job_codec.priority_violations(request.priority),
        ]
        if request.job_id:
            wrong += name_violations(request.job_id, "job_id")
        if len(request.request_id.encode()) > MAX_REQUEST_ID_BYTES:
            wrong.append(Violation("request_id", f"may have {MAX_REQUEST_ID_BYTES} bytes"))
        spec = spec_codec.decode_spec(request.spec, wrong)
        if request.validate_only:
            resolved = await self._jobs.check(_tenant(), spec)
            return pb.CreateJobResponse(job=job_codec.encode_draft(request, resolved))
        record = await self._jobs.create(
            _tenant(),
            spec,
            name=request.job_id,
            labels=dict(request.labels),
            priority=request.priority,
            request_id=request.request_id,
        )
        return pb.CreateJobResponse(job=self._encoded(record))

    async def EstimateJob(
        self, request: pb.EstimateJobRequest, context: Context
    ) -> pb.EstimateJobResponse:
        wrong = [*job_codec.priority_violations(request.priority)]
        spec = spec_codec.decode_spec(request.spec, wrong)
        with self._admission.slot():
            estimate = await self._jobs.estimate(_tenant(), spec)
        position = self._jobs.position_of_new(_tenant(), request.priority)
        return pb.EstimateJobResponse(estimate=job_codec.encode_estimate(estimate, position))

    async def GetJob(self, request: pb.GetJobRequest, context: Context) -> pb.GetJobResponse:
        refuse(name_violations(request.name, "name"))
        record = await self._store.job(_tenant(), request.name)
        return pb.GetJobResponse(job=self._encoded(record))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsResponse:
        size = decode_page_size(request.page_size)
        wrong = list[Violation]()
        states = job_codec.decode_states(request.states, wrong)
        if request.adapter:
            wrong += name_violations(request.adapter)
        refuse(wrong)
        records = await self._store.jobs(
            _tenant(),
            before=decode_number_token(request.page_token),
            limit=size + 1,
            states=states,
            adapter=request.adapter,
        )
        return pb.ListJobsResponse(
            jobs=[self._encoded(record) for record in records[:size]],
            next_page_token=str(records[size - 1].number) if len(records) > size else "",
        )

    async def CancelJob(
        self, request: pb.CancelJobRequest, context: Context
    ) -> pb.CancelJobResponse:
        refuse(name_violations(request.name, "name"))
        record = await self._jobs.cancel(_tenant(), request.name, discard=request.discard)
        return pb.CancelJobResponse(job=self._encoded(record))

    async def PauseJob(self, request: pb.PauseJobRequest, context: Context) -> pb.PauseJobResponse:
        refuse(name_violations(request.name, "name"))
        record = await self._jobs.pause(_tenant(), request.name)
        return pb.PauseJobResponse(job=self._encoded(record))

    async def ResumeJob(
        self, request: pb.ResumeJobRequest, context: Context
    ) -> pb.ResumeJobResponse:
        refuse(name_violations(request.name, "name"))
        record = await self._jobs.resume(_tenant(), request.name)
        return pb.ResumeJobResponse(job=self._encoded(record))

    async def DeleteJob(
        self, request: pb.DeleteJobRequest, context: Context
    ) -> pb.DeleteJobResponse:
        refuse(name_violations(request.name, "name"))
        await self._jobs.delete(_tenant(), request.name)
        return pb.DeleteJobResponse()

    async def WatchJob(
        self, request: pb.WatchJobRequest, context: Context
    ) -> AsyncIterator[pb.WatchJobResponse]:
        refuse(name_violations(request.name, "name"))
        record = await self._store.job(_tenant(), request.name)
        if request.after_sequence > record.last_sequence:
            raise SequenceUnknown(record.last_sequence)
        items = self._jobs.watch(
            _tenant(), request.name, after=request.after_sequence, heartbeat_s=HEARTBEAT_S
        )
        with self._watches.slot():
            async with contextlib.aclosing(items):
                async for item in items:
                    if isinstance(item, JobEventRecord):
                        event = job_codec.encode_event(item, request.name)
                        yield pb.WatchJobResponse(event=event)
                    else:
                        yield pb.WatchJobResponse(heartbeat=job_codec.encode_heartbeat(item))

    async def GetJobLogs(
        self, request: pb.GetJobLogsRequest, context: Context
    ) -> AsyncIterator[pb.GetJobLogsResponse]:
        refuse(name_violations(request.name, "name"))
        pieces = self._jobs.logs(
            _tenant(), request.name, offset=request.offset, follow=request.follow
        )
        slots = self._watches if request.follow else self._admission
        with slots.slot():
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    yield pb.GetJobLogsResponse(offset=piece.offset, data=piece.data)

    # --- checkpoints --------------------------------------------------------

    async def ListCheckpoints(
        self, request: pb.ListCheckpointsRequest, context: Context
    ) -> pb.ListCheckpointsResponse:
        refuse(name_violations(request.name, "name"))
        checkpoints = await self._jobs.checkpoints(_tenant(), request.name)
        return pb.ListCheckpointsResponse(
            checkpoints=[job_codec.encode_checkpoint(found, request.name) for found in checkpoints]
        )

    async def PublishCheckpoint(
        self, request: pb.PublishCheckpointRequest, context: Context
    ) -> pb.PublishCheckpointResponse:
        wrong = list(name_violations(request.name, "name"))
        if request.adapter:
            wrong += name_violations(request.adapter)
        publish = spec_codec.decode_publish(request.publish, wrong)
        with self._admission.slot():
            publication = await self._jobs.publish_checkpoint(
                _tenant(),
                request.name,
                step=request.step if request.HasField("step") else None,
                adapter=request.adapter,
                publish=publish if request.HasField("publish") else None,
            )
        return pb.PublishCheckpointResponse(publication=job_codec.encode_publication(publication))

    async def GetCapabilities(
        self, request: pb.GetCapabilitiesRequest, context: Context
    ) -> pb.GetCapabilitiesResponse:
        capabilities, served = await self._jobs.capabilities(), self._served
        return pb.GetCapabilitiesResponse(
            backends=[spec_codec.encode_backend(backend) for backend in capabilities.backends],
            devices=capabilities.devices,
            base_model=served.name,
            fingerprints=ModelFingerprints(**served.fingerprints),
            max_lora_rank=served.max_lora_rank,
            max_model_len=served.max_model_len,
            target_modules=served.target_modules,
            versions=capabilities.versions,
            bfloat16=capabilities.bfloat16,
        )

    def _resolved(self, data: DataSpec, format: str) -> DataSpec:
        """As a job would use it. Raises InvalidSpec and UnservableAdapter if none could."""
        resolved = data.resolved(
            max_model_len=self._served.max_model_len,
            format=DatasetFormat(format) if format else None,
        )
        require_usable(resolved, "data", self._served.max_model_len)
        return resolved

    def _encoded(self, record: JobRecord) -> pb.Job:
        return job_codec.encode_job(record, self._jobs.queue_position(record))


def _tenant() -> str:
    return current_call().principal.tenant
