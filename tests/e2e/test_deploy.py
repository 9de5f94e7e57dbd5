"""Alerts and dashboard ask for what a real gateway's page has."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Iterator, Mapping

import grpc
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from gateway.adapter_labels import MAX_NAMED
from lora_gateway.v1 import inference_pb2 as pb
from lora_gateway.v1.inference_pb2_grpc import InferenceStub
from tests.deploy.expressions import Asked, asked, expressions
from tests.e2e.gateway_process import GatewayProcess

OF_PROMETHEUS = {"up"}
OF_THE_SCRAPE = {"instance", "job"}
OF_JOB: Mapping[str, str] = {"job": "lora-gateway"}

ACCEPT = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
"""What Prometheus 2 asks for."""

FEW = 24
"""Values of a label that are known when the code is written."""
OF_ADAPTERS = {"adapter"}
"""Labels with as many values as are named, and those in parentheses."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def samples(gateway: GatewayProcess) -> list[Sample]:
    """The page after a call, a stream, and a call that was refused."""
    sampling = pb.SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        stub = InferenceStub(channel)
        for adapter in ("", "alpha"):
            request = pb.GenerateRequest(text="Once", adapter=adapter, sampling=sampling)
            await stub.Generate(request, timeout=60)
            async for _ in stub.GenerateStream(request, timeout=60):
                pass
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Generate(pb.GenerateRequest(text="Once", adapter="nobody"), timeout=60)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    return await asyncio.to_thread(lambda: list(read(gateway.metrics_url)))


def read(url: str) -> Iterator[Sample]:
    request = urllib.request.Request(url, headers={"Accept": ACCEPT})
    with urllib.request.urlopen(request, timeout=30) as response:
        text = response.read().decode()
    for family in text_string_to_metric_families(text):
        yield from family.samples


def lacking(one: Asked, samples: list[Sample]) -> str:
    """What of it is not on the page, for people; empty if all is."""
    if one.metric in OF_PROMETHEUS:
        return ""
    found = [sample for sample in samples if sample.name == one.metric]
    if not found:
        return one.metric
    for label in one.labels - OF_THE_SCRAPE:
        if not all(label in sample.labels for sample in found):
            return f"label {label} of {one.metric}"
    if not any(one.equals.items() - OF_JOB.items() <= sample.labels.items() for sample in found):
        return f"{one.metric} with {dict(one.equals)}"
    return ""


async def test_every_metric_and_label_that_is_asked_for_is_there(samples: list[Sample]) -> None:
    missing = {
        where: [found for one in asked(expression) if (found := lacking(one, samples))]
        for where, expression in expressions().items()
    }
    assert not {where: what for where, what in missing.items() if what}
    assert len(missing) > 50


async def test_what_is_not_there_would_be_noticed(samples: list[Sample]) -> None:
    for wrong in (
        "sum(rate(gateway_shedding_total[5m]))",
        "sum by (colour) (gateway_shard_up)",
        'gateway_shed_total{reason="weather"}',
        'max(sum by (shard) (gateway_inflight{node="a"})) / 2 > 1',
    ):
        assert all(lacking(one, samples) for one in asked(wrong)), wrong


async def test_no_label_has_more_values_than_are_known_beforehand(samples: list[Sample]) -> None:
    values: dict[tuple[str, str], set[str]] = {}
    for sample in samples:
        for label, value in sample.labels.items():
            values.setdefault((sample.name, label), set()).add(value)
    counts = {
        key: len(found)
        for key, found in values.items()
        if len(found) > (MAX_NAMED + 3 if key[1] in OF_ADAPTERS else FEW)
    }
    assert not counts
    adapters = values["llm_adapter_requests_total", "adapter"]
    assert {"(base)", "(none)", "alpha"} <= adapters
    assert "(other)" not in adapters, "few adapters are all named"
