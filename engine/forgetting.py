"""Waiting until the core has forgotten what a process ran on an adapter."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

CORE_POLL_S = 0.01
"""Pause before the core is asked again whether it still knows a request that was aborted."""


async def until_forgotten(in_core: Callable[[int], Awaitable[int]], lora_int_id: int) -> None:
    """A request that was aborted here is known to the core until it has read the abort. Asked
    through our own socket, the core answers after that. `in_core` counts what it knows."""
    try:
        while await in_core(lora_int_id):  # noqa: ASYNC110  it tells no one
            await asyncio.sleep(CORE_POLL_S)
    except Exception as error:  # whatever it is, the host must not wait for ever
        logger.warning("the core does not answer about adapter %d: %s", lora_int_id, error)
