"""Metrics of several processes on one page.

prometheus_client decides at its import whether processes share a folder, so what is measured
runs in processes of its own: each calls one of the functions below.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.adapter_loader import LoadPhase
from engine.errors import LoadFault
from gateway import metrics
from gateway.admission import Shed
from gateway.call import BASE_MODEL_LABEL, UNRESOLVED_LABEL, Call
from gateway.http_endpoint import HttpEndpoint
from gateway.status import Phase, Status
from gateway.status_feed import StatusFeed

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60.0
START_S = 1000.0
"""When the calls below arrive, on a monotonic clock of theirs."""

Series = dict[str, float]
"""Values by name and labels, as the page writes them."""


# --- what runs in processes of its own ---------------------------------------


def call(
    method: str, adapter: str | None = None, *, first_token_s: float | None = None, **counts: int
) -> Call:
    made = Call(method, task=None, started_s=START_S, adapter=adapter)
    if first_token_s is not None:
        made.first_token_s = START_S + first_token_s
    made.adapter_label = adapter or UNRESOLVED_LABEL
    for kind, count in counts.items():
        setattr(made, f"{kind}_tokens", count)
    return made


def work() -> None:
    """A worker that ends with two calls running."""
    metrics.inflight.inc(2)
    metrics.stalled_streams.set(1)
    metrics.loop_lag.set(float(os.environ["LAG_S"]))
    alpha = call("Generate", "alpha", first_token_s=0.25, prompt=10, cached=4, completion=6)
    alpha.scheduled_s = START_S + 0.04
    metrics.record(alpha, "OK", START_S + 2.0)
    failed = call("GenerateStream", "alpha", first_token_s=0.25, prompt=10, completion=1)
    for gap_s in (0.02, 0.02, 0.04):
        metrics.observe_itl(failed, gap_s)
    metrics.record(failed, "UNAVAILABLE", START_S + 3.0)
    metrics.record(call("Generate", BASE_MODEL_LABEL), "CANCELLED", START_S + 1.0)
    metrics.record(call("Generate"), "NOT_FOUND", START_S + 0.001)
    metrics.record(call("GetModel"), "OK", START_S + 0.001)
    metrics.shard_inflight_of("shard-0").inc(3)
    metrics.observe_shed(Shed.OVERLOADED)
    print(os.getpid())


def show() -> None:
    """A host: the page, before and after it forgets the workers of its arguments."""
    asyncio.run(_show())


async def _show() -> None:
    metrics.workers.labels("serving").set(2)
    for shard in ("shard-0", "shard-1"):
        metrics.know_shard(shard)
        metrics.shard_up.labels(shard).set(1)
    metrics.observe_load_failure(LoadFault.FILES)
    metrics.observe_resident("shard-0", 3)
    metrics.observe_load("shard-0", LoadPhase.READ, 0.2, True)
    metrics.observe_load("shard-0", LoadPhase.ALL, 0.3, False)
    for priority, wait_s in ((-10, 5.0), (0, 90.0), (1, 0.5), (10, 1.5)):
        metrics.observe_training_wait(priority, wait_s)
    endpoint = endpoint_at("127.0.0.1:0")
    await endpoint.start()
    pages = [await page(endpoint)]
    for pid in sys.argv[1:]:
        endpoint.forget_process(int(pid))
        pages.append(await page(endpoint))
    try:
        endpoint_at(endpoint.address)
    except OSError as error:
        pages.append(f"taken: {error.strerror}")
    address = endpoint.address
    await endpoint.close()
    try:
        await page_at(address)
    except urllib.error.URLError as error:
        pages.append(f"closed: {error.reason}")
    print(json.dumps(pages))


def endpoint_at(address: str) -> HttpEndpoint:
    async def nobody_looks() -> Status:
        raise AssertionError

    return HttpEndpoint(address, StatusFeed(nobody_looks), lambda: Phase.SERVING)


async def page(endpoint: HttpEndpoint) -> str:
    return await page_at(endpoint.address)


async def page_at(address: str) -> str:
    def read() -> str:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
            return str(response.read().decode())

    return await asyncio.to_thread(read)


# --- what looks at them ------------------------------------------------------


def run(function: str, folder: Path, *arguments: str, lag_s: float = 0.0) -> str:
    """Call a function of this module in a process that shares `folder`."""
    done = subprocess.run(
        [
            *(sys.executable, "-c", f"from {__name__} import {function}; {function}()"),
            *arguments,
        ],
        env={
            **os.environ,
            "PROMETHEUS_MULTIPROC_DIR": str(folder),
            "PYTHONPATH": f"{ROOT}:{ROOT / 'clients' / 'python'}",
            "LAG_S": str(lag_s),
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def series_of(text: str) -> Series:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={sample.labels[name]}" for name in sorted(sample.labels))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Of two workers that ended: the page with both, with one, with none, and two errors."""
    folder = tmp_path_factory.mktemp("metrics")
    pids = [run("work", folder, lag_s=lag_s).strip() for lag_s in (0.5, 0.25)]
    shown: list[str] = json.loads(run("show", folder, *pids))
    return [*map(series_of, shown[:3]), *shown[3:]]


