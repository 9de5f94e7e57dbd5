"""One time that a shard's device is lent, as keeper and lender agree on it."""

from __future__ import annotations

import asyncio


class Loan:
    """To be made on the event loop of both."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.begun: asyncio.Future[bool] = loop.create_future()
        """Done when the core has let go of the device; whether it sleeps, or has ended."""
        self.over = asyncio.Event()
        """Set when the device is the shard's again."""
        self.ended: asyncio.Future[None] = loop.create_future()
        """Done when the shard is up again."""
