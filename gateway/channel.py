"""The pipe between host and worker. What goes through it: `gateway/messages.py`."""

from __future__ import annotations

import asyncio
import os
import pickle
import struct
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Generic, TypeVar

Sent = TypeVar("Sent")
Received = TypeVar("Received")

_LENGTH = struct.Struct("!I")
_READ_BYTES = 256 * 1024


class Channel(Generic[Sent, Received]):
    """One end of a pipe between host and worker, on the event loop.

    Neither side waits for the other: what the pipe does not take yet is kept here, so a worker
    that is stopped cannot stop its host. A worker learns of its host's death by the end of
    the pipe.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection  # owns the descriptor
        self._descriptor = connection.fileno()
        self._loop = asyncio.get_running_loop()
        self._outgoing = bytearray()
        self._incoming = bytearray()
        self._received: asyncio.Queue[Received | None] = asyncio.Queue()
        os.set_blocking(self._descriptor, False)
        self._loop.add_reader(self._descriptor, self._read)

    def send(self, message: Sent) -> None:
        """Send one message. Silent if the other side is gone: its end is seen elsewhere."""
        if self._connection.closed:
            return
        # Not pickle itself: sockets travel too.
        content = ForkingPickler.dumps(message)
        idle = not self._outgoing
        self._outgoing += _LENGTH.pack(len(content))
        self._outgoing += content
        if idle:
            self._write()

    async def receive(self) -> Received | None:
        """The next message; None when the other side is gone."""
        return await self._received.get()

    def _write(self) -> None:
        try:
            while self._outgoing:
                del self._outgoing[: os.write(self._descriptor, self._outgoing)]
        except BlockingIOError:
            self._loop.add_writer(self._descriptor, self._write)
            return
        except (BrokenPipeError, ConnectionResetError):
            self._outgoing.clear()
        self._loop.remove_writer(self._descriptor)

    def _read(self) -> None:
        try:
            chunk = os.read(self._descriptor, _READ_BYTES)
        except BlockingIOError:
            return
        except ConnectionResetError:
            chunk = b""
        if not chunk:
            self.close()
            return
        self._incoming += chunk
        while len(self._incoming) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._incoming)[0]
            if len(self._incoming) < end:
                return
            content = bytes(self._incoming[_LENGTH.size : end])
            del self._incoming[:end]
            self._received.put_nowait(pickle.loads(content))

    def close(self) -> None:
        """Close this end. Safe to call twice."""
        if not self._connection.closed:
            self._loop.remove_reader(self._descriptor)
            self._loop.remove_writer(self._descriptor)
            self._connection.close()
            self._received.put_nowait(None)
