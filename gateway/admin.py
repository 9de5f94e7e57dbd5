"""The Admin service, as the host answers it: decode, call, encode."""

from __future__ import annotations

import logging
from operator import attrgetter

from engine.pool import ServedView
from engine.split import Split
from gateway import admin_codec as codec
from gateway.call import current_call
from gateway.crashes import Crashes
from gateway.drains import Drains
from gateway.messages import Explain
from gateway.processes import Processes
from gateway.quarantine_codec import decode_subject, encode_quarantine
from gateway.shard_survey import ShardSurvey
from gateway.shards import Shards
from gateway.wrap import Context
from lora_gateway.v1 import admin_pb2 as pb
from lora_gateway.v1.admin_pb2_grpc import AdminServicer

logger = logging.getLogger(__name__)

PATIENT_METHODS = frozenset({"DrainShard", "ResumeShard"})
"""They take as long as adapters are loaded and a stream runs."""


_process_id = attrgetter("process_id")


class Admin(AdminServicer):
    """Shards for whoever runs the gateway."""

    def __init__(
        self,
        survey: ShardSurvey,
        drains: Drains,
        shards: Shards,
        processes: Processes,
        view: ServedView,
        crashes: Crashes,
    ) -> None:
        self._survey = survey
        self._drains = drains
        self._shards = shards
        self._processes = processes
        self._view = view
        self._crashes = crashes

    async def ListShards(
        self, request: pb.ListShardsRequest, context: Context
    ) -> pb.ListShardsResponse:
        shards = (await self._survey.all()).values()
        return pb.ListShardsResponse(shards=map(codec.encode_shard, shards))

    async def DrainShard(
        self, request: pb.DrainShardRequest, context: Context
    ) -> pb.DrainShardResponse:
        shard = codec.decode_shard(request.shard)
        self._drains.check(shard)
        logger.warning("%s asks to drain %s", current_call().principal.actor, shard)
        moves = await self._drains.drain(shard)
        if request.wait:
            await self._drains.until_idle(shard)
        return pb.DrainShardResponse(
            shard=codec.encode_shard(await self._survey.one(shard)),
            moved=map(codec.encode_move, moves),
        )

    async def ResumeShard(
        self, request: pb.ResumeShardRequest, context: Context
    ) -> pb.ResumeShardResponse:
        shard = codec.decode_shard(request.shard)
        self._drains.check(shard)
        logger.warning("%s asks to resume %s", current_call().principal.actor, shard)
        await self._drains.resume(shard)
        return pb.ResumeShardResponse(shard=codec.encode_shard(await self._survey.one(shard)))

    async def ExplainRoute(
        self, request: pb.ExplainRouteRequest, context: Context
    ) -> pb.ExplainRouteResponse:
        version, tenant = codec.decode_explain(request), current_call().principal.tenant
        key = self._view.resolve(tenant, request.adapter, version, request.session_id)
        split = Split(()) if key is None else self._view.tenants[tenant][key.adapter].split
        question = Explain(tenant, request.adapter, version, request.session_id)
        told = await self._processes.explain(question)
        shards = await self._survey.all()
        chosen = {"" if route.choice is None else route.choice.shard for route in told}
        return pb.ExplainRouteResponse(
            version=0 if key is None else key.version,
            version_reason=codec.encode_version_reason(key, version, split),
            splits=codec.encode_splits(split),
            shards=[
                codec.encode_route_shard(shards[name], key) for name in self._shards.order(key)
            ],
            workers=[codec.encode_route(route) for route in sorted(told, key=_process_id)],
            shard=chosen.pop() if len(chosen) == 1 else "",
        )

    async def ListQuarantine(
        self, request: pb.ListQuarantineRequest, context: Context
    ) -> pb.ListQuarantineResponse:
        return encode_quarantine(self._crashes.state)

    async def LiftQuarantine(
        self, request: pb.LiftQuarantineRequest, context: Context
    ) -> pb.LiftQuarantineResponse:
        kind, name = decode_subject(request)
        logger.warning("%s lifts a quarantine", current_call().principal.actor)
        left = self._crashes.lift(kind, name)
        if left is not None:
            await self._processes.screen(left)
        return pb.LiftQuarantineResponse(lifted=left is not None)
