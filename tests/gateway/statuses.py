"""A status for tests, but for what they change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gateway.status import (
    AdapterStatus,
    ArmStatus,
    EventStatus,
    JobStatus,
    Phase,
    ResidentStatus,
    ShardStatus,
    Status,
    TurnStatus,
)

NOW_S = 1_800_000_000.0

SHARD = ShardStatus(
    name="shard-0",
    state="up",
    since_s=NOW_S - 100,
    reason="",
    restarts=0,
    answers=True,
    running=3,
    waiting=1,
    deferred=0,
    kv_cache_usage=0.25,
    slots_left=61,
    batch_slots=8,
    turns=(TurnStatus("sql", 1, "held", NOW_S - 30),),
    turns_held=1,
    turns_waiting=0,
    places=64,
    resident_count=1,
    residents=(ResidentStatus("sql", 1, NOW_S - 90, 0.2, 2, NOW_S - 1),),
)
ADAPTER = AdapterStatus(
    name="sql",
    ready=2,
    shards=("shard-0",),
    tokens_per_s=100.0,
    arms=(ArmStatus(1, 0.9, "", 60, 1.0, 40.0, 0.0, 80.0, 120.0),),
)
JOB = JobStatus(
    name="sql-1",
    adapter="sql",
    state="running",
    is_final=False,
    priority=0,
    queue_position=0,
    device="cpu",
    time_s=NOW_S - 50,
    step=2,
    total_steps=10,
    epoch=0.2,
    loss=2.5,
    eval_loss=None,
    tokens_per_s=800.0,
    eta_s=8.0,
    publication="",
    message="",
    curve=((1, 3.0), (2, 2.5)),
    eval_curve=(),
)
EVENT = EventStatus(NOW_S - 5, "sql@1", "is ready", False)


def status(**fields: Any) -> Status:
    """A gateway that serves."""
    serving = Status(
        phase=Phase.SERVING,
        model="tiny",
        version="0.1.0",
        start_time_s=NOW_S - 3600,
        workers_wanted=2,
        workers={"serving": 2},
        tokens_per_s=(0.0, 12.5),
        interval_s=2.0,
        shards=(SHARD,),
        adapters=(ADAPTER,),
        adapter_count=1,
        jobs=(JOB,),
        active_job_count=1,
        events=(EVENT,),
    )
    return replace(serving, **fields)
