"""The host's HTTP endpoint: what it answers, to whom, and that nobody holds it up."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from gateway import http_endpoint as module
from gateway.http_endpoint import HttpEndpoint
from gateway.status import Phase, Status
from gateway.status_feed import StatusFeed
from tests.gateway.statuses import EVENT, status

TIMEOUT_S = 10.0
VIEWERS = 2


@dataclass
class Stage:
    """An endpoint on a port of its own, and what it shows."""

    endpoint: HttpEndpoint
    feed: StatusFeed
    session: aiohttp.ClientSession
    shown: dict[str, Any] = field(default_factory=dict)
    phase: Phase = Phase.SERVING

    def get(self, path: str, **options: Any) -> Any:
        return self.session.get(f"http://{self.endpoint.address}{path}", **options)


@contextlib.asynccontextmanager
async def stage(address: str = "127.0.0.1:0", heartbeat_s: float = 0.05) -> AsyncIterator[Stage]:
    async def read() -> Status:
        return status(**made.shown)

    feed = StatusFeed(read, interval_s=0.01, heartbeat_s=heartbeat_s, max_viewers=VIEWERS)
    endpoint = HttpEndpoint(address, feed, lambda: made.phase)
    timeout = aiohttp.ClientTimeout(TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        made = Stage(endpoint, feed, session)
        await endpoint.start()
        try:
            yield made
        finally:
            await feed.close()
            await endpoint.close()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the metrics of all processes, of which there are none."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))


@pytest_asyncio.fixture(loop_scope="session")
async def on(folder: None) -> AsyncIterator[Stage]:
    """An endpoint on loopback."""
    async with stage() as made:
        yield made


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, str]]:
    """Each event's kind and data, as a browser reads them."""
    kind, data = "message", []
    while line := (await response.content.readline()).decode():
        name, _, value = line.rstrip("\n").partition(": ")
        match name:
            case "event":
                kind = value
            case "data":
                data.append(value)
            case "" if data:
                yield kind, "\n".join(data)
                kind, data = "message", []


async def snapshot(response: aiohttp.ClientResponse) -> Any:
    async with asyncio.timeout(TIMEOUT_S):
        async for kind, data in events(response):
            if kind == "message":
                return json.loads(data)
    raise AssertionError("the stream ended")


# --- what there is -----------------------------------------------------------


async def test_the_page_may_run_what_is_written_in_it_and_ask_only_this_server(on: Stage) -> None:
    async with on.get("/") as response:
        html, headers = await response.text(), response.headers
    assert response.status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"


