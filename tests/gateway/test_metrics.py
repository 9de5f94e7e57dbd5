"""Metrics of several processes on one page.

prometheus_client decides at its import whether processes share a folder, so what is measured
runs in processes of its own: each calls one of the functions below.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from gateway import metrics
from gateway.call import BASE_MODEL_LABEL, Call
from gateway.metrics import UNRESOLVED_LABEL, MetricsEndpoint
from lora_gateway.v1 import inference_pb2 as pb
from tests.gateway.conftest import FakeGateway

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
    for kind, count in counts.items():
        setattr(made, f"{kind}_tokens", count)
    return made


def work() -> None:
    """A worker that ends with two calls running."""
    metrics.inflight.inc(2)
    metrics.stalled_streams.set(1)
    metrics.loop_lag.set(float(os.environ["LAG_S"]))
    alpha = call("Generate", "alpha", first_token_s=0.25, prompt=10, cached=4, completion=6)
    metrics.record(alpha, "OK", START_S + 2.0)
    failed = call("GenerateStream", "alpha", first_token_s=0.25, prompt=10, completion=1)
    metrics.record(failed, "UNAVAILABLE", START_S + 3.0)
    metrics.record(call("Generate", BASE_MODEL_LABEL), "CANCELLED", START_S + 1.0)
    metrics.record(call("Generate"), "NOT_FOUND", START_S + 0.001)
    metrics.record(call("GetModel"), "OK", START_S + 0.001)
    observe = metrics.itl_observer("alpha")
    for gap_s in (0.02, 0.02, 0.04):
        observe(gap_s)
    print(os.getpid())


def show() -> None:
    """A host: the page, before and after it forgets the workers of its arguments."""
    metrics.workers.labels("serving").set(2)
    metrics.observe_resident("shard-0", 3)
    metrics.observe_load("shard-0", 0.2, True)
    metrics.observe_load("shard-0", 0.3, False)
    endpoint = MetricsEndpoint("127.0.0.1:0")
    pages = [page(endpoint)]
    for pid in sys.argv[1:]:
        endpoint.forget_process(int(pid))
        pages.append(page(endpoint))
    try:
        MetricsEndpoint(endpoint.address)
    except OSError as error:
        pages.append(f"taken: {error.strerror}")
    endpoint.close()
    try:
        page(endpoint)
    except urllib.error.URLError as error:
        pages.append(f"closed: {error.reason}")
    print(json.dumps(pages))


def page(endpoint: MetricsEndpoint) -> str:
    with urllib.request.urlopen(f"http://{endpoint.address}/metrics", timeout=10) as response:
        text: str = response.read().decode()
    return text


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
        for result, seconds in (("ok", 0.2), ("failed", 0.3)):
            labels = f"{{result={result},shard=shard-0}}"
            assert shown[f"adapter_load_seconds_count{labels}"] == 1
            assert shown[f"adapter_load_seconds_sum{labels}"] == pytest.approx(seconds)


def test_a_taken_address_is_an_error_and_closing_ends_the_page(pages: list[str]) -> None:
    assert pages[3] == "taken: Address already in use"
    assert pages[4].startswith("closed: ")


# --- labels ------------------------------------------------------------------


def adapters_with_series() -> set[str]:
    """Adapters that have series in this process, which shares nothing."""
    return {
        sample.labels["adapter"]
        for family in REGISTRY.collect()
        if family.name.startswith("llm_adapter_")
        for sample in family.samples
    }


def requests_of(adapter: str, code: str) -> float:
    labels = {"method": "Generate", "adapter": adapter, "code": code}
    return REGISTRY.get_sample_value("llm_adapter_requests_total", labels) or 0.0


async def failures(fake: FakeGateway, requests: Iterable[pb.GenerateRequest]) -> None:
    for request in requests:
        with pytest.raises(grpc.aio.AioRpcError):
            await fake.stub.Generate(request)


async def test_names_that_callers_make_up_make_no_series(fake: FakeGateway) -> None:
    known = adapters_with_series() | {UNRESOLVED_LABEL, BASE_MODEL_LABEL, "alpha"}
    before = requests_of(UNRESOLVED_LABEL, "NOT_FOUND")
    invented = [f"invented-{number}" for number in range(20)]
    await failures(fake, [pb.GenerateRequest(text="x", adapter=name) for name in invented])
    await failures(fake, [pb.GenerateRequest(text="x", adapter="alpha", version=99)])
    await failures(fake, [pb.GenerateRequest(text="x", adapter="Not A Name")])
    assert adapters_with_series() <= known
    assert requests_of(UNRESOLVED_LABEL, "NOT_FOUND") == before + 21


async def test_a_served_adapter_and_the_base_model_have_series(fake: FakeGateway) -> None:
    sampling = pb.SamplingParams(max_tokens=1)
    for adapter, label in (("alpha", "alpha"), ("", BASE_MODEL_LABEL)):
        before = requests_of(label, "OK")
        await fake.stub.Generate(pb.GenerateRequest(text="x", adapter=adapter, sampling=sampling))
        assert requests_of(label, "OK") == before + 1


async def test_calls_count_as_running_while_they_run(fake: FakeGateway) -> None:
    def running() -> float:
        return REGISTRY.get_sample_value("gateway_inflight_calls") or 0.0

    before = running()
    stream = fake.stub.GenerateStream(
        pb.GenerateRequest(text="x", sampling=pb.SamplingParams(max_tokens=10_000))
    )
    await stream.read()
    assert running() == before + 1
    stream.cancel()
    assert await fake.admission.wait_idle(5)
    assert running() == before
