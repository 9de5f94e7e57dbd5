"""Sends an adapter's files to a gateway."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_gateway._calls import Calls, Metadata
from lora_gateway._resumable_upload import ResumableUpload, UploadProgress
from lora_gateway._upload_source import UploadSource
from lora_gateway.v1.adapters_pb2 import (
    QueryUploadRequest,
    UploadAdapterVersionRequest,
    UploadAdapterVersionResponse,
    UploadChunk,
    UploadHeader,
)
from lora_gateway.v1.inference_pb2 import ModelFingerprints

if TYPE_CHECKING:
    import grpc.aio

    from lora_gateway.v1.adapters_pb2_grpc import AdaptersAsyncStub

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 64 * 1024
"""What the contract allows for `adapter_config.json`."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """The two files of an adapter on this machine, read and hashed."""

    config: bytes
    """The content of `adapter_config.json`."""
    weights: UploadSource

    @classmethod
    def read(cls, folder: Path) -> AdapterFiles:
        """Read the files in `folder`. Blocks on the disk; call it in a thread.

        Raises:
            ValueError: one is missing, cannot be read or is too large.
        """
        config_path = folder / CONFIG_FILE
        try:
            with config_path.open("rb") as file:
                config = file.read(MAX_CONFIG_BYTES + 1)
            weights = UploadSource.of(folder / WEIGHTS_FILE)
        except OSError as error:
            raise ValueError(
                f"{error.filename or folder} cannot be read ({error.strerror}); name a folder "
                "that PEFT's save_pretrained wrote"
            ) from error
        if len(config) > MAX_CONFIG_BYTES:
            raise ValueError(f"{config_path} is larger than the {MAX_CONFIG_BYTES} bytes allowed")
        return cls(config, weights)

    def upload_id(self, adapter: str) -> str:
        """The same for the same bytes under the same name, so that a new process goes on."""
        digest = hashlib.sha256()
        for part in (adapter.encode(), self.config, self.weights.sha256.encode()):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
        return digest.hexdigest()[:40]


class Upload(ResumableUpload[UploadAdapterVersionRequest, UploadAdapterVersionResponse]):
    """One adapter on its way to a gateway."""

    def __init__(
        self,
        stub: AdaptersAsyncStub,
        calls: Calls,
        files: AdapterFiles,
        header: UploadHeader,
        *,
        progress: UploadProgress | None,
        timeout_s: float | None,
        metadata: Metadata | None,
    ) -> None:
        """Arguments as for `AdaptersClient.upload`; the files belong to the header."""
        super().__init__(
            calls, files.weights, progress=progress, timeout_s=timeout_s, metadata=metadata
        )
        self._stub = stub
        self._header = header

    async def _query(self, timeout_s: float) -> int:
        request = QueryUploadRequest(upload_id=self._header.upload_id)
        answer = await self._calls.unary(self._stub.QueryUpload, request, timeout_s, self._metadata)
        complete = answer.HasField("adapter_version")
        return self._source.size_bytes if complete else answer.offset

    def _open(
        self, timeout_s: float
    ) -> grpc.aio.StreamUnaryCall[UploadAdapterVersionRequest, UploadAdapterVersionResponse]:
        return self._stub.UploadAdapterVersion(
            timeout=timeout_s, metadata=self._calls.merged(self._metadata)
        )

    def _header_request(self) -> UploadAdapterVersionRequest:
        return UploadAdapterVersionRequest(header=self._header)

    def _chunk_request(self, chunk: UploadChunk) -> UploadAdapterVersionRequest:
        return UploadAdapterVersionRequest(chunk=chunk)


def upload_header(
    files: AdapterFiles,
    *,
    adapter: str,
    upload_id: str | None,
    labels: Mapping[str, str] | None,
    wait: bool,
    no_traffic: bool,
    fingerprints: ModelFingerprints | None,
) -> UploadHeader:
    """The header for `files`; the other arguments are those of `AdaptersClient.upload`."""
    return UploadHeader(
        upload_id=files.upload_id(adapter) if upload_id is None else upload_id,
        adapter=adapter,
        adapter_config=files.config,
        weights_size_bytes=files.weights.size_bytes,
        weights_sha256=files.weights.sha256,
        labels=labels,
        wait=wait,
        no_traffic=no_traffic,
        fingerprints=fingerprints,
    )