async def test_the_page_names_nothing_of_others_and_makes_no_markup_of_texts(on: Stage) -> None:
    async with on.get("/") as response:
        html = await response.text()
    assert set(re.findall(r"\w+://[^\s\"')]+", html)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", html)
    assert not re.search(r"\son\w+\s*=\s*[\"']|style\s*=\s*[\"']", html)


async def test_events_tell_the_state_at_once_and_each_change(on: Stage) -> None:
    async with on.get("/events") as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/event-stream"
        assert (await response.content.readline()).startswith(b"retry: ")
        told = events(response)
        async with asyncio.timeout(TIMEOUT_S):
            kind, data = await anext(told)
            assert kind == "beat" and abs(float(data) - time.time()) < TIMEOUT_S
            kind, data = await anext(told)
            assert kind == "message" and json.loads(data)["model"] == "tiny"
            on.shown["events"] = (replace(EVENT, text="two\nlines\n\ndata: {}"),)
            while kind != "message" or "lines" not in data:
                kind, data = await anext(told)
        assert json.loads(data)["events"][0]["text"] == "two\nlines\n\ndata: {}"


async def test_a_heartbeat_is_an_event_that_the_page_hears(on: Stage) -> None:
    async with on.get("/events") as response, asyncio.timeout(TIMEOUT_S):
        told = events(response)
        kinds = [(await anext(told))[0] for _ in range(6)]
    assert kinds.count("message") == 1 and kinds.count("beat") == 5


@pytest.mark.parametrize("phase", Phase)
async def test_health_is_good_while_the_gateway_serves(phase: Phase, on: Stage) -> None:
    on.phase = phase
    async with on.get("/healthz") as response:
        assert response.status == (200 if phase is Phase.SERVING else 503)
        assert await response.text() == f"{phase.value}\n"


class Asks(Collector):
    """Asks the loop that serves, as the gauges of shards do."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def describe(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("gateway_asked", "What the loop answered.")

    def collect(self) -> Iterator[Metric]:
        async def answer() -> float:
            return 7.0

        value = asyncio.run_coroutine_threadsafe(answer(), self._loop).result(TIMEOUT_S)
        yield GaugeMetricFamily("gateway_asked", "What the loop answered.", value)
        yield GaugeMetricFamily("gateway_other", "Another one.", 1.0)
        yield GaugeMetricFamily("vllm:asked", "Named as the engine's are.", value)


async def test_metrics_are_made_beside_the_loop_and_packed_if_they_may_be(on: Stage) -> None:
    on.endpoint.add(Asks())
    async with on.get("/metrics") as response:
        text = await response.text()
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert response.headers["Content-Encoding"] == "gzip"
    assert "gateway_asked 7.0\n" in text and "# EOF" not in text
    plain = {"Accept-Encoding": "identity", "Accept": "application/openmetrics-text;version=1.0.0"}
    async with on.get("/metrics", headers=plain) as response:
        text = await response.text()
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert "Content-Encoding" not in response.headers
    assert "vllm:asked 7.0\n" in text, "OpenMetrics would have another name for it"
    async with on.get("/metrics?name[]=gateway_asked") as response:
        text = await response.text()
    assert "gateway_asked" in text and "gateway_other" not in text


# --- to whom -----------------------------------------------------------------


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("path", ["/", "/metrics", "/events", "/healthz"])
async def test_nothing_can_be_changed(method: str, path: str, on: Stage) -> None:
    url = f"http://{on.endpoint.address}{path}"
    async with on.session.request(method, url) as response:
        assert response.status == 405
        assert response.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    "path", ["/nothing", "/status_page.html", "/../pyproject.toml", "/metrics/"]
)
async def test_nothing_else_is_there(path: str, on: Stage) -> None:
    async with on.get(path) as response:
        assert response.status == 404


LOCAL = [
    "localhost",
    "LocalHost:9464",
    "127.0.0.1",
    "127.0.0.1:80",
    "127.1.2.3:1",
    "[::1]:9464",
    "[::1]",
]
FOREIGN = [
    "evil.example",
    "evil.example:9464",
    "localhost.evil.example",
    "10.0.0.1:9464",
    "[::2]",
    "",
]


@pytest.mark.parametrize("path", ["/", "/events", "/metrics", "/healthz"])
@pytest.mark.parametrize("host", LOCAL + FOREIGN)
async def test_on_loopback_only_names_of_this_machine_are_answered(
    host: str, path: str, on: Stage
) -> None:
    """A page of others that lets its own name point here is refused."""
    async with on.get(path, headers={"Host": host}) as response:
        assert response.status == (200 if host in LOCAL else 403)


async def test_on_another_address_any_name_is_answered() -> None:
    async with stage("0.0.0.0:0") as made:
        port = made.endpoint.address.rpartition(":")[2]
        url = f"http://127.0.0.1:{port}/metrics"
        headers = {"Host": "prometheus-target.example"}
        async with made.session.get(url, headers=headers) as response:
            assert response.status == 200


@pytest.mark.parametrize("address", ["localhost:0", "[::1]:0"])
async def test_a_name_and_an_ipv6_address_can_be_listened_on(address: str) -> None:
    async with stage(address) as made, made.get("/healthz") as response:
        assert response.status == 200


async def test_a_taken_address_is_an_error(on: Stage) -> None:
    with pytest.raises(OSError, match="Address already in use"):
        HttpEndpoint(on.endpoint.address, on.feed, lambda: Phase.SERVING)


# --- that nobody holds it up -------------------------------------------------


async def test_one_viewer_too_many_is_refused_until_another_leaves(on: Stage) -> None:
    async with on.get("/events") as stays:
        async with on.get("/events") as leaves:
            await snapshot(stays)
            await snapshot(leaves)
            async with on.get("/events") as refused:
                assert refused.status == 503 and refused.headers["Retry-After"] == "1"
                assert "2 viewers" in await refused.text()
            async with on.get("/metrics") as response:
                assert response.status == 200
            leaves.close()
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                async with on.get("/events") as comes:
                    if comes.status == 200:
                        await snapshot(comes)
                        break
                await asyncio.sleep(0.01)


async def test_a_viewer_that_leaves_frees_its_place_though_nothing_is_told() -> None:
    async with stage(heartbeat_s=3600.0) as made:
        for _ in range(2 * VIEWERS):
            async with asyncio.timeout(TIMEOUT_S):
                while True:
                    async with made.get("/events") as comes:
                        if comes.status == 200:
                            await snapshot(comes)
                            break
                    await asyncio.sleep(0.01)


async def stuck_viewer(on: Stage) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """One that asks for the events, and reads none."""
    host, _, port = on.endpoint.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1)
    writer.write(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await reader.read(1)  # it has a place
    assert isinstance(writer.transport, asyncio.Transport)
    writer.transport.pause_reading()
    return reader, writer


def show_megabytes(on: Stage, number: int) -> None:
    on.shown["events"] = (replace(EVENT, text=f"{number} " + "x" * (4 << 20)),)


async def test_a_viewer_that_does_not_read_loses_its_place_and_slows_nobody_down(
    on: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WRITE_TIMEOUT_S", 0.2)
    reader, stuck = await stuck_viewer(on)
    async with on.get("/events", read_bufsize=1 << 24) as response:
        told = events(response)
        for number in range(5):
            show_megabytes(on, number)
            async with asyncio.timeout(TIMEOUT_S):
                async for kind, data in told:
                    if kind == "message" and f'"{number} xx' in data:
                        break
        on.shown.clear()
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                async with on.get("/events") as comes:
                    if comes.status == 200:
                        break
                await asyncio.sleep(0.01)
    assert isinstance(stuck.transport, asyncio.Transport)
    stuck.transport.resume_reading()
    read = b""
    async with asyncio.timeout(TIMEOUT_S):
        with contextlib.suppress(ConnectionResetError):
            while content := await reader.read(1 << 20):
                read = content
    assert not read.endswith(b"\r\n0\r\n\r\n"), "nothing is kept for it, not even the end"
    stuck.close()


async def test_viewers_do_not_hold_up_the_end(on: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WRITE_TIMEOUT_S", 3600.0)
    show_megabytes(on, 0)
    _, stuck = await stuck_viewer(on)
    async with on.get("/events", read_bufsize=1 << 24) as response:
        await snapshot(response)
        async with on.get("/healthz"):  # and a connection that idles
            pass
        async with asyncio.timeout(TIMEOUT_S):
            await on.feed.close()
            await on.endpoint.close()
            async for _ in events(response):
                pass
    stuck.close()
    with pytest.raises(aiohttp.ClientConnectorError):
        async with on.get("/healthz"):
            pass
