"""Sends bytes in chunks, and goes on where a broken upload stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO, Generic, TypeAlias, TypeVar

import grpc
import grpc.aio

from lora_gateway._backoff import Backoff
from lora_gateway._call_end import CallEnd
from lora_gateway._calls import Calls, Metadata
from lora_gateway._upload_source import UploadSource
from lora_gateway.errors import GatewayError, NotFound, Unavailable
from lora_gateway.v1.adapters_pb2 import UploadChunk
from lora_gateway.v1.errors_pb2 import ErrorReason

CHUNK_BYTES = 1024 * 1024
TRIES_WITHOUT_PROGRESS = 5
"""Tries in a row that store nothing further; the last one raises its error."""

UploadProgress: TypeAlias = Callable[[int, int], None]
"""Called with the bytes that were sent, and with all there are. The first can step back when an
upload goes on: what was under way when it broke off is sent again."""

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

if TYPE_CHECKING:
    _Call: TypeAlias = grpc.aio.StreamUnaryCall[_Request, _Response]


class ResumableUpload(Generic[_Request, _Response]):
    """One upload on its way to a gateway; a subclass for each service says how it is called."""

    def __init__(
        self,
        calls: Calls,
        source: UploadSource,
        *,
        progress: UploadProgress | None,
        timeout_s: float | None,
        metadata: Metadata | None,
    ) -> None:
        """`timeout_s` is for all tries together. None: the client's default for jobs."""
        self._calls = calls
        self._source = source
        self._progress = progress or _untold
        self._metadata = metadata
        self._loop = asyncio.get_running_loop()
        self._end_s = self._loop.time() + (calls.job_timeout_s if timeout_s is None else timeout_s)

    async def run(self) -> _Response:
        """Send what the gateway does not have yet, and wait for its answer.

        Raises:
            GatewayError: the gateway refuses it, or cannot be reached any more.
            ValueError: the source cannot be read, or changed since it was hashed.
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

    async def _query(self, timeout_s: float) -> int:
        """Bytes that are safely stored; all of them for a complete upload, since the header goes
        out for that one too: it is the gateway who compares it.

        Raises:
            GatewayError: the call failed.
        """
        raise NotImplementedError

    def _open(self, timeout_s: float) -> _Call[_Request, _Response]:
        """Begin the call that uploads."""
        raise NotImplementedError

    def _header_request(self) -> _Request:
        raise NotImplementedError

    def _chunk_request(self, chunk: UploadChunk) -> _Request:
        raise NotImplementedError

    async def _stored_bytes(self) -> int:
        try:
            return await self._query(self._remaining_s())
        except NotFound as error:
            if error.reason != ErrorReason.ERROR_REASON_UPLOAD_NOT_FOUND:
                raise
            return 0

    async def _send_from(self, offset: int) -> _Response:
        call = self._open(self._remaining_s())
        end = CallEnd(call)
        try:
            await self._write(call, offset)
            return await call
        except grpc.aio.AioRpcError as error:
            raise GatewayError.from_rpc_error(end.error(error)) from error
        finally:
            call.cancel()

    async def _write(self, call: _Call[_Request, _Response], offset: int) -> None:
        """Send header and chunks until all are sent, or the gateway has answered before."""
        total_bytes = self._source.size_bytes
        try:
            await call.write(self._header_request())
            with self._opened() as file:
                file.seek(offset)
                self._progress(offset, total_bytes)
                while offset < total_bytes:
                    data = await self._read(file, min(CHUNK_BYTES, total_bytes - offset))
                    chunk = UploadChunk(offset=offset, data=data)
                    await call.write(self._chunk_request(chunk))
                    offset += len(data)
                    self._progress(offset, total_bytes)
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the call has ended; awaiting it tells how

    def _opened(self) -> BinaryIO:
        try:
            return self._source.open()
        except OSError as error:
            raise self._changed() from error

    async def _read(self, file: BinaryIO, size_bytes: int) -> bytes:
        try:
            data = await asyncio.to_thread(file.read, size_bytes)
        except OSError as error:
            raise self._changed() from error
        if not data:
            raise self._changed()
        return data

    def _changed(self) -> ValueError:
        return ValueError(
            f"{self._source.name} changed while it was uploaded; upload it again when it is "
            "complete"
        )

    def _remaining_s(self) -> float:
        return max(self._end_s - self._loop.time(), 0)


def _passes(error: GatewayError) -> bool:
    """Whether another try may do better."""
    # The call that broke off may still hold the upload for a moment.
    held = error.reason == ErrorReason.ERROR_REASON_UPLOAD_OFFSET_MISMATCH
    return isinstance(error, Unavailable) or held


def _untold(sent_bytes: int, total_bytes: int) -> None:
    """For an upload whose progress nobody asked for."""
