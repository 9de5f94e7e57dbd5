"""An honest fake of the Adapters service: it keeps adapters in memory, and fails as told.

It speaks real gRPC from a real server; only checks, engines and disk behind it are missing.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn, TypeAlias

import grpc
import grpc.aio
from google.protobuf import duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from lora_gateway.v1 import adapters_pb2 as pb
from lora_gateway.v1.adapters_pb2_grpc import (
    AdaptersServicer,
    add_AdaptersServicer_to_server,
)

Context: TypeAlias = Any  # what the generated stubs call it, `_ServicerContext`, is private


def refusal(
    code: grpc.StatusCode,
    reason: str,
    text: str,
    *,
    retry_delay_s: int | None = None,
    **metadata: str,
) -> status_pb2.Status:
    """The status that the gateway answers with that reason."""
    status = status_pb2.Status(code=code.value[0], message=text)
    info = error_details_pb2.ErrorInfo(reason=reason, domain="lora-gateway", metadata=metadata)
    status.details.add().Pack(info)
    if retry_delay_s is not None:
        delay = duration_pb2.Duration(seconds=retry_delay_s)
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


UNAVAILABLE = refusal(
    grpc.StatusCode.UNAVAILABLE, "CONTROL_PLANE_UNAVAILABLE", "the control plane starts"
)
OVERLOADED = refusal(
    grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", "the gateway holds 1 watches", retry_delay_s=1
)


class FakeAdapters(AdaptersServicer):
    """Keeps versions, splits, uploads and events; every version is READY at once."""

    def __init__(self) -> None:
        self.requests: list[Message] = []
        """Every attempt that arrived, failed ones too; of an upload the header."""
        self.failures: deque[status_pb2.Status] = deque()
        """Each next attempt takes one and fails with it before it does anything."""
        self.time_remaining_s: float | None = None
        """Until the deadline of the last attempt, when it arrived; None: it has none."""
        self.upload_cuts: deque[tuple[int, status_pb2.Status]] = deque()
        """Each next upload takes one, and ends so once that many bytes are stored."""
        self.watch_cuts: deque[tuple[int, status_pb2.Status | None]] = deque()
        """Each next watch takes one, and ends so after that many events; None: in order."""
        self.silent_watches = 0
        """So many next watches send nothing at all."""
        self.evaluation_cut = False
        """Evaluations end in order, yet without their summary."""
        self.comparison = pb.CompareVersionsResponse()
        self.summary = pb.EvaluationSummary()
        self.cancelled = asyncio.Event()
        """A watch was left by its caller."""
        self.versions: dict[tuple[str, int], pb.AdapterVersion] = {}
        self.adapters: dict[str, pb.Adapter] = {}
        self.events: list[pb.AdapterEvent] = []
        self._changed = asyncio.Condition()
        self._made: dict[str, pb.AdapterVersion] = {}
        self._uploads: dict[str, bytearray] = {}
        self._history: dict[str, list[list[pb.TrafficSplit]]] = {}

    async def ValidateAdapter(
        self, request: pb.ValidateAdapterRequest, context: Context
    ) -> pb.ValidateAdapterResponse:
        await self._arrive(request, context)
        if "broken" in request.source_uri:
            return pb.ValidateAdapterResponse(findings=["rank 512 is above 64; train with less"])
        return pb.ValidateAdapterResponse(
            valid=True, facts=pb.AdapterFacts(rank=8, dtype="bfloat16", target_modules=["q_proj"])
        )

    async def CreateAdapterVersion(
        self, request: pb.CreateAdapterVersionRequest, context: Context
    ) -> pb.CreateAdapterVersionResponse:
        await self._arrive(request, context)
        version = await self._made_once(request.request_id, request.adapter, request.source_uri)
        return pb.CreateAdapterVersionResponse(adapter_version=version)

    async def UploadAdapterVersion(
        self, requests: AsyncIterator[pb.UploadAdapterVersionRequest], context: Context
    ) -> pb.UploadAdapterVersionResponse:
        header = (await anext(requests)).header
        await self._arrive(header, context)
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
        if len(stored) < header.weights_size_bytes:
            await fail(context, precondition("UPLOAD_INCOMPLETE", "bytes are missing"))
        assert hashlib.sha256(stored).hexdigest() == header.weights_sha256
        source = f"upload:{header.upload_id}"
        version = await self._made_once(header.upload_id, header.adapter, source)
        return pb.UploadAdapterVersionResponse(adapter_version=version)

    async def QueryUpload(
        self, request: pb.QueryUploadRequest, context: Context
    ) -> pb.QueryUploadResponse:
        await self._arrive(request, context)
        if request.upload_id not in self._uploads:
            await fail(
                context, refusal(grpc.StatusCode.NOT_FOUND, "UPLOAD_NOT_FOUND", "no such upload")
            )
        return pb.QueryUploadResponse(
            offset=len(self._uploads[request.upload_id]),
            adapter_version=self._made.get(request.upload_id),
        )

    async def GetAdapter(
        self, request: pb.GetAdapterRequest, context: Context
    ) -> pb.GetAdapterResponse:
        await self._arrive(request, context)
        return pb.GetAdapterResponse(adapter=await self._adapter(request.adapter, context))

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, context: Context
    ) -> pb.ListAdaptersResponse:
        await self._arrive(request, context)
        names = sorted(name for name in self.adapters if name.startswith(request.prefix))
        begin, end = page_of(request.page_token, request.page_size)
        return pb.ListAdaptersResponse(
            adapters=[self.adapters[name] for name in names[begin:end]],
            next_page_token=str(end) if end < len(names) else "",
        )

    async def GetAdapterVersion(
        self, request: pb.GetAdapterVersionRequest, context: Context
    ) -> pb.GetAdapterVersionResponse:
        return pb.GetAdapterVersionResponse(adapter_version=await self._named(request, context))

    async def ListAdapterVersions(
        self, request: pb.ListAdapterVersionsRequest, context: Context
    ) -> pb.ListAdapterVersionsResponse:
        await self._arrive(request, context)
        await self._adapter(request.adapter, context)
        found = [
            version
            for (adapter, _), version in sorted(self.versions.items(), reverse=True)
            if adapter == request.adapter
            and (request.show_deleted or version.state != pb.VERSION_STATE_DELETED)
        ]
        begin, end = page_of(request.page_token, request.page_size)
        return pb.ListAdapterVersionsResponse(
            adapter_versions=found[begin:end], next_page_token=str(end) if end < len(found) else ""
        )

    async def DeleteAdapterVersion(
        self, request: pb.DeleteAdapterVersionRequest, context: Context
    ) -> pb.DeleteAdapterVersionResponse:
        version = await self._named(request, context)
        if any(arm.version == request.version for arm in self.adapters[request.adapter].splits):
            await fail(context, precondition("VERSION_IN_USE", "it has traffic; move it first"))
        version.state = pb.VERSION_STATE_DELETED
        await self._tell(pb.EVENT_KIND_VERSION_DELETED, request.adapter, request.version)
        return pb.DeleteAdapterVersionResponse(adapter_version=version)

    async def SetTraffic(
        self, request: pb.SetTrafficRequest, context: Context
    ) -> pb.SetTrafficResponse:
        await self._arrive(request, context)
        adapter = await self._adapter(request.adapter, context)
        if request.etag and request.etag != adapter.etag:
            text = "it changed since; read it again"
            await fail(context, refusal(grpc.StatusCode.ABORTED, "ETAG_MISMATCH", text))
        self._split(adapter, list(request.splits))
        adapter.ClearField("guard")
        if request.HasField("guard"):
            adapter.guard.CopyFrom(request.guard)
        await self._tell(pb.EVENT_KIND_TRAFFIC_SET, request.adapter, 0)
        return pb.SetTrafficResponse(adapter=adapter)

    async def PromoteVersion(
        self, request: pb.PromoteVersionRequest, context: Context
    ) -> pb.PromoteVersionResponse:
        await self._arrive(request, context)
        adapter = await self._adapter(request.adapter, context)
        self._split(adapter, [pb.TrafficSplit(version=request.version, weight=1)])
        await self._tell(pb.EVENT_KIND_VERSION_PROMOTED, request.adapter, 0)
        return pb.PromoteVersionResponse(adapter=adapter)

    async def RollbackAdapter(
        self, request: pb.RollbackAdapterRequest, context: Context
    ) -> pb.RollbackAdapterResponse:
        await self._arrive(request, context)
        adapter = await self._adapter(request.adapter, context)
        history = self._history[request.adapter]
        if len(history) < 2:
            await fail(context, precondition("NOTHING_TO_ROLL_BACK", "there is no earlier split"))
        history.pop()
        self._split(adapter, history.pop())
        await self._tell(pb.EVENT_KIND_ADAPTER_ROLLED_BACK, request.adapter, 0)
        return pb.RollbackAdapterResponse(adapter=adapter)

    async def CompareVersions(
        self, request: pb.CompareVersionsRequest, context: Context
    ) -> pb.CompareVersionsResponse:
        await self._arrive(request, context)
        return self.comparison

    async def EvaluateVersion(
        self, request: pb.EvaluateVersionRequest, context: Context
    ) -> AsyncIterator[pb.EvaluateVersionResponse]:
        await self._arrive(request, context)
        pairs = [(i, v) for i in range(len(request.examples)) for v in request.versions]
        for done, (example, version) in enumerate(pairs, start=1):
            if request.return_results:
                yield pb.EvaluateVersionResponse(
                    result=pb.EvaluationResult(
                        example=example,
                        version=version,
                        answer=f"answer {example}",
                        scores=[pb.Score(scorer=pb.SCORER_CONTAINS, value=1)],
                    )
                )
            progress = pb.EvaluationProgress(done=done, total=len(pairs))
            yield pb.EvaluateVersionResponse(progress=progress)
        if not self.evaluation_cut:
            yield pb.EvaluateVersionResponse(summary=self.summary)

    async def RecordFeedback(
        self, request: pb.RecordFeedbackRequest, context: Context
    ) -> pb.RecordFeedbackResponse:
        await self._arrive(request, context)
        return pb.RecordFeedbackResponse(adapter="pirate", version=2)

    async def LoadAdapterVersion(
        self, request: pb.LoadAdapterVersionRequest, context: Context
    ) -> pb.LoadAdapterVersionResponse:
        version = await self._named(request, context)
        version.residency.append(pb.Residency(shard="shard-0", load_duration_ms=12.5))
        return pb.LoadAdapterVersionResponse(adapter_version=version)

    async def UnloadAdapterVersion(
        self, request: pb.UnloadAdapterVersionRequest, context: Context
    ) -> pb.UnloadAdapterVersionResponse:
        version = await self._named(request, context)
        version.ClearField("residency")
        return pb.UnloadAdapterVersionResponse(adapter_version=version)

    async def WatchAdapters(
        self, request: pb.WatchAdaptersRequest, context: Context
    ) -> AsyncIterator[pb.WatchAdaptersResponse]:
        await self._arrive(request, context)
        try:
            if self.silent_watches:
                self.silent_watches -= 1
                await asyncio.Event().wait()
            newest = len(self.events)
            position = request.after_sequence if request.HasField("after_sequence") else newest
            cut = self.watch_cuts.popleft() if self.watch_cuts else None
            yield pb.WatchAdaptersResponse(heartbeat=pb.WatchHeartbeat(sequence=newest))
            while cut is None or cut[0] > 0:
                async with self._changed:
                    while len(self.events) <= position:
                        await self._changed.wait()
                event = self.events[position]
                position += 1
                if request.adapter in ("", event.adapter):
                    yield pb.WatchAdaptersResponse(event=event)
                    cut = None if cut is None else (cut[0] - 1, cut[1])
            if cut[1] is not None:
                await fail(context, cut[1])
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def add(self, adapter: str) -> pb.AdapterVersion:
        """One more version, as if somebody else had created it."""
        return await self._made_once("", adapter, "/elsewhere")

    async def _made_once(self, request_id: str, adapter: str, source: str) -> pb.AdapterVersion:
        if request_id in self._made:
            return self._made[request_id]
        known = self.adapters.setdefault(adapter, pb.Adapter(adapter=adapter, etag="t0"))
        known.latest_version += 1
        version = pb.AdapterVersion(
            adapter=adapter,
            version=known.latest_version,
            state=pb.VERSION_STATE_READY,
            source_uri=source,
            rank=8,
            size_bytes=3 * 2**20,
        )
        self.versions[adapter, version.version] = version
        if request_id:
            self._made[request_id] = version
        await self._tell(pb.EVENT_KIND_VERSION_READY, adapter, version.version)
        if version.version == 1:
            self._split(known, [pb.TrafficSplit(version=1, weight=1)])
        return version

    def _split(self, adapter: pb.Adapter, splits: list[pb.TrafficSplit]) -> None:
        self._history.setdefault(adapter.adapter, []).append(splits)
        adapter.etag = f"t{int(adapter.etag[1:]) + 1}"
        del adapter.splits[:]
        adapter.splits.extend(splits)

    async def _tell(self, kind: pb.EventKind.ValueType, adapter: str, version: int) -> None:
        event = pb.AdapterEvent(
            sequence=len(self.events) + 1,
            kind=kind,
            adapter=adapter,
            version=version,
            actor="gateway",
            splits=[] if version else self.adapters[adapter].splits,
        )
        async with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    async def _named(self, request: Any, context: Context) -> pb.AdapterVersion:
        """The version that a request with `adapter` and `version` names."""
        await self._arrive(request, context)
        found = self.versions.get((request.adapter, request.version))
        if found is None:
            text = f"adapter {request.adapter!r} has no version {request.version}"
            await fail(context, refusal(grpc.StatusCode.NOT_FOUND, "VERSION_NOT_FOUND", text))
        return found

    async def _adapter(self, name: str, context: Context) -> pb.Adapter:
        if name not in self.adapters:
            text = f"adapter {name!r} is unknown"
            await fail(context, refusal(grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND", text))
        return self.adapters[name]

    async def _arrive(self, request: Message, context: Context) -> None:
        self.requests.append(request)
        self.time_remaining_s = context.time_remaining()
        if self.failures:
            await fail(context, self.failures.popleft())


@asynccontextmanager
async def served(adapters: FakeAdapters) -> AsyncIterator[str]:
    """Serve on a free port of the loopback; gives the target."""
    server = grpc.aio.server()
    add_AdaptersServicer_to_server(adapters, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=None)


def precondition(reason: str, text: str) -> status_pb2.Status:
    return refusal(grpc.StatusCode.FAILED_PRECONDITION, reason, text)


def page_of(token: str, size: int) -> tuple[int, int]:
    begin = int(token or 0)
    return begin, begin + (size or 100)


async def fail(context: Context, status: status_pb2.Status) -> NoReturn:
    await context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError("an aborted call goes no further")
