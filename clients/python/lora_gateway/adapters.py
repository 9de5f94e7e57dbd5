"""The asyncio client of the gateway's `Adapters` service."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path

import grpc.aio

from lora_gateway._calls import Calls, Metadata
from lora_gateway._resumable_upload import UploadProgress
from lora_gateway.traffic import TrafficCalls
from lora_gateway.upload import AdapterFiles, Upload, upload_header
from lora_gateway.v1.adapters_pb2 import (
    Adapter,
    AdapterVersion,
    CreateAdapterVersionRequest,
    DeleteAdapterVersionRequest,
    GetAdapterRequest,
    GetAdapterVersionRequest,
    ListAdaptersRequest,
    ListAdapterVersionsRequest,
    LoadAdapterVersionRequest,
    UnloadAdapterVersionRequest,
    ValidateAdapterRequest,
    ValidateAdapterResponse,
)
from lora_gateway.v1.adapters_pb2_grpc import AdaptersStub
from lora_gateway.v1.inference_pb2 import ModelFingerprints
from lora_gateway.watch import AdapterWatch


class AdaptersClient(TrafficCalls):
    """Adapters as artifacts: taken in, versioned, swapped, compared. `GatewayClient.adapters`.

        version = await client.adapters.upload(Path("pirate"), adapter="pirate", wait=True)
        await client.adapters.set_traffic("pirate", {1: 90, version.version: 10})

    Answers are the messages of `adapters.proto`, which tells what each field means. Every
    method takes `timeout_s` for the whole call and `metadata` for this call, and raises a
    GatewayError if the call failed and TypeError or ValueError if an argument fits into no
    message. Calls that can be repeated safely are tried again when UNAVAILABLE, four times in
    all; those that move traffic are not.
    """

    def __init__(self, channel: grpc.aio.Channel, calls: Calls) -> None:
        """`GatewayClient` makes one; it is the owner of the channel."""
        super().__init__(AdaptersStub(channel), calls)

    async def validate(
        self,
        source_uri: str,
        *,
        expected_sha256: str = "",
        fingerprints: ModelFingerprints | None = None,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> ValidateAdapterResponse:
        """Check an adapter and keep nothing. One that would be refused is an answer, no error.

        Args:
            source_uri: as for `create`, like the other arguments.
        """
        request = ValidateAdapterRequest(
            source_uri=source_uri, expected_sha256=expected_sha256, fingerprints=fingerprints
        )
        return await self._calls.unary(
            self._stub.ValidateAdapter, request, timeout_s, metadata, waits=True
        )

    async def create(
        self,
        adapter: str,
        source_uri: str,
        *,
        expected_sha256: str = "",
        labels: Mapping[str, str] | None = None,
        wait: bool = False,
        no_traffic: bool = False,
        fingerprints: ModelFingerprints | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> AdapterVersion:
        """Take in an adapter that the gateway can read, as the next version of its name.

        Args:
            adapter: its name; made if it does not exist.
            source_uri: folder on the gateway's machine, or URL, below an allowed place.
            expected_sha256: of the weights, lower-case hex. Empty: not compared.
            labels: kept with the version.
            wait: answer when it is READY, or raise InvalidRequest with all findings.
            no_traffic: also a first version gets none by itself.
            fingerprints: of the base model that it was trained on, to be compared.
            request_id: calls with the same id make one version. None: one for this call.

        Raises:
            PermissionDenied: the gateway may not read there; `upload` needs no such leave.
            InvalidRequest: with `wait`, the adapter was refused; `violations` say why.
            GatewayError: the call failed otherwise.
        """
        request = CreateAdapterVersionRequest(
            # Never empty: gRPC tries again, and the second try must find the first one's version.
            request_id=uuid.uuid4().hex if request_id is None else request_id,
            adapter=adapter,
            source_uri=source_uri,
            expected_sha256=expected_sha256,
            labels=labels,
            wait=wait,
            no_traffic=no_traffic,
            fingerprints=fingerprints,
        )
        method = self._stub.CreateAdapterVersion
        response = await self._calls.unary(method, request, timeout_s, metadata, waits=wait)
        return response.adapter_version

    async def upload(
        self,
        folder: Path,
        *,
        adapter: str,
        upload_id: str | None = None,
        labels: Mapping[str, str] | None = None,
        wait: bool = False,
        no_traffic: bool = False,
        fingerprints: ModelFingerprints | None = None,
        progress: UploadProgress | None = None,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> AdapterVersion:
        """Send an adapter from this machine, as the next version of its name.

        Goes on where an upload of the same id stopped, also one of an earlier process, and by
        itself as long as the gateway comes back and stores more.

        Args:
            folder: with `adapter_config.json` and `adapter_model.safetensors`.
            upload_id: names the upload. None: made of name and content, so that the same
                adapter sent twice is one version, whatever became of that. To take it in once
                more, for example after it was deleted, give an id of your own.
            progress: told the bytes sent and the total, after each chunk.
                The other arguments are those of `create`.

        Raises:
            ValueError: the files cannot be read, are too large, or changed meanwhile.
            GatewayError: as for `create`; reason REQUEST_ID_REUSED if the id was used before
                with other labels or for other content.
        """
        files = await asyncio.to_thread(AdapterFiles.read, folder)
        header = upload_header(
            files,
            adapter=adapter,
            upload_id=upload_id,
            labels=labels,
            wait=wait,
            no_traffic=no_traffic,
            fingerprints=fingerprints,
        )
        upload = Upload(
            self._stub,
            self._calls,
            files,
            header,
            progress=progress,
            timeout_s=timeout_s,
            metadata=metadata,
        )
        return (await upload.run()).adapter_version

    async def get(
        self, adapter: str, *, timeout_s: float | None = None, metadata: Metadata | None = None
    ) -> Adapter:
        """An adapter's traffic split, guard and etag."""
        request = GetAdapterRequest(adapter=adapter)
        response = await self._calls.unary(self._stub.GetAdapter, request, timeout_s, metadata)
        return response.adapter

    async def list(
        self,
        *,
        prefix: str = "",
        page_size: int = 0,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> AsyncGenerator[Adapter, None]:
        """Adapters by name; asks for the next page when it is needed.

        Args:
            prefix: that names begin with. Empty: all.
            page_size: the most adapters of a page. 0: the gateway's default.
            timeout_s: for each page.
        """
        request = ListAdaptersRequest(prefix=prefix, page_size=page_size)
        while True:
            page = await self._calls.unary(self._stub.ListAdapters, request, timeout_s, metadata)
            for adapter in page.adapters:
                yield adapter
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def get_version(
        self,
        adapter: str,
        version: int,
        *,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> AdapterVersion:
        """One version, with its state, findings and residency."""
        request = GetAdapterVersionRequest(adapter=adapter, version=version)
        method = self._stub.GetAdapterVersion
        return (await self._calls.unary(method, request, timeout_s, metadata)).adapter_version

    async def list_versions(
        self,
        adapter: str,
        *,
        show_deleted: bool = False,
        page_size: int = 0,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> AsyncGenerator[AdapterVersion, None]:
        """Versions of an adapter, newest first; asks for the next page when it is needed.

        Args:
            show_deleted: deleted ones too.
                The other arguments are those of `list`.
        """
        request = ListAdapterVersionsRequest(
            adapter=adapter, show_deleted=show_deleted, page_size=page_size
        )
        method = self._stub.ListAdapterVersions
        while True:
            page = await self._calls.unary(method, request, timeout_s, metadata)
            for version in page.adapter_versions:
                yield version
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def delete(
        self,
        adapter: str,
        version: int,
        *,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> AdapterVersion:
        """Delete a version without traffic; answers when its last request has ended.

        Deletion goes on should this time out. FailedPrecondition with reason VERSION_IN_USE:
        the version has traffic.
        """
        request = DeleteAdapterVersionRequest(adapter=adapter, version=version)
        method = self._stub.DeleteAdapterVersion
        response = await self._calls.unary(method, request, timeout_s, metadata, waits=True)
        return response.adapter_version

    async def load(
        self,
        adapter: str,
        version: int,
        *,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> AdapterVersion:
        """Load a READY version ahead of need; answers when it is resident."""
        request = LoadAdapterVersionRequest(adapter=adapter, version=version)
        method = self._stub.LoadAdapterVersion
        response = await self._calls.unary(method, request, timeout_s, metadata, waits=True)
        return response.adapter_version

    async def unload(
        self,
        adapter: str,
        version: int,
        *,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> AdapterVersion:
        """Take a version out of memory; answers when its last running request has ended."""
        request = UnloadAdapterVersionRequest(adapter=adapter, version=version)
        method = self._stub.UnloadAdapterVersion
        response = await self._calls.unary(method, request, timeout_s, metadata, waits=True)
        return response.adapter_version

    def watch(
        self,
        *,
        after_sequence: int | None = None,
        adapter: str = "",
        reconnect: bool = True,
        metadata: Metadata | None = None,
    ) -> AdapterWatch:
        """Changes as they happen, each once, in order and without a gap. Has no timeout.

        Args:
            after_sequence: the last one that you have seen. 0: from the first ever. None: only
                new ones.
            adapter: whose changes. Empty: those of all.
            reconnect: call again when the gateway is gone, until it is back.
        """
        return AdapterWatch(
            lambda request: self._stub.WatchAdapters(
                request, metadata=self._calls.merged(metadata)
            ),
            after_sequence=after_sequence,
            adapter=adapter,
            reconnect=reconnect,
        )
