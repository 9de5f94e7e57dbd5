"""Sends a dataset's file to a gateway."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_gateway._calls import Calls, Metadata
from lora_gateway._resumable_upload import ResumableUpload, UploadProgress
from lora_gateway._upload_source import UploadSource
from lora_gateway.v1.adapters_pb2 import UploadChunk
from lora_gateway.v1.training_pb2 import (
    DatasetFormat,
    DatasetHeader,
    TrainingQueryUploadRequest,
    UploadDatasetRequest,
    UploadDatasetResponse,
)

if TYPE_CHECKING:
    import grpc.aio

    from lora_gateway.v1.training_pb2_grpc import TrainingAsyncStub

DIGEST_CHARS = 8
"""Of the sha256, at the end of a name that was made."""
MAX_NAME_CHARS = 63
"""What the contract allows."""


@dataclass(frozen=True, slots=True)
class DatasetFile:
    """A dataset on this machine, hashed."""

    source: UploadSource

    @classmethod
    def read(cls, content: Path | bytes) -> DatasetFile:
        """Hash a dataset. Blocks on the disk; call it in a thread.

        Raises:
            ValueError: it cannot be read, or is empty.
        """
        try:
            source = UploadSource.of(content)
        except OSError as error:
            raise ValueError(
                f"{error.filename} cannot be read ({error.strerror}); name a file with one JSON "
                "object a line"
            ) from error
        if not source.size_bytes:
            raise ValueError(f"{source.name} is empty; a dataset has one JSON object a line")
        return cls(source)

    def name(self) -> str:
        """`<stem>-<first 8 of the sha256>`: other bytes get another name, as the contract asks."""
        content = self.source.content
        stem = content.stem.lower() if isinstance(content, Path) else ""
        stem = re.sub(r"[^a-z0-9._-]+", "-", stem).strip("._-") or "dataset"
        room = MAX_NAME_CHARS - DIGEST_CHARS - 1
        return f"{stem[:room]}-{self.source.sha256[:DIGEST_CHARS]}"

    def header(
        self, *, dataset: str, format: DatasetFormat.ValueType, upload_id: str | None
    ) -> DatasetHeader:
        """Arguments as for `TrainingClient.upload_dataset`."""
        if upload_id is None:
            # The same for the same bytes under the same name, so that a new process goes on.
            fields = f"{dataset} {self.source.sha256} {int(format)}"
            upload_id = hashlib.sha256(fields.encode()).hexdigest()[:40]
        return DatasetHeader(
            upload_id=upload_id,
            dataset=dataset,
            size_bytes=self.source.size_bytes,
            sha256=self.source.sha256,
            format=format,
        )


class DatasetUpload(ResumableUpload[UploadDatasetRequest, UploadDatasetResponse]):
    """One dataset on its way to a gateway."""

    def __init__(
        self,
        stub: TrainingAsyncStub,
        calls: Calls,
        source: UploadSource,
        header: DatasetHeader,
        *,
        progress: UploadProgress | None,
        timeout_s: float | None,
        metadata: Metadata | None,
    ) -> None:
        """Arguments as for `TrainingClient.upload_dataset`; the source belongs to the header."""
        super().__init__(calls, source, progress=progress, timeout_s=timeout_s, metadata=metadata)
        self._stub = stub
        self._header = header

    async def _query(self, timeout_s: float) -> int:
        request = TrainingQueryUploadRequest(upload_id=self._header.upload_id)
        answer = await self._calls.unary(self._stub.QueryUpload, request, timeout_s, self._metadata)
        return answer.offset

    def _open(
        self, timeout_s: float
    ) -> grpc.aio.StreamUnaryCall[UploadDatasetRequest, UploadDatasetResponse]:
        return self._stub.UploadDataset(
            timeout=timeout_s, metadata=self._calls.merged(self._metadata)
        )

    def _header_request(self) -> UploadDatasetRequest:
        return UploadDatasetRequest(header=self._header)

    def _chunk_request(self, chunk: UploadChunk) -> UploadDatasetRequest:
        return UploadDatasetRequest(chunk=chunk)
