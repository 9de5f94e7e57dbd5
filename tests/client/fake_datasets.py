"""Half of an honest fake of the Training service: it keeps datasets in memory."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import AsyncIterator

import grpc
import grpc.aio
from google.protobuf.message import Message
from google.rpc import status_pb2

from lora_gateway.v1 import training_pb2 as pb
from lora_gateway.v1.training_pb2_grpc import TrainingServicer
from tests.client.fake_adapters import Context, fail, page_of, precondition, refusal


class FakeDatasets(TrainingServicer):
    """Uploads become datasets; what is in them does not matter."""

    def __init__(self) -> None:
        self.requests: list[Message] = []
        """Every attempt that arrived, failed ones too; of an upload the header."""
        self.failures: deque[status_pb2.Status] = deque()
        """Each next attempt takes one and fails with it before it does anything."""
        self.time_remaining_s: float | None = None
        """Until the deadline of the last attempt, when it arrived; None: it has none."""
        self.upload_cuts: deque[tuple[int, status_pb2.Status]] = deque()
        """Each next upload takes one, and ends so once that many bytes are stored."""
        self.report = pb.DatasetReport(valid=True, rows=2, total_lines=2)
        self.preview = pb.PreviewTokensResponse(text="hi", kept=True, matches_serving=True)
        self.datasets: dict[str, pb.Dataset] = {}
        self.content: dict[str, bytes] = {}
        self.in_use: set[str] = set()
        """Datasets that may not be deleted."""
        self._uploads: dict[str, bytearray] = {}

    async def UploadDataset(
        self, requests: AsyncIterator[pb.UploadDatasetRequest], context: Context
    ) -> pb.UploadDatasetResponse:
        header = (await anext(requests)).header
        await self._arrive(header, context)
        known = self.datasets.get(header.dataset)
        if known is not None:
            if known.sha256 != header.sha256:
                text = f"dataset {header.dataset!r} has other bytes; take another name"
                exists = refusal(grpc.StatusCode.ALREADY_EXISTS, "DATASET_EXISTS", text)
                await fail(context, exists)
            return pb.UploadDatasetResponse(dataset=known)
        stored = self._uploads.setdefault(header.upload_id, bytearray())
        cut = self.upload_cuts.popleft() if self.upload_cuts else None
        if cut and len(stored) >= cut[0]:
            await fail(context, cut[1])
        async for request in requests:
            if request.chunk.offset != len(stored):
                text = f"the upload stands at {len(stored)}"
                await fail(context, precondition("UPLOAD_OFFSET_MISMATCH", text))
            stored += request.chunk.data
            if cut and len(stored) >= cut[0]:
                await fail(context, cut[1])
        if len(stored) < header.size_bytes:
            await fail(context, precondition("UPLOAD_INCOMPLETE", "bytes are missing"))
        assert hashlib.sha256(stored).hexdigest() == header.sha256
        del self._uploads[header.upload_id]
        return pb.UploadDatasetResponse(
            dataset=self.add_dataset(header.dataset, bytes(stored), header.format)
        )

    async def QueryUpload(
        self, request: pb.TrainingQueryUploadRequest, context: Context
    ) -> pb.TrainingQueryUploadResponse:
        await self._arrive(request, context)
        if request.upload_id not in self._uploads:
            unknown = refusal(grpc.StatusCode.NOT_FOUND, "UPLOAD_NOT_FOUND", "no such upload")
            await fail(context, unknown)
        return pb.TrainingQueryUploadResponse(offset=len(self._uploads[request.upload_id]))

    async def ValidateDataset(
        self, request: pb.ValidateDatasetRequest, context: Context
    ) -> pb.ValidateDatasetResponse:
        await self._arrive(request, context)
        await self._dataset(request.dataset, context)
        return pb.ValidateDatasetResponse(report=self.report)

    async def PreviewTokens(
        self, request: pb.PreviewTokensRequest, context: Context
    ) -> pb.PreviewTokensResponse:
        await self._arrive(request, context)
        await self._dataset(request.dataset, context)
        return self.preview

    async def GetDataset(
        self, request: pb.GetDatasetRequest, context: Context
    ) -> pb.GetDatasetResponse:
        await self._arrive(request, context)
        return pb.GetDatasetResponse(dataset=await self._dataset(request.name, context))

    async def ListDatasets(
        self, request: pb.ListDatasetsRequest, context: Context
    ) -> pb.ListDatasetsResponse:
        await self._arrive(request, context)
        names = sorted(self.datasets)
        begin, end = page_of(request.page_token, request.page_size)
        return pb.ListDatasetsResponse(
            datasets=[self.datasets[name] for name in names[begin:end]],
            next_page_token=str(end) if end < len(names) else "",
        )

    async def DeleteDataset(
        self, request: pb.DeleteDatasetRequest, context: Context
    ) -> pb.DeleteDatasetResponse:
        await self._arrive(request, context)
        await self._dataset(request.name, context)
        if request.name in self.in_use:
            await fail(context, precondition("DATASET_IN_USE", "a job needs it"))
        del self.datasets[request.name]
        return pb.DeleteDatasetResponse()

    def add_dataset(
        self,
        name: str,
        content: bytes = b"{}\n",
        format: pb.DatasetFormat.ValueType = pb.DATASET_FORMAT_UNSPECIFIED,
    ) -> pb.Dataset:
        """One more dataset, as if it had been uploaded."""
        dataset = pb.Dataset(
            name=name,
            sha256=hashlib.sha256(content).hexdigest(),
            size_bytes=len(content),
            format=format,
        )
        dataset.create_time.FromJsonString("2026-01-02T03:04:05Z")
        self.datasets[name], self.content[name] = dataset, content
        return dataset

    async def _dataset(self, name: str, context: Context) -> pb.Dataset:
        if name not in self.datasets:
            text = f"dataset {name!r} is unknown"
            await fail(context, refusal(grpc.StatusCode.NOT_FOUND, "DATASET_NOT_FOUND", text))
        return self.datasets[name]

    async def _arrive(self, request: Message, context: Context) -> None:
        self.requests.append(request)
        self.time_remaining_s = context.time_remaining()
        if self.failures:
            await fail(context, self.failures.popleft())
