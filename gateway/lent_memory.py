"""Memory of the GPUs that a shard has lent: what it left to the job, and when that is back.

A training process that has ended may hold its GPU's memory for a moment still, and an engine that
is woken up before then fails for the lack of it. The CPU has memory for both.
"""

from __future__ import annotations

import asyncio
import logging

from trainer.devices import MIB, Device, device_facts
from trainer.errors import TrainingUnavailable

logger = logging.getLogger(__name__)

FREE_TIMEOUT_S = 30.0
POLL_S = 0.5
SLACK_BYTES = 512 * MIB
"""Of what was free that may be missing; the engine left more than that to others."""


class LentMemory:
    """Of one loan."""

    def __init__(self) -> None:
        self._free_bytes: dict[Device, int] = {}
        """What was free when a job was let in."""

    async def free_bytes(self, device: Device) -> int:
        """What is free now of a GPU; 0 if that cannot be told, and of the CPU."""
        if not device.on_gpu:
            return 0
        try:
            return (await asyncio.to_thread(device_facts, device)).memory_available_bytes
        except TrainingUnavailable as error:
            logger.warning("%s", error)
            return 0

    async def let_in(self, device: Device) -> None:
        """Note what a job finds free."""
        if device not in self._free_bytes:
            self._free_bytes[device] = await self.free_bytes(device)

    async def until_free(self) -> None:
        """Wait until as much is free again, but not for ever: others may have taken it."""
        try:
            async with asyncio.timeout(FREE_TIMEOUT_S):
                for device, was_bytes in self._free_bytes.items():
                    while 0 < await self.free_bytes(device) < was_bytes - SLACK_BYTES:  # noqa: ASYNC110
                        await asyncio.sleep(POLL_S)
        except TimeoutError:
            logger.error("a GPU that was lent does not have the memory back that it had")
