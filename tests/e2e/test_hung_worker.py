"""A worker that is stopped has slots and places that others wait for: so long, and no longer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import grpc
import pytest

from lora_gateway.v1 import adapters_pb2, inference_pb2
from lora_gateway.v1.adapters_pb2_grpc import AdaptersStub
from lora_gateway.v1.inference_pb2_grpc import InferenceStub
from tests.e2e.gateway_process import gateway_process
from tests.e2e.shard_calls import OPTIONS, Stream, ask

STALL_TIMEOUT_S = 15.0
"""On a busy machine a worker that lives may be silent for seconds."""
TIMEOUT_S = 120.0
SERVED = HELD, OTHER = ("1", "2")
"""Adapters of the folder of sources."""

pytestmark = [pytest.mark.timeout(500), pytest.mark.slow]


async def test_a_turn_and_an_unload_wait_for_a_stopped_worker_until_it_is_ended(
    sources: Path, tmp_path: Path
) -> None:
    flags = ["--max-loras", "1", "--worker-stall-timeout-s", f"{STALL_TIMEOUT_S:g}"]
    served = {name: sources / name for name in SERVED}
    async with contextlib.AsyncExitStack() as stack:
        gateway = stack.enter_context(
            gateway_process(tmp_path, workers=2, adapters=served, extra=flags)
        )
        channels = []  # to both workers: the kernel gives new ones to a stopped worker, too
        for _ in range(16):
            channel = grpc.aio.insecure_channel(gateway.address, options=OPTIONS)
            channels.append(await stack.enter_async_context(channel))
            await channel.channel_ready()
        # Streams on both have the only slot.
        streams = [Stream(gateway.address, HELD, max_tokens=600) for _ in range(16)]
        for stream in streams:
            await stream.has_token.wait()
        hung, alive = gateway.serving_workers()
        os.kill(hung, signal.SIGSTOP)
        stopped_s = time.monotonic()
        turns = [ended(generate(channel)) for channel in channels[:8]]
        unloads = [ended(unload(channel)) for channel in channels[8:]]
        waiting = asyncio.gather(*turns, *unloads)
        line = rf"worker {hung} has not answered for {STALL_TIMEOUT_S:g} s: killed"
        await asyncio.to_thread(gateway.wait_log, line, TIMEOUT_S)
        killed_s = time.monotonic()
        assert killed_s - stopped_s >= STALL_TIMEOUT_S - 1.0, "a question was on its way"
        ends = await waiting
        for of_kind in (ends[:8], ends[8:]):
            done = [end_s for end_s, error in of_kind if error is None]
            assert done and min(done) > stopped_s + STALL_TIMEOUT_S - 1.0, "they had to wait"
            for _, error in of_kind:
                assert error is None or error.code() is grpc.StatusCode.UNAVAILABLE, error
        last_s = max(end_s for end_s, _ in ends) - killed_s
        print(f"killed after {killed_s - stopped_s:.1f} s; all was done {last_s:.1f} s later")
        for stream in streams:
            await stream.done
        assert any(stream.finished for stream in streams), "the other worker's went on"
        failed = [stream.error for stream in streams if stream.error is not None]
        assert failed and all(e.code() is grpc.StatusCode.UNAVAILABLE for e in failed)
        async with asyncio.timeout(TIMEOUT_S):
            while gateway.metrics("gateway_workers", state="serving") != [2.0]:
                await asyncio.sleep(0.2)
        workers = gateway.serving_workers()
        assert alive in workers and hung not in workers
        for name in SERVED:
            assert (await ask(gateway.address, name, timeout_s=TIMEOUT_S)).completions[0].text
        assert gateway.metrics("gateway_worker_stalls_total") == [1.0]


async def generate(channel: grpc.aio.Channel) -> None:
    """One answer of the adapter that has no slot."""
    sampling = inference_pb2.SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    request = inference_pb2.GenerateRequest(text="A turn", adapter=OTHER, sampling=sampling)
    await InferenceStub(channel).Generate(request, timeout=TIMEOUT_S)


async def unload(channel: grpc.aio.Channel) -> None:
    """Have the adapter leave that has the slot."""
    request = adapters_pb2.UnloadAdapterVersionRequest(adapter=HELD, version=1)
    await AdaptersStub(channel).UnloadAdapterVersion(request, timeout=TIMEOUT_S)


async def ended(
    call: Coroutine[Any, Any, None],
) -> tuple[float, grpc.aio.AioRpcError | None]:
    """When a call ended, on the monotonic clock, and its error."""
    error = None
    try:
        await call
    except grpc.aio.AioRpcError as raised:
        error = raised
    return time.monotonic(), error
