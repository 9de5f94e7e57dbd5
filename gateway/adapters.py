"""The Adapters service, as the host answers it: decode, call, encode."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from engine.catalog import AdapterCatalog
from engine.errors import AdapterInvalid
from engine.generation import VersionKey
from engine.intake import UPLOAD_SCHEME
from engine.ledger import Ledger
from gateway import adapter_codec as codec
from gateway.admission import Admission, Overloaded, Slots
from gateway.call import current_call
from gateway.evaluation import Evaluations
from gateway.exceptions import SequenceUnknown
from gateway.judgement import Judgement
from gateway.upload_stream import read_header, receive
from gateway.wrap import Context
from lora_gateway.v1 import adapters_pb2 as pb
from lora_gateway.v1.adapters_pb2_grpc import AdaptersServicer
from store.records import (
    AdapterRecord,
    EventRecord,
    VersionNotReady,
    VersionRecord,
    VersionState,
)
from store.registry import Registry
from store.upload_folder import full_disk_is_said
from store.uploads import UploadStore

HEARTBEAT_S = 15.0
MAX_RUNNING = 256
"""Validations and deletions at once. A caller may name sources that take an hour."""

PATIENT_METHODS = frozenset(
    {
        "ValidateAdapter",
        "CreateAdapterVersion",
        "UploadAdapterVersion",
        "DeleteAdapterVersion",
        "EvaluateVersion",
        "LoadAdapterVersion",
        "UnloadAdapterVersion",
        "WatchAdapters",
    }
)
"""They take as long as an adapter is large, a stream runs or a caller looks on."""


class Adapters(AdaptersServicer):
    """Answers from the catalog; single requests and evaluations have their own files."""

    def __init__(
        self,
        catalog: AdapterCatalog,
        ledger: Ledger,
        registry: Registry,
        uploads: UploadStore,
        judgement: Judgement,
        evaluations: Evaluations,
        admission: Admission,
        watches: Slots,
    ) -> None:
        """`watches` are held by those who follow, `admission` by those who evaluate."""
        self._catalog = catalog
        self._ledger = ledger
        self._registry = registry
        self._uploads = uploads
        self._judgement = judgement
        self._evaluations = evaluations
        self._admission = admission
        self._watches = watches

    async def ValidateAdapter(
        self, request: pb.ValidateAdapterRequest, context: Context
    ) -> pb.ValidateAdapterResponse:
        announced = codec.decode_validate(request)
        try:
            with full_disk_is_said():
                facts, content = await self._catalog.validate(
                    _tenant(), request.source_uri, announced
                )
        except AdapterInvalid as error:
            return pb.ValidateAdapterResponse(
                valid=False, findings=error.findings[: codec.MAX_FINDINGS]
            )
        return pb.ValidateAdapterResponse(valid=True, facts=codec.encode_facts(facts, content))

    async def CreateAdapterVersion(
        self, request: pb.CreateAdapterVersionRequest, context: Context
    ) -> pb.CreateAdapterVersionResponse:
        new = codec.decode_create(request, _tenant())
        self._refuse_too_many()
        record = await self._catalog.create(new, request_id=request.request_id, actor=_actor())
        if request.wait:
            record = await self._catalog.settled(record)
        return pb.CreateAdapterVersionResponse(adapter_version=await self._encoded(record))

    async def UploadAdapterVersion(
        self, request_iterator: AsyncIterator[pb.UploadAdapterVersionRequest], context: Context
    ) -> pb.UploadAdapterVersionResponse:
        header = await read_header(request_iterator)
        plan = codec.decode_upload(header)
        new = codec.version_of_upload(plan, _tenant())
        record = await self._registry.version_of_request(_tenant(), new.source_uri)
        if record is None:
            self._refuse_too_many()
            await receive(request_iterator, lambda: self._uploads.open(_tenant(), plan))
        # Again after a complete upload this finds the version that it became.
        record = await self._catalog.create(new, request_id=new.source_uri, actor=_actor())
        if header.wait:
            record = await self._catalog.settled(record)
        return pb.UploadAdapterVersionResponse(adapter_version=await self._encoded(record))

    async def QueryUpload(
        self, request: pb.QueryUploadRequest, context: Context
    ) -> pb.QueryUploadResponse:
        codec.refuse(codec.upload_id_violations(request.upload_id))
        request_id = UPLOAD_SCHEME + request.upload_id
        record = await self._registry.version_of_request(_tenant(), request_id)
        if record is not None:
            return pb.QueryUploadResponse(adapter_version=await self._encoded(record))
        status = await asyncio.to_thread(self._uploads.find, _tenant(), request.upload_id)
        return codec.encode_upload(status)

    async def GetAdapter(
        self, request: pb.GetAdapterRequest, context: Context
    ) -> pb.GetAdapterResponse:
        name = codec.decode_adapter(request.adapter)
        record = await self._registry.adapter(_tenant(), name)
        return pb.GetAdapterResponse(adapter=codec.encode_adapter(record))

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, context: Context
    ) -> pb.ListAdaptersResponse:
        size = codec.decode_page_size(request.page_size)
        after = codec.decode_page_token(request.page_token)
        records = await self._registry.adapters(
            _tenant(), after=after, prefix=request.prefix, limit=size + 1
        )
        return pb.ListAdaptersResponse(
            adapters=[codec.encode_adapter(record) for record in records[:size]],
            next_page_token=records[size - 1].adapter if len(records) > size else "",
        )

    async def GetAdapterVersion(
        self, request: pb.GetAdapterVersionRequest, context: Context
    ) -> pb.GetAdapterVersionResponse:
        key = codec.decode_key(_tenant(), request.adapter, request.version)
        record = await self._registry.version(*key)
        return pb.GetAdapterVersionResponse(adapter_version=await self._encoded(record))

    async def ListAdapterVersions(
        self, request: pb.ListAdapterVersionsRequest, context: Context
    ) -> pb.ListAdapterVersionsResponse:
        name = codec.decode_adapter(request.adapter)
        size = codec.decode_page_size(request.page_size)
        below = codec.decode_number_token(request.page_token)
        adapter = await self._registry.adapter(_tenant(), name)
        records = await self._registry.versions(
            _tenant(), name, below=below, limit=size + 1, deleted=request.show_deleted
        )
        return pb.ListAdapterVersionsResponse(
            adapter_versions=[self._encode(record, adapter) for record in records[:size]],
            next_page_token=str(records[size - 1].version) if len(records) > size else "",
        )

    async def DeleteAdapterVersion(
        self, request: pb.DeleteAdapterVersionRequest, context: Context
    ) -> pb.DeleteAdapterVersionResponse:
        key = codec.decode_key(_tenant(), request.adapter, request.version)
        record = await self._catalog.delete(key, actor=_actor())
        return pb.DeleteAdapterVersionResponse(adapter_version=await self._encoded(record))

    async def SetTraffic(
        self, request: pb.SetTrafficRequest, context: Context
    ) -> pb.SetTrafficResponse:
        arms, guard = codec.decode_traffic(request)
        record = await self._catalog.set_traffic(
            _tenant(), request.adapter, arms, guard=guard, etag=request.etag, actor=_actor()
        )
        return pb.SetTrafficResponse(adapter=codec.encode_adapter(record))

    async def PromoteVersion(
        self, request: pb.PromoteVersionRequest, context: Context
    ) -> pb.PromoteVersionResponse:
        key = codec.decode_key(_tenant(), request.adapter, request.version)
        record = await self._catalog.promote(key, etag=request.etag, actor=_actor())
        return pb.PromoteVersionResponse(adapter=codec.encode_adapter(record))

    async def RollbackAdapter(
        self, request: pb.RollbackAdapterRequest, context: Context
    ) -> pb.RollbackAdapterResponse:
        name = codec.decode_adapter(request.adapter)
        record = await self._ledger.roll_back(_tenant(), name, etag=request.etag, actor=_actor())
        return pb.RollbackAdapterResponse(adapter=codec.encode_adapter(record))

    async def CompareVersions(
        self, request: pb.CompareVersionsRequest, context: Context
    ) -> pb.CompareVersionsResponse:
        return await self._judgement.compare(request, _tenant())

    async def RecordFeedback(
        self, request: pb.RecordFeedbackRequest, context: Context
    ) -> pb.RecordFeedbackResponse:
        return await self._judgement.record_feedback(request, _tenant())

    async def EvaluateVersion(
        self, request: pb.EvaluateVersionRequest, context: Context
    ) -> AsyncIterator[pb.EvaluateVersionResponse]:
        messages = self._evaluations.run(request, _tenant())
        with self._admission.slot():
            async with contextlib.aclosing(messages):
                async for message in messages:
                    yield message

    async def LoadAdapterVersion(
        self, request: pb.LoadAdapterVersionRequest, context: Context
    ) -> pb.LoadAdapterVersionResponse:
        key = codec.decode_key(_tenant(), request.adapter, request.version)
        record = await self._registry.version(*key)
        if record.state is not VersionState.READY:
            raise VersionNotReady(key.adapter, key.version, record.state)
        await self._catalog.load(key)
        return pb.LoadAdapterVersionResponse(adapter_version=await self._version(key))

    async def UnloadAdapterVersion(
        self, request: pb.UnloadAdapterVersionRequest, context: Context
    ) -> pb.UnloadAdapterVersionResponse:
        key = codec.decode_key(_tenant(), request.adapter, request.version)
        await self._registry.version(*key)
        await self._catalog.unload(key)
        return pb.UnloadAdapterVersionResponse(adapter_version=await self._version(key))

    async def WatchAdapters(
        self, request: pb.WatchAdaptersRequest, context: Context
    ) -> AsyncIterator[pb.WatchAdaptersResponse]:
        if request.adapter:
            codec.decode_adapter(request.adapter)
        newest = await self._registry.last_sequence()
        after = request.after_sequence if request.HasField("after_sequence") else newest
        if after > newest:
            raise SequenceUnknown(newest)
        events = self._ledger.watch(
            _tenant(), after=after, adapter=request.adapter, heartbeat_s=HEARTBEAT_S
        )
        with self._watches.slot():
            async with contextlib.aclosing(events):
                async for event in events:
                    if isinstance(event, EventRecord):
                        yield pb.WatchAdaptersResponse(event=codec.encode_event(event))
                    else:
                        yield pb.WatchAdaptersResponse(heartbeat=pb.WatchHeartbeat(sequence=event))

    def _refuse_too_many(self) -> None:
        if self._catalog.running >= MAX_RUNNING:
            raise Overloaded(MAX_RUNNING)

    async def _version(self, key: VersionKey) -> pb.AdapterVersion:
        return await self._encoded(await self._registry.version(*key))

    async def _encoded(self, record: VersionRecord) -> pb.AdapterVersion:
        return self._encode(record, await self._registry.adapter(record.tenant, record.adapter))

    def _encode(self, record: VersionRecord, adapter: AdapterRecord) -> pb.AdapterVersion:
        weights = {arm.version: arm.weight for arm in adapter.arms}
        places = self._catalog.places(VersionKey(record.tenant, record.adapter, record.version))
        return codec.encode_version(record, weights.get(record.version, 0), places)


def _tenant() -> str:
    return current_call().principal.tenant


def _actor() -> str:
    return current_call().principal.actor
