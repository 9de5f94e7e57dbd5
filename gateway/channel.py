"""What host and workers tell each other, and the pipe that carries it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Generic, TypeVar

from engine.base_model import ModelFingerprints
from engine.core import ClientSlot
from engine.pool import ServedView
from gateway.settings import Settings


@dataclass(frozen=True, slots=True)
class Orders:
    """Host: attach to these cores, bind the public address, take calls."""

    slots: Sequence[ClientSlot]
    listen: str
    """The public address with the port that the host holds."""
    settings: Settings
    fingerprints: ModelFingerprints
    view: ServedView


@dataclass(frozen=True, slots=True)
class ShowView:
    """Host: this is what is served from now on."""

    view: ServedView


@dataclass(frozen=True, slots=True)
class Drain:
    """Host: announce NOT_SERVING, refuse new calls, let running ones finish, then exit."""

    delay_s: float
    grace_s: float


@dataclass(frozen=True, slots=True)
class ShardDied:
    """Host: the core of this shard is gone; end what ran on it."""

    shard: str


@dataclass(frozen=True, slots=True)
class Imported:
    """Worker: imports are done; `Orders` are followed at once now."""


@dataclass(frozen=True, slots=True)
class Serving:
    """Worker: taking calls."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Worker: could not serve, and exits. The message is one line for people."""

    message: str


Sent = TypeVar("Sent")
Received = TypeVar("Received")

HostMessage = Orders | ShowView | Drain | ShardDied
WorkerMessage = Imported | Serving | Failed


class Channel(Generic[Sent, Received]):
    """One end of a pipe between host and worker, on the event loop.

    Messages are small and sent whole, so neither side blocks the other for long. A worker
    learns of its host's death by the end of this pipe.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._received: asyncio.Queue[Received | None] = asyncio.Queue()
        asyncio.get_running_loop().add_reader(connection.fileno(), self._read)

    def send(self, message: Sent) -> None:
        """Send one message. Silent if the other side is gone: its end is seen elsewhere."""
        try:
            self._connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            return

    async def receive(self) -> Received | None:
        """The next message; None when the other side is gone."""
        return await self._received.get()

    def _read(self) -> None:
        try:
            self._received.put_nowait(self._connection.recv())
        except (EOFError, ConnectionResetError):
            self.close()

    def close(self) -> None:
        """Close this end. Safe to call twice."""
        if not self._connection.closed:
            asyncio.get_running_loop().remove_reader(self._connection.fileno())
            self._connection.close()
            self._received.put_nowait(None)
