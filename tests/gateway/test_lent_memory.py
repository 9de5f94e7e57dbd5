"""A GPU is taken back when its memory is free again, and not waited for without an end."""

from __future__ import annotations

import asyncio

import pytest

from gateway import lent_memory as module
from gateway.lent_memory import LentMemory
from trainer.devices import CPU, Device, DeviceFacts
from trainer.errors import TrainingUnavailable

GIB = 1024**3
GPU = Device("0")


class Gpu:
    """What `nvidia-smi` would say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free_bytes = 70 * GIB
        self.answers = True
        self.asked = 0
        monkeypatch.setattr(module, "device_facts", self._facts)
        monkeypatch.setattr(module, "POLL_S", 0.01)

    def _facts(self, device: Device) -> DeviceFacts:
        self.asked += 1
        if not self.answers:
            raise TrainingUnavailable("it does not answer")
        return DeviceFacts(80 * GIB, self.free_bytes, bfloat16=True)


async def test_what_a_job_found_free_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, memory = Gpu(monkeypatch), LentMemory()
    await memory.let_in(GPU)
    gpu.free_bytes = 2 * GIB
    await memory.let_in(GPU)  # another job, which finds less
    waiting = asyncio.create_task(memory.until_free())
    await asyncio.sleep(0.1)
    assert not waiting.done()
    gpu.free_bytes = 70 * GIB - 100
    await asyncio.wait_for(waiting, 5.0)


async def test_it_is_not_waited_for_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, memory = Gpu(monkeypatch), LentMemory()
    monkeypatch.setattr(module, "FREE_TIMEOUT_S", 0.1)
    await memory.let_in(GPU)
    gpu.free_bytes = 2 * GIB
    await asyncio.wait_for(memory.until_free(), 5.0)
    gpu.answers = False
    await asyncio.wait_for(memory.until_free(), 5.0)


async def test_the_cpu_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, memory = Gpu(monkeypatch), LentMemory()
    await memory.let_in(Device(CPU))
    await memory.until_free()
    assert not gpu.asked
