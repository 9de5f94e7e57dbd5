"""Shards, drains and routes, as whoever runs the gateway sees them. Pure."""

from __future__ import annotations

import time

from google.protobuf.timestamp_pb2 import Timestamp

from engine.errors import Violation
from engine.generation import Load, VersionKey
from engine.ring import Reason
from engine.split import Split
from gateway.adapter_codec import encode_time, name_violations, refuse
from gateway.drains import Drain, Move, Wish
from gateway.explanation import Explanation
from gateway.keeper import Death
from gateway.keeper_state import KeeperState
from gateway.shard_survey import Surveyed
from lora_gateway.v1 import admin_pb2 as pb
from lora_gateway.v1.adapters_pb2 import TrafficSplit

_STATES = {state: pb.ShardState.Value(f"SHARD_STATE_{state.name}") for state in KeeperState}
_REASONS = {reason: pb.RouteReason.Value(f"ROUTE_REASON_{reason.name}") for reason in Reason}


def decode_shard(shard: str) -> str:
    """The name of a shard, known or not. Raises InvalidRequest."""
    if not shard:
        refuse([Violation("shard", "is required, for example shard-0; ListShards lists them")])
    return shard


def decode_explain(request: pb.ExplainRouteRequest) -> int | None:
    """The version that is asked for. Raises InvalidRequest."""
    wrong = list(name_violations(request.adapter)) if request.adapter else []
    version = request.version if request.HasField("version") else None
    if version is not None and not request.adapter:
        wrong.append(Violation("version", "belongs to an adapter"))
    if version == 0:
        wrong.append(Violation("version", "must be at least 1"))
    refuse(wrong)
    return version


def encode_shard(shard: Surveyed) -> pb.Shard:
    """All that is known of one shard."""
    kept = shard.kept
    return pb.Shard(
        shard=kept.name,
        state=_STATES[kept.state],
        state_time=_time(kept.since_s),
        drain=None if shard.drain is None else _drain(shard.drain),
        last_death=None if kept.last_death is None else _death(kept.last_death),
        restarts=kept.restarts,
        next_start_time=None if kept.next_start_s is None else _time(kept.next_start_s),
        in_flight=shard.in_flight,
        load=None if shard.load is None else _load(shard.load),
        client_slots_left=kept.slots_left,
        places=shard.capacity,
        residents=[_resident(shard, key) for key in sorted(shard.places)],
    )


def encode_move(move: Move) -> pb.MovedVersion:
    """A version that was loaded elsewhere."""
    tenant, adapter, version = move.key
    return pb.MovedVersion(
        tenant=tenant,
        adapter=adapter,
        version=version,
        shard=move.shard,
        duration_ms=move.duration_s * 1000,
        error=move.error,
    )


def encode_version_reason(
    key: VersionKey | None, version: int | None, split: Split
) -> pb.VersionReason.ValueType:
    """Why `key` answers where `version` was asked for, and what the split has."""
    if key is None:
        return pb.VERSION_REASON_BASE_MODEL
    if version is not None:
        return pb.VERSION_REASON_ASKED_FOR
    return pb.VERSION_REASON_ONLY_ONE if len(split.arms) == 1 else pb.VERSION_REASON_SPLIT


def encode_splits(split: Split) -> list[TrafficSplit]:
    """The arms."""
    return [TrafficSplit(version=arm.version, weight=arm.weight) for arm in split.arms]


def encode_route_shard(shard: Surveyed, key: VersionKey | None) -> pb.RouteShard:
    """A shard as one request sees it."""
    up = shard.kept.state is KeeperState.UP
    return pb.RouteShard(
        shard=shard.kept.name,
        state=_STATES[shard.kept.state],
        drained=shard.drain is not None and shard.drain.moved,
        resident=up if key is None else key in shard.places,
        adapters_in_use=len(shard.in_use),
        slot_free=shard.has_slot_for(key),
        places_left=shard.places_left,
    )


def encode_route(told: Explanation) -> pb.WorkerRoute:
    """Where one worker would send a request."""
    choice = told.choice
    if choice is None:
        return pb.WorkerRoute(
            worker=told.process_id,
            version=told.version,
            reason=pb.ROUTE_REASON_NO_SHARD_OPEN,
            plan_revision=told.plan_revision,
        )
    return pb.WorkerRoute(
        worker=told.process_id,
        version=told.version,
        shard=choice.shard,
        reason=_REASONS[choice.reason],
        candidates=[
            pb.RouteCandidate(shard=name, in_flight=count)
            for name, count in zip(choice.candidates, choice.loads, strict=True)
        ],
        replicas=choice.replicas,
        cap=choice.cap,
        plan_revision=told.plan_revision,
    )


def _drain(drain: Drain) -> pb.ShardDrain:
    return pb.ShardDrain(
        phase=pb.DRAIN_PHASE_DRAINED if drain.moved else pb.DRAIN_PHASE_MOVING,
        begin_time=_time(drain.begin_s),
        by_renewal=Wish.RENEWAL in drain.wishes,
        by_lending=Wish.LENDING in drain.wishes,
        versions_to_move=drain.to_move,
        versions_moved=drain.done,
    )


def _death(death: Death) -> pb.ShardDeath:
    return pb.ShardDeath(reason=death.reason, time=_time(death.time_s))


def _load(load: Load) -> pb.ShardLoad:
    return pb.ShardLoad(
        running=load.running,
        waiting=load.waiting,
        deferred=load.deferred,
        kv_cache_usage=load.kv_cache_usage,
    )


def _resident(shard: Surveyed, key: VersionKey) -> pb.ResidentVersion:
    use = shard.use(key)
    idle_s = time.monotonic() - use.last_use_s
    return pb.ResidentVersion(
        tenant=key.tenant,
        adapter=key.adapter,
        version=key.version,
        load_time=_time(shard.places[key].load_time_s),
        requests=use.holds,
        last_use_time=_time(time.time() - idle_s) if use.last_use_s else None,
    )


def _time(time_s: float) -> Timestamp:
    return encode_time(int(time_s * 1e9))
