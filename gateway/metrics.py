"""The gateway's own metrics, summed over its processes.

prometheus_client's multiprocess mode: each process writes to files of a folder that
`prepare_environment` named, and the host's endpoint adds them up. A series is for ever, so each
label has few values: enums, names of shards, and of adapters those that the host has named
(`gateway/adapter_labels.py`). What an alert watches for growth begins at 0.
"""

from __future__ import annotations

import functools

from prometheus_client import Counter, Gauge, Histogram

from engine import gate, ring
from engine.adapter_loader import LoadPhase
from engine.batched_histogram import BatchedHistogram
from engine.core import LATENCY_BUCKETS_S
from engine.errors import LoadFault
from engine.pool import Route
from gateway.adapter_labels import Dropped
from gateway.admission import Shed
from gateway.call import Call

ITL_BATCH = 64
"""As many inter-token latencies of a stream are counted at once."""

_requests = Counter(
    "llm_adapter_requests",
    "Calls that ended, by method, adapter and status code.",
    ["method", "adapter", "code"],
)
_latency = BatchedHistogram(
    "llm_adapter_latency_seconds",
    "ttft: arrival to first token. itl: between deltas of a stream. e2e: arrival to end, OK only.",
    ["adapter", "stage"],
    buckets=LATENCY_BUCKETS_S,
)
_tokens = Counter(
    "llm_adapter_tokens",
    "Tokens of ended calls: prompt, completion, cached (part of prompt).",
    ["adapter", "kind"],
)
_queue_wait = Histogram(
    "gateway_queue_wait_seconds",
    "From the arrival of a call until an engine first scheduled it: rendering, loads of adapters "
    "and the engine's queue. Of calls that had a token.",
    buckets=LATENCY_BUCKETS_S,
)
_series_dropped = Counter(
    "gateway_series_dropped",
    "Adapters whose calls began to be counted under (other): rank, others have more traffic; "
    "spent, all names that one gateway gives are given.",
    ["reason"],
)
_shed = Counter(
    "gateway_shed",
    "Calls that were not admitted: overloaded, draining.",
    ["reason"],
)
inflight = Gauge("gateway_inflight_calls", "Calls that run now.", multiprocess_mode="livesum")
stalled_streams = Gauge(
    "gateway_stalled_streams",
    "Streams whose write has waited over a second for the client to read.",
    multiprocess_mode="livesum",
)
loop_lag = Gauge(
    "gateway_event_loop_lag_seconds",
    "How late the event loop woke a timer, worst of the last second.",
    multiprocess_mode="livemax",
)
workers = Gauge(
    "gateway_workers", "Worker processes by state.", ["state"], multiprocess_mode="livemax"
)
worker_deaths = Counter("gateway_worker_deaths", "Workers that ended unasked.")
worker_stalls = Counter(
    "gateway_worker_stalls", "Workers of these that were killed because they did not answer."
)
client_slots_left = Gauge(
    "gateway_client_slots_left",
    "Fresh client slots of an engine core; each new worker takes one.",
    ["shard"],
    multiprocess_mode="livemax",
)
_placements = Counter(
    "gateway_placements",
    "Requests by shard, and why they went there: planned, failover, overflow, least_loaded.",
    ["shard", "reason"],
)
retries = Counter(
    "gateway_retries",
    "Requests that were sent to a second shard, because the first died before a token came.",
)
retry_budget_used = Gauge(
    "gateway_retry_budget_used",
    "Share of the second tries that a worker may have at once, of the worker that has most.",
    multiprocess_mode="livemax",
)
_shard_inflight = Gauge(
    "gateway_inflight",
    "Requests that are placed on a shard and not done, those that wait for it included.",
    ["shard"],
    multiprocess_mode="livesum",
)
shard_up = Gauge(
    "gateway_shard_up",
    "Whether a shard has a core that answers, drained or not: 1 or 0.",
    ["shard"],
    multiprocess_mode="livemax",
)
shard_drained = Gauge(
    "gateway_shard_drained",
    "Whether a shard was taken out of the route: 1 or 0.",
    ["shard"],
    multiprocess_mode="livemax",
)
shard_lent = Gauge(
    "gateway_shard_lent",
    "Whether a shard is out of the route to lend its device to training: 1 or 0.",
    ["shard"],
    multiprocess_mode="livemax",
)
shard_lent_duration = Histogram(
    "gateway_shard_lent_seconds",
    "From a shard leaving the route to lend its device to training, until it takes requests again.",
    ["shard"],
    buckets=(10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0, 14400.0, 28800.0),
)
shard_restarts = Counter(
    "gateway_shard_restarts",
    "Starts of a core in place of one that died or stalled, that failed to start, or that had few "
    "client slots left (renewed).",
    ["shard", "cause"],
)
crash_suspects = Counter(
    "gateway_crash_suspects",
    "Requests that an engine was computing when it crashed.",
    ["shard"],
)
engine_recovery = Histogram(
    "gateway_engine_recovery_seconds",
    "From a core's death until its shard takes requests again.",
    ["shard"],
    buckets=(1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0),
)
_adapter_load = Histogram(
    "adapter_load_seconds",
    "Loads of adapter versions into an engine, by result: ok, failed; and by phase: queue, "
    "prepare, read, commit; all is read and commit, also of those that failed.",
    ["shard", "phase", "result"],
    buckets=LATENCY_BUCKETS_S,
)
_load_failures = Counter(
    "adapter_load_failures",
    "Adapter versions that could not be loaded: engine, it refused them; files, they are damaged; "
    "state, they are READY no more; shard, it died; other.",
    ["reason"],
)
_slot_wait = Histogram(
    "gateway_slot_wait_seconds",
    "How long requests waited for their adapter version's turn, of those that had to wait.",
    ["shard"],
    buckets=LATENCY_BUCKETS_S,
)
_slot_waiting = Gauge(
    "gateway_slot_waiting",
    "Adapter versions whose requests wait for their turn among --max-loras.",
    ["shard"],
    multiprocess_mode="livemax",
)
_adapters_resident = Gauge(
    "adapters_resident",
    "Adapter versions that an engine has loaded.",
    ["shard"],
    multiprocess_mode="livemax",
)

