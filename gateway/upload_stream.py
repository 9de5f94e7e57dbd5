"""The stream of an upload: one header, then chunks, written as they come.

Adapters and datasets are sent alike; what the header says is theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from engine.errors import InvalidRequest, Violation
from gateway.adapter_codec import MAX_CHUNK_BYTES
from store.uploads import Upload

UPLOAD_IDLE_S = 60.0
"""How long an upload may say nothing. What came is kept."""

T = TypeVar("T")


async def read_header(requests: AsyncIterator[Any]) -> Any:
    """The header that opens the stream. Raises InvalidRequest if something else does."""
    request = await _next(requests)
    if request is None or request.WhichOneof("item") != "header":
        raise InvalidRequest(Violation("header", "must be the first message of an upload"))
    return request.header


async def receive(requests: AsyncIterator[Any], open_upload: Callable[[], Upload]) -> None:
    """Write the chunks that follow, to the end of the file.

    Raises InvalidRequest, and what opening, writing and finishing the upload raise; what came
    is kept.
    """
    upload = await _opened(open_upload)
    try:
        while (request := await _next(requests)) is not None:
            if request.WhichOneof("item") != "chunk":
                raise InvalidRequest(Violation("chunk", "is all that may follow the header"))
            chunk = request.chunk
            if not 1 <= len(chunk.data) <= MAX_CHUNK_BYTES:
                raise InvalidRequest(
                    Violation("chunk.data", f"must be 1 to {MAX_CHUNK_BYTES} bytes")
                )
            await _in_thread(upload.write, chunk.offset, chunk.data)
        await _in_thread(upload.finish)
    finally:
        await _in_thread(upload.close)


async def _opened(open_upload: Callable[[], Upload]) -> Upload:
    """The upload, to be closed by the caller; if it is cancelled nobody else could."""
    opened: list[Upload] = []
    try:
        await _in_thread(lambda: opened.append(open_upload()))
    except asyncio.CancelledError:
        for upload in opened:
            await _in_thread(upload.close)
        raise
    return opened[0]


async def _in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Run `function` in a thread, to its end: an upload bears one thread at a time, and a
    thread cannot be cancelled."""
    running = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():  # however often we are cancelled
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait((running,))
        raise


async def _next(requests: AsyncIterator[Any]) -> Any:
    try:
        async with asyncio.timeout(UPLOAD_IDLE_S):
            return await anext(requests, None)
    except TimeoutError:
        raise InvalidRequest(
            Violation("chunk", f"nothing came for {UPLOAD_IDLE_S:g} s; go on with the upload later")
        ) from None
