"""What `gateway shards` shows of shards, drains and routes.

Names and reasons come from others: no control character of theirs reaches the terminal, and no
bracket is markup.
"""

from __future__ import annotations

from collections.abc import Iterable

import typer

from gateway.terminal import as_json
from gateway.terminal_table import print_rows, print_table, printable, table, time_text
from lora_gateway import (
    DrainPhase,
    DrainShardResponse,
    ExplainRouteResponse,
    RouteReason,
    RouteShard,
    Shard,
    ShardState,
    VersionReason,
    WorkerRoute,
)


def print_shards(shards: Iterable[Shard]) -> None:
    """A table, one shard a row."""
    shown = table(
        *("shard", "state", "since", "in flight", "running", "waiting", "kv cache", "resident"),
        *("slots", "restarts", "last death"),
    )
    for shard in shards:
        known = shard.HasField("load")
        shown.add_row(
            shard.shard,
            _state(shard),
            time_text(shard.state_time),
            str(shard.in_flight),
            str(shard.load.running) if known else "?",
            str(shard.load.waiting) if known else "?",
            f"{shard.load.kv_cache_usage:.0%}" if known else "?",
            f"{len(shard.residents)} of {shard.places}",
            str(shard.client_slots_left),
            str(shard.restarts),
            _last_death(shard) or "none",
        )
    print_table(shown)


def print_shard(shard: Shard, json: bool) -> None:
    """The shard, as a table of fields or as JSON."""
    if json:
        typer.echo(as_json(shard))
        return
    print_rows(
        ("shard", shard.shard),
        ("state", _state(shard)),
        ("in_flight", str(shard.in_flight)),
        ("resident", f"{len(shard.residents)} of {shard.places}"),
        ("last_death", _last_death(shard)),
    )


def print_drained(answer: DrainShardResponse, json: bool) -> None:
    """What was loaded elsewhere, one version a row, and the shard."""
    if json:
        typer.echo(as_json(answer))
        return
    if answer.moved:
        shown = table("moved", "to", "took", "error")
        for moved in answer.moved:
            shown.add_row(
                f"{moved.adapter}@{moved.version}",
                moved.shard,
                f"{moved.duration_ms:.0f} ms",
                printable(moved.error) or "none",
            )
        print_table(shown)
    print_shard(answer.shard, False)


def print_route(answer: ExplainRouteResponse, json: bool) -> None:
    """The version, the shards in their order, and what each worker chose."""
    if json:
        typer.echo(as_json(answer))
        return
    splits = ", ".join(f"{split.version}: {split.weight}" for split in answer.splits)
    print_rows(
        ("version", str(answer.version) if answer.version else "the base model"),
        ("why", _name(VersionReason.Name(answer.version_reason), "VERSION_REASON_")),
        ("splits", splits),
        ("shard", answer.shard or "the workers differ, or none is open"),
    )
    shards = table("order", "state", "resident", "adapters in use", "slot", "places left")
    for shard in answer.shards:
        shards.add_row(
            shard.shard,
            _route_state(shard),
            "yes" if shard.resident else "no",
            str(shard.adapters_in_use),
            "free" if shard.slot_free else "taken",
            str(shard.places_left),
        )
    print_table(shards)
    workers = table("worker", "version", "shard", "why", "in flight", "cap", "replicas", "plan")
    for worker in answer.workers:
        workers.add_row(
            str(worker.worker),
            str(worker.version),
            worker.shard or "none",
            _name(RouteReason.Name(worker.reason), "ROUTE_REASON_"),
            _loads(worker),
            str(worker.cap),
            str(worker.replicas),
            str(worker.plan_revision),
        )
    print_table(workers)


def _state(shard: Shard) -> str:
    state = ShardState.Name(shard.state).removeprefix("SHARD_STATE_")
    if shard.HasField("next_start_time"):
        state += f", next try {time_text(shard.next_start_time)}"
    if not shard.HasField("drain"):
        return state
    why = " to be renewed" if shard.drain.by_renewal else ""
    why += " to be lent" if shard.drain.by_lending else ""
    if shard.drain.phase == DrainPhase.DRAIN_PHASE_MOVING:
        done = f"{shard.drain.versions_moved} of {shard.drain.versions_to_move}"
        return f"{state}, draining{why}: {done} moved"
    return state if shard.state == ShardState.SHARD_STATE_LENT else f"{state}, drained{why}"


def _route_state(shard: RouteShard) -> str:
    state = ShardState.Name(shard.state).removeprefix("SHARD_STATE_")
    return f"{state}, drained" if shard.drained else state


def _last_death(shard: Shard) -> str:
    if not shard.HasField("last_death"):
        return ""
    return f"{printable(shard.last_death.reason)}, {time_text(shard.last_death.time)}"


def _loads(worker: WorkerRoute) -> str:
    return ", ".join(f"{c.shard}: {c.in_flight}" for c in worker.candidates)


def _name(value: str, prefix: str) -> str:
    return value.removeprefix(prefix).lower().replace("_", " ")