_gate_rejections = Counter(
    "lora_gateway_gate_rejections",
    "Trained adapters that were not published, by reason: logprob_delta, eval_loss, effect, "
    "shape, other. One may have several.",
    ["reason"],
)
_training_wait = Histogram(
    "training_queue_wait_seconds",
    "How long training jobs were queued until they had a device, by priority: low is below 0, "
    "normal 0, high above.",
    ["priority"],
    buckets=(1.0, 10.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 14400.0, 43200.0, 86400.0),
)
registry_commit = Histogram(
    "registry_commit_seconds",
    "Transactions of the registry and the jobs, until they are durable.",
    buckets=LATENCY_BUCKETS_S,
)

for _priority in ("low", "normal", "high"):
    _training_wait.labels(_priority)
for _counter, _reasons in (
    (_series_dropped, Dropped),
    (_shed, Shed),
    (_load_failures, LoadFault),
    (_gate_rejections, gate.Reason),
):
    for _reason in _reasons:
        _counter.labels(_reason.value)


def observe_training_wait(priority: int, wait_s: float) -> None:
    """Note how long one training job was queued."""
    label = "normal" if priority == 0 else "high" if priority > 0 else "low"
    _training_wait.labels(label).observe(wait_s)


def know_shard(shard: str) -> None:
    """Begin the series of a shard at 0."""
    shard_inflight_of(shard)
    _slot_wait.labels(shard)
    engine_recovery.labels(shard)
    shard_lent_duration.labels(shard)
    for reason in ring.Reason:
        _placements.labels(shard, reason.value)


def observe_placement(route: Route) -> None:
    """Count one request that was placed."""
    _placements_of(route.shard.name, route.reason.value).inc()


def observe_load(shard: str, phase: LoadPhase, duration_s: float, ok: bool) -> None:
    """Note one phase of a load of an adapter version."""
    _adapter_load.labels(shard, phase.value, "ok" if ok else "failed").observe(duration_s)


def observe_load_failure(fault: LoadFault) -> None:
    """Count one adapter version that could not be loaded."""
    _load_failures.labels(fault.value).inc()


def observe_dropped(reason: Dropped) -> None:
    """Count one adapter that is called and has no series of its own."""
    _series_dropped.labels(reason.value).inc()


def observe_shed(reason: Shed) -> None:
    """Count one call that was not admitted."""
    _shed.labels(reason.value).inc()


def observe_resident(shard: str, count: int) -> None:
    """Note how many adapter versions an engine has loaded."""
    _adapters_resident.labels(shard).set(count)


def observe_slot_wait(shard: str, wait_s: float) -> None:
    """Note how long one request waited for its version's slot."""
    _slot_wait.labels(shard).observe(wait_s)


def observe_slot_waiting(shard: str, count: int) -> None:
    """Note how many adapter versions wait for a slot."""
    _slot_waiting.labels(shard).set(count)


def observe_gate_rejection(reason: gate.Reason) -> None:
    """Count one trained adapter that was not published."""
    _gate_rejections.labels(reason.value).inc()


# `labels` of prometheus_client takes 2 us, eight times a call. These keep what it returns: as many
# as there are series.


@functools.cache
def _requests_of(method: str, adapter: str, code: str) -> Counter:
    return _requests.labels(method, adapter, code)


@functools.cache
def _latency_of(adapter: str, stage: str) -> BatchedHistogram:
    return _latency.labels(adapter, stage)


@functools.cache
def _tokens_of(adapter: str, kind: str) -> Counter:
    return _tokens.labels(adapter, kind)


@functools.cache
def _placements_of(shard: str, reason: str) -> Counter:
    return _placements.labels(shard, reason)


@functools.cache
def shard_inflight_of(shard: str) -> Gauge:
    """Requests that are placed on a shard."""
    return _shard_inflight.labels(shard)


def observe_itl(call: Call, gap_s: float) -> None:
    """Note the time between two deltas of a stream. Counted in batches, the last by `record`."""
    call.itl_s.append(gap_s)
    if len(call.itl_s) >= ITL_BATCH:
        _count_itl(call)


def _count_itl(call: Call) -> None:
    _latency_of(call.adapter_label, "itl").observe_all(call.itl_s)
    call.itl_s.clear()


def record(call: Call, code: str, end_s: float) -> None:
    """Count one call that ended at `end_s` on the monotonic clock."""
    adapter = call.adapter_label
    _requests_of(call.method, adapter, code).inc()
    if call.first_token_s is not None:
        _latency_of(adapter, "ttft").observe(call.first_token_s - call.started_s)
        if call.itl_s:
            _count_itl(call)
        _tokens_of(adapter, "prompt").inc(call.prompt_tokens)
        _tokens_of(adapter, "completion").inc(call.completion_tokens)
        _tokens_of(adapter, "cached").inc(call.cached_tokens)
        if call.scheduled_s:
            _queue_wait.observe(max(0.0, call.scheduled_s - call.started_s))
    if code == "OK":
        _latency_of(adapter, "e2e").observe(end_s - call.started_s)
