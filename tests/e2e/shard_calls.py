"""Calls to a gateway of several shards, on connections of their own."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Iterable

import grpc
import psutil

from engine.ring import AdapterKey, Ring, ShardState
from lora_gateway.v1 import inference_pb2 as pb
from lora_gateway.v1.admin_pb2 import ExplainRouteRequest
from lora_gateway.v1.admin_pb2_grpc import AdminStub
from lora_gateway.v1.inference_pb2_grpc import InferenceStub
from tests.e2e.gateway_process import GatewayProcess

NAMES = ("shard-0", "shard-1")
SPREAD = ("8", "9", "10", "11", "14", "17")
"""Adapters of the folder of sources; the ring puts some on each shard."""
STALL_TIMEOUT_S = 10
"""After which a silent engine of the gateway with two shards is killed: on a busy machine one that
lives may be silent for seconds."""
OPTIONS = [("grpc.use_local_subchannel_pool", 1)]
"""A connection for each channel: the kernel spreads them over the workers."""


def homes(adapters: Iterable[str]) -> dict[str, str]:
    """The shard that the ring names for each adapter while both are up."""
    ring = Ring(dict.fromkeys(NAMES, ShardState.UP))
    return {name: ring.ranked(AdapterKey("default", name))[0] for name in adapters}


async def ask(
    address: str, adapter: str = "", *, max_tokens: int = 8, timeout_s: float = 120.0
) -> pb.GenerateResponse:
    """One greedy answer."""
    request = pb.GenerateRequest(
        text="Once upon a time",
        adapter=adapter,
        sampling=pb.SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True),
    )
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        return await InferenceStub(channel).Generate(request, timeout=timeout_s)


async def ask_often(address: str, adapter: str, count: int) -> list[pb.GenerateResponse]:
    """Answers to `count` calls at once."""
    return await asyncio.gather(*(ask(address, adapter) for _ in range(count)))


async def own_shards(address: str, adapter: str) -> set[str]:
    """The shards that are an adapter's own now: its home, and others while it is hot."""
    request = ExplainRouteRequest(adapter=adapter)
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        told = await AdminStub(channel).ExplainRoute(request, timeout=30)
    return {c.shard for worker in told.workers for c in worker.candidates[: worker.replicas]}


class Stream:
    """One stream on a connection of its own, which runs until it ends by itself."""

    def __init__(self, address: str, adapter: str, *, max_tokens: int = 800) -> None:
        self.adapter = adapter
        self.shard = ""
        """Who serves it, once it has a token."""
        self.tokens = 0
        self.ended_s = 0.0
        """When it ended, on the monotonic clock."""
        self.longest_gap_s = 0.0
        """Between two messages."""
        self.error: grpc.aio.AioRpcError | None = None
        self.has_token = asyncio.Event()
        self._request = pb.GenerateRequest(
            text="A long story",
            adapter=adapter,
            sampling=pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=1),
        )
        self._address = address
        self.done = asyncio.create_task(self._run())

    @property
    def finished(self) -> bool:
        """Whether it came to its end."""
        return self.error is None and self.done.done()

    async def _run(self) -> None:
        kind, last_s = None, time.monotonic()
        try:
            async with grpc.aio.insecure_channel(self._address, options=OPTIONS) as channel:
                async for event in InferenceStub(channel).GenerateStream(
                    self._request, timeout=480
                ):
                    now_s = time.monotonic()
                    if kind is not None:
                        self.longest_gap_s = max(self.longest_gap_s, now_s - last_s)
                    kind, last_s = event.WhichOneof("event"), now_s
                    if kind == "started":
                        self.shard = event.started.served_by.shard
                        self.has_token.set()
                    self.tokens += kind == "delta"
                assert kind == "finished", "an OK that is not the whole answer"
        except grpc.aio.AioRpcError as error:
            self.error = error
        self.ended_s = time.monotonic()
        self.has_token.set()


def core_of(gateway: GatewayProcess, shard: str) -> psutil.Process:
    """The process of a shard's core that was started last."""
    pids = re.findall(rf"{shard} runs in process (\d+)", gateway.log)
    return psutil.Process(int(pids[-1]))


async def loop_lags(gateway: GatewayProcess, until: asyncio.Event) -> list[float]:
    """The worst lag of any worker's event loop in each second, until the event is set."""
    lags: list[float] = []
    while not until.is_set():
        lags += await asyncio.to_thread(gateway.metrics, "gateway_event_loop_lag_seconds")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(until.wait(), 1.0)
    return lags


def is_gone(process: psutil.Process) -> bool:
    """Whether it has ended, collected by its parent or not."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def restarts(gateway: GatewayProcess, shard: str) -> int:
    """How often a shard has come up again until now."""
    return len(re.findall(rf"{shard} is up again after", gateway.log))


async def until_up(gateway: GatewayProcess, shard: str, restarts: int, timeout_s: float) -> float:
    """Wait until a shard was started again so often in all; returns the seconds that it took the
    last time, as the gateway tells."""
    line = await asyncio.to_thread(
        gateway.wait_log, rf"{shard} is up again after (\S+) s", timeout_s, count=restarts
    )
    return float(line.group(1))