def test_pitfalls_calls_of_all_workers_are_counted_by_method_adapter_and_code(
    pages: list[Series],
) -> None:
    counted = {
        name: value
        for name, value in pages[0].items()
        if name.startswith("llm_adapter_requests_total")
    }
    assert counted == {
        "llm_adapter_requests_total{adapter=alpha,code=OK,method=Generate}": 2,
        "llm_adapter_requests_total{adapter=alpha,code=UNAVAILABLE,method=GenerateStream}": 2,
        "llm_adapter_requests_total{adapter=(base),code=CANCELLED,method=Generate}": 2,
        "llm_adapter_requests_total{adapter=(none),code=NOT_FOUND,method=Generate}": 2,
        "llm_adapter_requests_total{adapter=(none),code=OK,method=GetModel}": 2,
    }


def test_tokens_are_counted_for_calls_that_had_one(pages: list[Series]) -> None:
    counted = {
        name: value
        for name, value in pages[0].items()
        if name.startswith("llm_adapter_tokens_total")
    }
    assert counted == {
        "llm_adapter_tokens_total{adapter=alpha,kind=prompt}": 40,
        "llm_adapter_tokens_total{adapter=alpha,kind=completion}": 14,
        "llm_adapter_tokens_total{adapter=alpha,kind=cached}": 8,
    }


@pytest.mark.parametrize(
    ("stage", "count", "total_s"),
    [("ttft", 4, 4 * 0.25), ("e2e", 2, 2 * 2.0), ("itl", 6, 2 * 0.08)],
)
def test_pitfalls_latencies_are_measured_by_adapter_and_stage(
    stage: str, count: int, total_s: float, pages: list[Series]
) -> None:
    """e2e of calls that ended well alone."""
    labels = f"{{adapter=alpha,stage={stage}}}"
    assert pages[0][f"llm_adapter_latency_seconds_count{labels}"] == count
    assert pages[0][f"llm_adapter_latency_seconds_sum{labels}"] == pytest.approx(total_s)


def test_buckets_tell_what_the_alerts_ask(pages: list[Series]) -> None:
    """Inter-token latencies below 0.03 s and 0.05 s."""

    def below(edge: str) -> float:
        labels = f"{{adapter=alpha,le={edge},stage=itl}}"
        return pages[0][f"llm_adapter_latency_seconds_bucket{labels}"]

    assert [below("0.01"), below("0.03"), below("0.05"), below("+Inf")] == [0, 4, 6, 6]


