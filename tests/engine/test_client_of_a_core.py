"""A client of a core, as vLLM makes it, without the core: what it leaves behind."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import zmq

from engine.core import ClientSlot, EngineOptions
from engine.models import resolve_model
from engine.screening import Screening
from engine.shard import VllmShard

SLOTS = 2


@pytest.fixture(scope="module")
def slots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ClientSlot]]:
    """Slots whose core does nothing but greet."""
    from vllm.v1.engine.utils import bind_engine_zmq_listeners

    config = EngineOptions(
        model_path=resolve_model("tiny", tmp_path_factory.mktemp("models")),
        served_model_name="tiny",
        dtype="float32",
        quantization=None,
        max_model_len=64,
        max_num_seqs=2,
        gpu_memory_utilization=0.5,
        max_loras=1,
        max_cpu_loras=1,
        max_lora_rank=8,
    ).build_config()
    with pytest.MonkeyPatch.context() as environment:  # what a test leaves, pytest removes
        environment.setenv("VLLM_RPC_BASE_PATH", str(tmp_path_factory.mktemp("sockets")))
        listeners = bind_engine_zmq_listeners(config, SLOTS)
    context = zmq.Context()
    slots, greeters = [], []
    for index in range(SLOTS):
        inputs, outputs = listeners.inputs[index], listeners.outputs[index]
        greeters.append(greeter := context.socket(zmq.DEALER))
        greeter.setsockopt(zmq.IDENTITY, (0).to_bytes(2, "little"))
        greeter.connect(inputs.address)
        greeter.send(b"")
        slots.append(
            ClientSlot(
                shard="shard-0",
                core_pid=psutil.Process().pid,
                index=index,
                count=SLOTS,
                input_address=inputs.address,
                output_address=outputs.address,
                input_listener=inputs.socket,
                output_listener=outputs.socket,
                config=config,
                record_path=Path(),
            )
        )
    yield slots
    for greeter in greeters:
        greeter.close(linger=0)
    context.term()
    listeners.cleanup()
    del listeners  # its finalizer must not run at interpreter exit


async def test_a_client_that_is_closed_leaves_no_descriptor_and_no_thread(
    slots: list[ClientSlot],
) -> None:
    """A worker has one after the other, of each core that dies."""
    counts = []
    for slot in slots:
        shard = VllmShard.attach(slot, Screening())
        await asyncio.sleep(0)  # what it runs on the loop begins
        slot.close()
        shard.close()
        shard.close()
        await asyncio.sleep(0.1)  # and ends
        counts.append((polled(), psutil.Process().num_threads()))
    assert counts[0] == counts[1], "what the first one opens, and stays, is not opened again"


def polled() -> int:
    """Descriptors that threads of ZeroMQ, and others, wait on. Not those of the slots."""
    return sum(
        os.readlink(path).startswith("anon_inode:")
        for path in Path("/proc/self/fd").iterdir()
        if path.is_symlink()  # the listing's own is gone
    )
