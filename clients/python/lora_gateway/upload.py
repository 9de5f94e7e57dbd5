"""Sends an adapter's files to a gateway, and goes on where a broken upload stopped."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

import grpc
import grpc.aio

from lora_gateway._backoff import Backoff
from lora_gateway._call_end import CallEnd
from lora_gateway._calls import Calls, Metadata
from lora_gateway.errors import GatewayError, NotFound, Unavailable
from lora_gateway.v1.adapters_pb2 import (
    AdapterVersion,
    QueryUploadRequest,
    UploadAdapterVersionRequest,
    UploadAdapterVersionResponse,
    UploadChunk,
    UploadHeader,
)
from lora_gateway.v1.errors_pb2 import ErrorReason
from lora_gateway.v1.inference_pb2 import ModelFingerprints

if TYPE_CHECKING:
    from lora_gateway.v1.adapters_pb2_grpc import AdaptersAsyncStub

    _Call: TypeAlias = grpc.aio.StreamUnaryCall[
        UploadAdapterVersionRequest, UploadAdapterVersionResponse
    ]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 64 * 1024
"""What the contract allows for `adapter_config.json`."""
CHUNK_BYTES = 1024 * 1024
TRIES_WITHOUT_PROGRESS = 5
"""Tries in a row that store nothing further; the last one raises its error."""

UploadProgress: TypeAlias = Callable[[int, int], None]
"""Called with the bytes of the weights that were sent, and with all there are. The first can
step back when an upload goes on: what was under way when it broke off is sent again."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """The two files of an adapter on this machine, read and hashed."""

    config: bytes
    """The content of `adapter_config.json`."""
    weights: Path
    size_bytes: int
    """Of the weights."""
    sha256: str
    """Of the weights, lower-case hex."""

    @classmethod
    def read(cls, folder: Path) -> AdapterFiles:
        """Read the files in `folder`. Blocks on the disk; call it in a thread.

        Raises:
            ValueError: one is missing, cannot be read or is too large.
        """
        config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
        try:
            with config_path.open("rb") as file:
                config = file.read(MAX_CONFIG_BYTES + 1)
            with weights_path.open("rb") as file:
                sha256, size_bytes = _hashed(file)
        except OSError as error:
            raise ValueError(
                f"{error.filename or folder} cannot be read ({error.strerror}); name a folder "
                "that PEFT's save_pretrained wrote"
            ) from error
        if len(config) > MAX_CONFIG_BYTES:
            raise ValueError(f"{config_path} is larger than the {MAX_CONFIG_BYTES} bytes allowed")
        return cls(config, weights_path, size_bytes, sha256)

    def upload_id(self, adapter: str) -> str:
        """The same for the same bytes under the same name, so that a new process goes on."""
        digest = hashlib.sha256()
        for part in (adapter.encode(), self.config, self.sha256.encode()):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
        return digest.hexdigest()[:40]


class Upload:
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
        self._stub = stub
        self._calls = calls
        self._files = files
        self._header = header
        self._progress = progress or _untold
        self._metadata = metadata
        self._loop = asyncio.get_running_loop()
        self._end_s = self._loop.time() + (calls.job_timeout_s if timeout_s is None else timeout_s)

    async def run(self) -> AdapterVersion:
        """Send what the gateway does not have yet, and wait for its answer.

        Raises:
            GatewayError: the gateway refuses it, or cannot be reached any more.
            ValueError: the weights cannot be read, or changed since they were hashed.
        """
        backoff, tries, furthest = Backoff(), 0, 0
        while True:
            try:
                offset = await self._stored_bytes()
                if offset > furthest:
                    furthest, tries = offset, 0
                    backoff.reset()
                return await self._send_from(offset)
            except GatewayError as error:
                tries += 1
                delay_s = backoff.delay_s(error.retry_delay_s)
                too_late = self._loop.time() + delay_s >= self._end_s
                if not _passes(error) or tries >= TRIES_WITHOUT_PROGRESS or too_late:
                    raise
            await asyncio.sleep(delay_s)

    async def _stored_bytes(self) -> int:
        request = QueryUploadRequest(upload_id=self._header.upload_id)
        try:
            answer = await self._calls.unary(
                self._stub.QueryUpload, request, self._remaining_s(), self._metadata
            )
        except NotFound as error:
            if error.reason != ErrorReason.ERROR_REASON_UPLOAD_NOT_FOUND:
                raise
            return 0
        # The header goes out for a complete one too: it is the gateway who compares it, and
        # who waits for the version.
        complete = answer.HasField("adapter_version")
        return self._files.size_bytes if complete else answer.offset

    async def _send_from(self, offset: int) -> AdapterVersion:
        call = self._stub.UploadAdapterVersion(
            timeout=self._remaining_s(), metadata=self._calls.merged(self._metadata)
        )
        end = CallEnd(call)
        try:
            await self._write(call, offset)
            return (await call).adapter_version
        except grpc.aio.AioRpcError as error:
            raise GatewayError.from_rpc_error(end.error(error)) from error
        finally:
            call.cancel()

    async def _write(self, call: _Call, offset: int) -> None:
        """Send header and chunks until all are sent, or the gateway has answered before."""
        try:
            await call.write(UploadAdapterVersionRequest(header=self._header))
            with self._opened() as file:
                file.seek(offset)
                self._progress(offset, self._files.size_bytes)
                while offset < self._files.size_bytes:
                    data = await self._read(file)
                    chunk = UploadChunk(offset=offset, data=data)
                    await call.write(UploadAdapterVersionRequest(chunk=chunk))
                    offset += len(data)
                    self._progress(offset, self._files.size_bytes)
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the call has ended; awaiting it tells how

    def _opened(self) -> BinaryIO:
        try:
            return self._files.weights.open("rb", buffering=0)
        except OSError as error:
            raise self._changed() from error

    async def _read(self, file: BinaryIO) -> bytes:
        try:
            data = await asyncio.to_thread(file.read, CHUNK_BYTES)
        except OSError as error:
            raise self._changed() from error
        if not data:
            raise self._changed()
        return data

    def _changed(self) -> ValueError:
        return ValueError(
            f"{self._files.weights} changed while it was uploaded; upload it again when it is "
            "complete"
        )

    def _remaining_s(self) -> float:
        return max(self._end_s - self._loop.time(), 0)


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
        weights_size_bytes=files.size_bytes,
        weights_sha256=files.sha256,
        labels=labels,
        wait=wait,
        no_traffic=no_traffic,
        fingerprints=fingerprints,
    )


def _passes(error: GatewayError) -> bool:
    """Whether another try may do better."""
    # The call that broke off may still hold the upload for a moment.
    held = error.reason == ErrorReason.ERROR_REASON_UPLOAD_OFFSET_MISMATCH
    return isinstance(error, Unavailable) or held


def _hashed(file: BinaryIO) -> tuple[str, int]:
    # `hashlib.file_digest` begins with Python 3.11; this package does with 3.10.
    digest, size_bytes = hashlib.sha256(), 0
    while data := file.read(CHUNK_BYTES):
        digest.update(data)
        size_bytes += len(data)
    return digest.hexdigest(), size_bytes


def _untold(sent_bytes: int, total_bytes: int) -> None:
    """For an upload whose progress nobody asked for."""