def test_gauges_are_added_up_or_the_worst_is_shown(pages: list[Series]) -> None:
    assert pages[0]["gateway_inflight_calls{}"] == 4
    assert pages[0]["gateway_stalled_streams{}"] == 2
    assert pages[0]["gateway_event_loop_lag_seconds{}"] == 0.5


def test_the_wait_for_an_engine_is_counted_where_one_was_told(pages: list[Series]) -> None:
    def below(edge: str) -> float:
        return pages[0][f"gateway_queue_wait_seconds_bucket{{le={edge}}}"]

    assert [below("0.03"), below("0.05"), below("+Inf")] == [0, 2, 2]
    assert pages[0]["gateway_queue_wait_seconds_sum{}"] == pytest.approx(2 * 0.04)


def test_requests_in_flight_are_added_up_by_shard_and_weighed(pages: list[Series]) -> None:
    assert pages[0]["gateway_inflight{shard=shard-0}"] == 6
    assert pages[0]["gateway_inflight{shard=shard-1}"] == 0
    assert pages[0]["gateway_hash_imbalance_ratio{}"] == 2.0
    assert pages[2]["gateway_hash_imbalance_ratio{}"] == 1.0, "the workers are forgotten"


def test_what_alerts_watch_for_growth_begins_at_nothing(pages: list[Series]) -> None:
    begun = {
        "gateway_shed_total": ("reason", {"overloaded": 2, "draining": 0}),
        "adapter_load_failures_total": (
            "reason",
            {"engine": 0, "files": 1, "state": 0, "shard": 0, "other": 0},
        ),
        "gateway_series_dropped_total": ("reason", {"rank": 0, "spent": 0}),
        "lora_gateway_gate_rejections_total": (
            "reason",
            dict.fromkeys(("logprob_delta", "eval_loss", "effect", "shape", "other"), 0),
        ),
    }
    for name, (label, values) in begun.items():
        shown = {key: value for key, value in pages[0].items() if key.startswith(f"{name}{{")}
        assert shown == {f"{name}{{{label}={key}}}": value for key, value in values.items()}
    for reason in ("planned", "failover", "overflow", "least_loaded"):
        assert pages[0][f"gateway_placements_total{{reason={reason},shard=shard-1}}"] == 0


def test_a_process_that_is_forgotten_loses_its_gauges_and_keeps_its_counters(
    pages: list[Series],
) -> None:
    both, one, none = pages[:3]
    assert one["gateway_inflight_calls{}"] == 2
    assert one["gateway_event_loop_lag_seconds{}"] == 0.25
    assert none["gateway_inflight_calls{}"] == 0, "of the host itself, which is there"
    assert none["gateway_event_loop_lag_seconds{}"] == 0
    counters = {name: value for name, value in both.items() if "_total{" in name}
    assert counters
    assert one.items() >= counters.items()
    assert none.items() >= counters.items()


def test_what_the_host_knows_stays(pages: list[Series]) -> None:
    for shown in pages[:3]:
        assert shown["gateway_workers{state=serving}"] == 2
        assert shown["adapters_resident{shard=shard-0}"] == 3
        for priority, count, wait_s in (("low", 1, 5.0), ("normal", 1, 90.0), ("high", 2, 2.0)):
            labels = f"{{priority={priority}}}"
            assert shown[f"training_queue_wait_seconds_count{labels}"] == count
            assert shown[f"training_queue_wait_seconds_sum{labels}"] == wait_s
        for phase, result, seconds in (("read", "ok", 0.2), ("all", "failed", 0.3)):
            labels = f"{{phase={phase},result={result},shard=shard-0}}"
            assert shown[f"adapter_load_seconds_count{labels}"] == 1
            assert shown[f"adapter_load_seconds_sum{labels}"] == pytest.approx(seconds)


def test_a_taken_address_is_an_error_and_closing_ends_the_page(pages: list[str]) -> None:
    assert pages[3] == "taken: Address already in use"
    assert pages[4].startswith("closed: ")
