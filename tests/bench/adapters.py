"""What 10,000 adapters cost that are registered, and not loaded: start, memory, lists, requests.

Starts a gateway on an empty state folder and on a full one, in turns, each with one worker. The
exit code is 0 whenever it could measure: a missed target is printed as missed.

    python -m tests.bench.adapters
"""

from __future__ import annotations

import argparse
import asyncio
import os
import pickle
import random
import signal
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import grpc
import psutil

from engine.ledger import Ledger
from engine.pool import ServedAdapter, ServedView
from engine.split import Split
from lora_gateway.v1 import adapters_pb2 as pb
from lora_gateway.v1.adapters_pb2_grpc import AdaptersStub
from store.records import Arm
from store.sqlite_registry import SqliteRegistry
from tests.bench.adapters_report import PAGE_ADAPTERS, AdaptersReport, Load, Reading, Start
from tests.bench.adapters_state import REGISTRY_FILE, TENANT, States, adapter_name, write_states
from tests.bench.machine import Machine
from tests.bench.side import Side
from tests.bench.workload import Workload
from tests.e2e.gateway_process import GatewayProcess

if TYPE_CHECKING:
    from lora_gateway.v1.adapters_pb2_grpc import AdaptersStub as SyncAdaptersStub

FLAGS = ("--dtype", "float32", "--max-model-len", "2048", "--workers", "1")
STANDBY_TIMEOUT_S = 120.0
EXIT_TIMEOUT_S = 60.0
PAGES = 200
"""Calls of ListAdapters of each full start."""
WORKLOAD = Workload(tuple(range(100, 132)), adapter_name(0), requests=1024, in_flight=64, tokens=1)
"""The smallest requests that there are: resolving a name is the largest part of them."""
WARM_UP = replace(WORKLOAD, requests=128)
CANARY = Split((Arm(1, 90), Arm(2, 10)))
RESOLVE_BLOCKS, BLOCK_RESOLVES = 20, 10_000
READINGS = 5


def main() -> None:
    """Entry of the command."""
    options = _options()
    machine = Machine.here()
    with tempfile.TemporaryDirectory(prefix="bench-adapters-") as folder:
        print(_measure(Path(folder), str(machine), options).text())


def _measure(folder: Path, machine: str, options: argparse.Namespace) -> AdaptersReport:
    _say(f"registering {options.adapters} adapters")
    begin_s = time.monotonic()
    states = asyncio.run(write_states(folder, options.model, options.adapters))
    writing_s = time.monotonic() - begin_s
    starts: dict[Path, list[Start]] = {states.empty: [], states.full: []}
    pages_s: list[float] = []
    loads: list[Load] = []
    for number, state in enumerate(_turns(states, options.starts)):
        _say(f"starting a gateway on the {state.name} folder")
        with _gateway(state, options.model, folder / f"{number}.log") as (gateway, spent):
            starts[state].append(Start(*spent, _worker(gateway).memory_full_info().uss))
            if state == states.full:
                pages_s += _list_pages(gateway.address)
                loads.append(_load(gateway, folder / f"{number}.client.log"))
    _say("timing what is read at a start, and resolving")
    return AdaptersReport(
        machine=machine,
        load_average_after=os.getloadavg()[0],
        adapters=options.adapters,
        writing_s=writing_s,
        empty_starts=starts[states.empty],
        full_starts=starts[states.full],
        empty_reading=asyncio.run(_read(states.empty)),
        full_reading=asyncio.run(_read(states.full)),
        pages_s=pages_s,
        loads=loads,
        resolves_s=_resolve(options.adapters),
    )


def _turns(states: States, pairs: int) -> Iterator[Path]:
    """Empty, full, full, empty, and so on: neither always follows the other."""
    for pair in range(pairs):
        yield from (states.empty, states.full) if pair % 2 == 0 else (states.full, states.empty)


@contextmanager
def _gateway(
    state: Path, model: str, log: Path
) -> Iterator[tuple[GatewayProcess, tuple[float, float]]]:
    """A gateway with its standby, and the seconds until it was SERVING: those of the clock, and
    those of processors. It ends in order, so that the next start has nothing to repair."""
    begin_s = time.monotonic()
    with closing(GatewayProcess(["--model", model, *FLAGS], state, log)) as gateway:
        gateway.wait_serving()
        spent = time.monotonic() - begin_s, sum(map(_processor_s, gateway.family()))
        deadline_s = time.monotonic() + STANDBY_TIMEOUT_S
        while sum(gateway.metrics("gateway_workers", state="standby")) < 1:
            assert time.monotonic() < deadline_s, "no standby worker"
            time.sleep(0.5)
        yield gateway, spent
        gateway.signal(signal.SIGTERM)
        gateway.wait_exit(EXIT_TIMEOUT_S)


