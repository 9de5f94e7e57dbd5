"""The status page of a real gateway: what it tells, and how a real browser shows it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from lora_gateway import GatewayClient
from lora_gateway.v1 import adapters_pb2 as ad
from lora_gateway.v1.adapters_pb2_grpc import AdaptersStub
from lora_gateway.v1.inference_pb2 import GenerateRequest, SamplingParams
from lora_gateway.v1.inference_pb2_grpc import InferenceStub
from store.artifacts import CONFIG_FILE
from tests.chromium import Tab, find_chromium, open_tab
from tests.e2e.gateway_process import GatewayProcess

pytestmark = pytest.mark.timeout(300)

TIMEOUT_S = 120.0
HOSTILE = "<img src=x onerror=document.title=1>"
CHROMIUM = find_chromium()
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here")


class Viewer:
    """One that follows `/events`."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status: Any = None

    async def until(self, holds: Callable[[Any], bool]) -> Any:
        """The first status for which it holds."""
        async with asyncio.timeout(TIMEOUT_S):
            while self.status is None or not holds(self.status):
                line = await self._response.content.readline()
                assert line, "the gateway ended the stream"
                if line.startswith(b"data: {"):
                    self.status = json.loads(line.removeprefix(b"data: "))
        return self.status


@contextlib.asynccontextmanager
async def viewer(gateway: GatewayProcess) -> AsyncIterator[Viewer]:
    url = gateway.metrics_url.removesuffix("metrics") + "events"
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(None), read_bufsize=1 << 22) as session,
        session.get(url) as response,
    ):
        assert response.status == 200
        yield Viewer(response)


async def ask(channel: grpc.aio.Channel, adapter: str, tokens: int = 4) -> None:
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0)
    request = GenerateRequest(adapter=adapter, text="Once upon a time", sampling=sampling)
    await InferenceStub(channel).Generate(request, timeout=TIMEOUT_S)


def arms_of(status: Any, adapter: str) -> dict[int, Any]:
    found = [each for each in status["adapters"] if each["name"] == adapter]
    return {arm["version"]: arm for each in found for arm in each["arms"]}


async def set_traffic(channel: grpc.aio.Channel, adapter: str, *versions: int) -> None:
    splits = [ad.TrafficSplit(version=version, weight=1) for version in versions]
    request = ad.SetTrafficRequest(adapter=adapter, splits=splits)
    await AdaptersStub(channel).SetTraffic(request, timeout=TIMEOUT_S)


async def test_events_tell_what_a_request_and_a_change_of_traffic_did(
    gateway: GatewayProcess, channel: grpc.aio.Channel
) -> None:
    async with viewer(gateway) as looks:
        status = await looks.until(lambda status: True)
        assert (status["phase"], status["model"]) == ("serving", "tiny")
        assert status["workers"]["serving"] == 2
        (shard,) = status["shards"]
        assert (shard["name"], shard["state"], shard["restarts"]) == ("shard-0", "up", 0)
        assert shard["slots_left"] > 0 and shard["places"] == 64

        for _ in range(3):
            await ask(channel, "pirate")

        def is_told(status: Any) -> bool:
            (shard,) = status["shards"]
            used = [
                resident["last_use_time_s"]
                for resident in shard["residents"]
                if (resident["adapter"], resident["version"]) == ("pirate", 1)
            ]
            arms = arms_of(status, "pirate")
            return bool(used and used[0] and arms and arms[1]["requests"] >= 3)

        status = await looks.until(is_told)
        arm = arms_of(status, "pirate")[1]
        assert arm["share"] == 1.0 and arm["error_ratio"] < 1.0
        assert 0 < arm["ttft_p50_ms"] <= arm["ttft_p95_ms"] and arm["tokens_per_s"] > 0
        await looks.until(lambda status: sum(status["tokens_per_s"]) > 0)

        await set_traffic(channel, "pirate")
        try:
            status = await looks.until(lambda status: not arms_of(status, "pirate"))
            assert status["events"][0]["text"] == "traffic set to nothing"
        finally:
            await set_traffic(channel, "pirate", 1)
        await looks.until(lambda status: 1 in arms_of(status, "pirate"))


