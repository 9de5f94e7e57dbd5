"""The host's HTTP endpoint: metrics of all processes, and the status page.

    /metrics  for Prometheus       /healthz  200 while the gateway serves
    /         the page             /events   what the page shows, as server-sent events

Runs on the host's event loop, opens before anything else, and only reads. Plain HTTP: who must not
see it must not reach it.
"""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, gzip_accepted
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from gateway.address import is_loopback
from gateway.admission import RETRY_DELAY_S, Draining, Overloaded
from gateway.imbalance import Imbalance
from gateway.status import Phase
from gateway.status_feed import StatusFeed
from gateway.status_page import StatusPage

CLOSE_GRACE_S = 1.0
"""How long answers that are being written get at the end."""
WRITE_TIMEOUT_S = 30.0
"""A viewer that reads nothing for so long is gone."""
RECONNECT_MS = 2000
"""After which a browser comes back."""
SCRAPES_AT_ONCE = 4
"""Each has a thread, which waits for the cores."""

_PORT = re.compile(r":\d+$")
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Server": "lora-gateway",
    "X-Content-Type-Options": "nosniff",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpEndpoint:
    """Everything on `--metrics-listen`. Owned by the host: `start` it, and at last `close` it."""

    def __init__(self, address: str, feed: StatusFeed, phase: Callable[[], Phase]) -> None:
        """Bind `HOST:PORT`. The page shows what `feed` tells. Raises OSError if it is taken."""
        self._host, _, port = address.rpartition(":")
        self._feed = feed
        self._phase = phase
        self._page = StatusPage()
        self._registry = CollectorRegistry()
        self._registry.register(Imbalance(MultiProcessCollector(None)))  # type: ignore[no-untyped-call]
        self._scrapes = ThreadPoolExecutor(SCRAPES_AT_ONCE, thread_name_prefix="scrape")
        self._socket = _bind(self._host.strip("[]"), int(port))
        self._port = self._socket.getsockname()[1]
        self._private = is_loopback(address)
        self._runner = web.AppRunner(
            self._app(),
            access_log=None,
            handle_signals=False,
            handler_cancellation=True,  # a viewer that leaves frees its place at once
            shutdown_timeout=CLOSE_GRACE_S,
        )

    @property
    def address(self) -> str:
        """`HOST:PORT` with the port in use, when 0 was asked for."""
        return f"{self._host}:{self._port}"

    async def start(self) -> None:
        """Answer from now on."""
        await self._runner.setup()
        await web.SockSite(self._runner, self._socket).start()

    def add(self, collector: Collector) -> None:
        """Show what this one collects, too. It is asked in the thread of each scrape."""
        self._registry.register(collector)

    def forget_process(self, pid: int) -> None:
        """Drop the gauges of a process that is gone; its counters stay."""
        mark_process_dead(pid)  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        """Stop listening, and end all answers. The feed is closed first, or it holds this up."""
        await self._runner.cleanup()
        self._socket.close()
        self._scrapes.shutdown(wait=False, cancel_futures=True)

    def _app(self) -> web.Application:
        app = web.Application(middlewares=[self._guard])
        app.on_response_prepare.append(_harden)
        app.router.add_get("/", self._show_page)
        app.router.add_get("/metrics", self._show_metrics)
        app.router.add_get("/healthz", self._show_health)
        app.router.add_get("/events", self._tell_events, allow_head=False)
        return app

    @web.middleware  # type: ignore[untyped-decorator]
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Keep pages of others from reading this one under a name of theirs, which they let point
        here (DNS rebinding). A browser always says what it was told to ask for."""
        host = request.headers.get("Host")
        if self._private and host is not None and not _names_loopback(host):
            raise web.HTTPForbidden(
                text=f"{host!r} is not this machine; ask for localhost, or give --metrics-listen "
                "an address that others reach\n"
            )
        return await handler(request)

    async def _show_page(self, request: web.Request) -> web.StreamResponse:
        return web.Response(
            text=self._page.html,
            content_type="text/html",
            headers={"Content-Security-Policy": self._page.policy},
        )

    async def _show_metrics(self, request: web.Request) -> web.StreamResponse:
        names = request.query.getall("name[]", [])
        registry = self._registry.restricted_registry(names) if names else self._registry
        # In a thread: it reads files, and asks the cores through this very loop.
        body = await asyncio.get_running_loop().run_in_executor(
            self._scrapes, generate_latest, registry
        )
        # Whatever is asked for: in OpenMetrics, which Prometheus 2 prefers, prometheus_client has
        # `_` for the `:` of vLLM's names (openmetrics/exposition.py:152).
        response = web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})
        if gzip_accepted(request.headers.get("Accept-Encoding", "")):
            response.enable_compression(web.ContentCoding.gzip)
        return response

    async def _show_health(self, request: web.Request) -> web.StreamResponse:
        phase = self._phase()
        return web.Response(text=f"{phase.value}\n", status=200 if phase is Phase.SERVING else 503)

    async def _tell_events(self, request: web.Request) -> web.StreamResponse:
        try:
            with self._feed.seat():
                response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
                await response.prepare(request)
                await response.write(b"retry: %d\n%b" % (RECONNECT_MS, _frame(None)))
                async with aclosing(self._feed.follow()) as snapshots:
                    async for snapshot in snapshots:
                        async with asyncio.timeout(WRITE_TIMEOUT_S):
                            await response.write(_frame(snapshot))
        except (Overloaded, Draining) as refusal:
            raise web.HTTPServiceUnavailable(
                text=f"{refusal}\n", headers={"Retry-After": f"{RETRY_DELAY_S:.0f}"}
            ) from None
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()  # nobody reads the end of it either
        return response


def _frame(snapshot: bytes | None) -> bytes:
    """One server-sent event. None is a heartbeat, by which the page sets its clock."""
    if snapshot is None:
        return b"event: beat\ndata: %.3f\n\n" % time.time()
    return b"data: %b\n\n" % snapshot


async def _harden(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(_HEADERS)


def _names_loopback(host: str) -> bool:
    """Whether a Host header, with or without a port, names this machine to itself alone."""
    return is_loopback(host.lower() if _PORT.search(host) else f"{host.lower()}:80")


def _bind(host: str, port: int) -> socket.socket:
    """A socket that listens on the first address that `host` stands for. Raises OSError."""
    family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(target)
        bound.listen()
    except OSError:
        bound.close()
        raise
    return bound