def _worker(gateway: GatewayProcess) -> psutil.Process:
    (pid,) = gateway.serving_workers()
    return psutil.Process(pid)


def _list_pages(address: str) -> list[float]:
    """Seconds of each of PAGES calls, page after page and from the first one again."""
    times_s: list[float] = []
    with grpc.insecure_channel(address) as channel:
        stub: SyncAdaptersStub = AdaptersStub(channel)
        request = pb.ListAdaptersRequest(page_size=PAGE_ADAPTERS)
        stub.ListAdapters(request)  # connects
        while len(times_s) < PAGES:
            begin_s = time.perf_counter()
            response = stub.ListAdapters(request)
            times_s.append(time.perf_counter() - begin_s)
            assert len(response.adapters) == PAGE_ADAPTERS
            request.page_token = response.next_page_token
    return times_s


def _load(gateway: GatewayProcess, log: Path) -> Load:
    worker = _worker(gateway)
    with closing(Side("tests.bench.client", [gateway.address], log)) as client:
        client.wait_ready()
        client.round(WARM_UP)  # loads the adapter
        before_s = _processor_s(worker)
        measured = client.round(WORKLOAD)
        used_s = _processor_s(worker) - before_s
    assert measured.tokens == WORKLOAD.requests * WORKLOAD.tokens
    return Load(WORKLOAD.requests / measured.seconds, used_s / WORKLOAD.requests)


def _processor_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


class _Nobody:
    """Who follows changes of a ledger that makes none."""

    def show(self, tenant: str, adapter: str, served: ServedAdapter) -> Awaitable[None]:
        raise AssertionError("nothing was changed")


async def _read(state: Path) -> Reading:
    """Do what a start does with the registry; medians of READINGS times."""
    readings = []
    for _ in range(READINGS):
        begin_s = time.perf_counter()
        async with SqliteRegistry(state / REGISTRY_FILE) as registry:
            opened_s = time.perf_counter()
            ledger = Ledger(registry, _Nobody())
            await ledger.open()
            read_s = time.perf_counter()
            pickle.loads(ForkingPickler.dumps(ledger.view))
            carried_s = time.perf_counter()
        readings.append(Reading(opened_s - begin_s, read_s - opened_s, carried_s - read_s))
    return Reading(
        median(reading.registry_s for reading in readings),
        median(reading.ledger_s for reading in readings),
        median(reading.orders_s for reading in readings),
    )


def _resolve(adapters: int) -> list[float]:
    """Seconds a call of each block. Names and sessions are new with every call."""
    view = ServedView()
    for number in range(adapters):
        view.show(TENANT, adapter_name(number), ServedAdapter(CANARY, (1, 2)))
    return [_resolve_block(view.resolve, adapters) for _ in range(RESOLVE_BLOCKS)]


def _resolve_block(resolve: Callable[..., object], adapters: int) -> float:
    asked: Sequence[tuple[str, str]] = [
        (adapter_name(random.randrange(adapters)), uuid.uuid4().hex) for _ in range(BLOCK_RESOLVES)
    ]
    begin_s = time.perf_counter()
    for name, session in asked:
        resolve(TENANT, name, None, session)
    return (time.perf_counter() - begin_s) / BLOCK_RESOLVES


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.adapters", description=__doc__)
    parser.add_argument("--model", default="tiny-1layer", help="as for `gateway serve`")
    parser.add_argument(
        "--adapters", type=int, default=10_000, help=f"a multiple of {PAGE_ADAPTERS}"
    )
    parser.add_argument("--starts", type=int, default=3, help="of either kind, at least 2")
    options = parser.parse_args()
    if options.adapters < PAGE_ADAPTERS or options.adapters % PAGE_ADAPTERS:
        parser.error(f"--adapters must be a multiple of {PAGE_ADAPTERS}, for whole pages")
    if options.starts < 2:
        parser.error("--starts must be at least 2, because single starts differ by seconds")
    return options


def _say(what: str) -> None:
    print(f"bench: {what}", flush=True)


if __name__ == "__main__":
    main()