async def test_the_page_and_the_metrics_have_one_address(gateway: GatewayProcess) -> None:
    base = gateway.metrics_url.removesuffix("/metrics")
    async with aiohttp.ClientSession() as session:
        for path, part in (
            ("/", "<!doctype html>"),
            ("/metrics", "vllm:num_requests_running"),
            ("/healthz", "serving"),
        ):
            async with session.get(base + path) as response:
                assert response.status == 200
                assert part in await response.text()
        async with session.get(base + "/", headers={"Host": "evil.example"}) as response:
            assert response.status == 403


@contextlib.asynccontextmanager
async def browser(gateway: GatewayProcess) -> AsyncIterator[Tab]:
    """The page in a browser, once it shows what it was told."""
    assert CHROMIUM is not None
    async with open_tab(CHROMIUM, gateway.metrics_url.removesuffix("metrics")) as tab:
        await tab.wait_for("document.getElementById('link').textContent === 'live'")
        yield tab


def text_of(selector: str) -> str:
    return f"[...document.querySelectorAll('{selector}')].map((e) => e.textContent).join('|')"


@needs_chromium
async def test_a_browser_shows_a_live_gateway_and_follows_its_changes(
    gateway: GatewayProcess, channel: grpc.aio.Channel
) -> None:
    for adapter in ("alpha", "beta", "pirate"):  # the busiest are shown
        await ask(channel, adapter)
    async with browser(gateway) as tab:
        assert await tab.evaluate(text_of("#model")) == "tiny"
        assert await tab.evaluate(text_of("#phase")) == "serving"
        assert "2 of 2 workers" in await tab.evaluate(text_of("#facts"))
        assert await tab.evaluate(text_of("#shards h3")) == "shard-0"
        assert await tab.evaluate(text_of("#shards .state")) == "up"
        assert await tab.evaluate(text_of("#up")) == "1 / 1"
        names = await tab.evaluate(text_of("#adapters tbody .narrow .name"))
        assert {"alpha", "beta", "pirate"} <= set(names.split("|"))

        await tab.evaluate("window.still_here = true")
        asking = asyncio.create_task(ask(channel, "beta", 400))
        await tab.wait_for(f"{text_of('#shards .chips li')}.includes('beta@1')")
        await asking
        beta = "[...document.querySelectorAll('#adapters tbody')].find("
        beta += "(body) => body.querySelector('.name').textContent === 'beta')"
        await tab.wait_for(f"{beta}.querySelector('.ratio').textContent === '100 %'")
        await set_traffic(channel, "beta")
        try:
            await tab.wait_for(f"{beta}.querySelector('.ratio').textContent === 'no traffic'")
            await tab.wait_for(f"{text_of('#events li')}.includes('traffic set to nothing')")
        finally:
            await set_traffic(channel, "beta", 1)
        assert await tab.evaluate("window.still_here"), "it was not loaded again"

        for width in (390, 1440):
            await tab.show(width=width, height=900, dark=width == 390)
            assert await tab.evaluate("document.documentElement.scrollWidth") <= width

        assert tab.problems == []
        origin = gateway.metrics_url.removesuffix("metrics")
        assert tab.requests == [origin, f"{origin}events"]


@needs_chromium
async def test_a_browser_shows_a_hostile_text_and_does_not_run_it(
    gateway: GatewayProcess, adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    """Names are restricted, and what an adapter has in its files is not."""
    folder = tmp_path / "hostile"
    shutil.copytree(adapters["alpha"], folder)
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "target_modules": {HOSTILE: 1}}))
    name = f"hostile-{uuid.uuid4().hex[:6]}"
    async with GatewayClient(gateway.address) as client, browser(gateway) as tab:
        await client.adapters.upload(folder, adapter=name, timeout_s=TIMEOUT_S)
        await tab.wait_for(f"{text_of('#events .bad')}.includes('{HOSTILE}')")
        assert f"{name}@1" in await tab.evaluate(text_of("#events .name"))
        assert await tab.evaluate("document.querySelectorAll('img').length") == 0
        assert "lora-gateway" in await tab.evaluate("document.title")
        assert tab.problems == []
        await client.adapters.delete(name, 1)
