"""The gateway's side: a real gateway, the load on it, and its own word that all went well."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.bench.front_end import CallsFailed, Kind
from tests.bench.h2load import STREAMING, UNARY, run_h2load
from tests.bench.side import Side
from tests.bench.workload import ADAPTER, Round, Workload
from tests.e2e.gateway_process import GatewayProcess

STANDBY_TIMEOUT_S = 120.0
CONNECTIONS_OF_WORKERS = 16
"""To several workers: the kernel gives each connection to one of them, by chance."""


class ServedSide:
    """`gateway serve` with the adapter, and clients of it."""

    kind = Kind.GATEWAY

    def __init__(self, folder: Path, adapter: Path, flags: Sequence[str], workers: int) -> None:
        self._owned = ExitStack()
        self.connections = CONNECTIONS_OF_WORKERS if workers > 1 else 1
        """Of the load, at most."""
        self._gateway = GatewayProcess(
            [*flags, "--workers", f"{workers}", "--adapter", f"{ADAPTER}={adapter}"],
            folder / "state",
            folder / "gateway.log",
        )
        self._owned.callback(self._gateway.close)
        try:
            self._gateway.wait_serving()
            self._wait_standby()
            address = self._gateway.address
            self._client = Side("tests.bench.client", [address], folder / "client.log")
            self._owned.callback(self._client.close)
            self._client.wait_ready()
        except BaseException:
            self._owned.close()
            raise

    def serves(self, adapter: str) -> bool:
        """All."""
        return True

    def round(self, workload: Workload) -> Round:
        """Run the workload for throughput. Raises LoadFailed or CallsFailed."""
        before = self._tally()
        measured = run_h2load(
            self._gateway.address,
            workload,
            STREAMING if workload.streaming else UNARY,
            connections=min(self.connections, workload.in_flight),
        )
        self._check(workload, before)
        return measured

    def first_tokens(self, workload: Workload) -> list[float]:
        """Run the workload one request at a time; seconds to each first token."""
        before = self._tally()
        measured = self._client.first_tokens(workload)
        self._check(workload, before)
        return measured

    def text(self, workload: Workload) -> str:
        """The answer to one request of the workload."""
        return self._client.text(workload)

    def close(self) -> None:
        """End clients and gateway."""
        self._owned.close()

    def _check(self, workload: Workload, before: tuple[float, ...]) -> None:
        asked = (workload.requests, 0, workload.requests * workload.tokens)
        counted = tuple(b - a for a, b in zip(before, self._tally(), strict=True))
        if counted != asked:
            raise CallsFailed(f"(OK, not OK, tokens) are {counted} and should be {asked}")

    def _tally(self) -> tuple[float, float, float]:
        """Calls that ended with OK, and in other ways, and tokens generated, all so far."""
        metrics = self._gateway.metrics
        ended = sum(metrics("llm_adapter_requests_total"))
        good = sum(metrics("llm_adapter_requests_total", code="OK"))
        return good, ended - good, sum(metrics("llm_adapter_tokens_total", kind="completion"))

    def _wait_standby(self) -> None:
        """Wait until the spare worker has finished its imports, which take a core for seconds."""
        deadline_s = time.monotonic() + STANDBY_TIMEOUT_S
        while sum(self._gateway.metrics("gateway_workers", state="standby")) < 1:
            assert time.monotonic() < deadline_s, "no standby worker"
            time.sleep(0.5)
