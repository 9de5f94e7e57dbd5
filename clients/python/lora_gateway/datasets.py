"""Half of the client of the gateway's `Training` service: what is trained on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING

from lora_gateway._calls import Calls, Metadata
from lora_gateway._resumable_upload import UploadProgress
from lora_gateway.dataset_upload import DatasetFile, DatasetUpload
from lora_gateway.v1.training_pb2 import (
    Dataset,
    DatasetFormat,
    DatasetReport,
    DataSpec,
    DeleteDatasetRequest,
    GetDatasetRequest,
    ListDatasetsRequest,
    PreviewTokensRequest,
    PreviewTokensResponse,
    ValidateDatasetRequest,
)

if TYPE_CHECKING:
    from lora_gateway.v1.training_pb2_grpc import TrainingAsyncStub


class DatasetCalls:
    """The methods of `TrainingClient` that are about datasets."""

    def __init__(self, stub: TrainingAsyncStub, calls: Calls) -> None:
        self._stub = stub
        self._calls = calls

    async def upload_dataset(
        self,
        source: Path | bytes,
        *,
        dataset: str | None = None,
        format: DatasetFormat.ValueType = DatasetFormat.DATASET_FORMAT_UNSPECIFIED,
        upload_id: str | None = None,
        progress: UploadProgress | None = None,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> Dataset:
        """Send a dataset from this machine: one JSON object a line.

        Goes on where an upload of the same id stopped, also one of an earlier process, and by
        itself as long as the gateway comes back and stores more.

        Args:
            source: a file, or its bytes.
            dataset: the name it gets. None: made of the file's name and the digest, so that other
                bytes get another name.
            format: of its lines. Left out: detected when it is read.
            upload_id: names the upload. None: made of name and content.
            progress: told the bytes sent and the total, after each chunk.

        Raises:
            ValueError: the file is empty, cannot be read, or changed meanwhile.
            GatewayError: reason DATASET_EXISTS if that name has other bytes or another format.
        """
        file = await asyncio.to_thread(DatasetFile.read, source)
        header = file.header(dataset=dataset or file.name(), format=format, upload_id=upload_id)
        upload = DatasetUpload(
            self._stub,
            self._calls,
            file.source,
            header,
            progress=progress,
            timeout_s=timeout_s,
            metadata=metadata,
        )
        return (await upload.run()).dataset

    async def validate_dataset(
        self,
        dataset: str,
        *,
        data: DataSpec | None = None,
        max_issues: int | None = None,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> DatasetReport:
        """Read every line and count tokens. A dataset that is not valid is an answer, no error.

        Args:
            data: how it would be used. None: by the defaults.
            max_issues: that are listed. None: the gateway's default.
            timeout_s: None: the client's default for jobs.
        """
        request = ValidateDatasetRequest(dataset=dataset, data=data, max_issues=max_issues)
        method = self._stub.ValidateDataset
        timeout_s = self._calls.job_timeout_s if timeout_s is None else timeout_s
        return (await self._calls.unary(method, request, timeout_s, metadata)).report

    async def preview_tokens(
        self,
        dataset: str,
        line: int,
        *,
        data: DataSpec | None = None,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> PreviewTokensResponse:
        """One line as the trainer will see it: text, ids, and which tokens are trained on.

        Args:
            line: from 1.
            data: how it would be used. None: by the defaults.
        """
        request = PreviewTokensRequest(dataset=dataset, line=line, data=data)
        method = self._stub.PreviewTokens
        return await self._calls.unary(method, request, timeout_s, metadata, waits=True)

    async def get_dataset(
        self, name: str, *, timeout_s: float | None = None, metadata: Metadata | None = None
    ) -> Dataset:
        """One dataset's size, digest and format."""
        request = GetDatasetRequest(name=name)
        response = await self._calls.unary(self._stub.GetDataset, request, timeout_s, metadata)
        return response.dataset

    async def list_datasets(
        self,
        *,
        page_size: int = 0,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> AsyncGenerator[Dataset, None]:
        """Datasets by name; asks for the next page when it is needed.

        Args:
            page_size: the most datasets of a page. 0: the gateway's default.
            timeout_s: for each page.
        """
        request = ListDatasetsRequest(page_size=page_size)
        while True:
            page = await self._calls.unary(self._stub.ListDatasets, request, timeout_s, metadata)
            for dataset in page.datasets:
                yield dataset
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def delete_dataset(
        self, name: str, *, timeout_s: float | None = None, metadata: Metadata | None = None
    ) -> None:
        """Delete a dataset. FailedPrecondition with reason DATASET_IN_USE: a job needs it."""
        request = DeleteDatasetRequest(name=name)
        await self._calls.unary(self._stub.DeleteDataset, request, timeout_s, metadata)
