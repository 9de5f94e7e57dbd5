"""The stream of an upload: one header, then chunks, written as they come.

Adapters and datasets are sent alike; what the header says is theirs. An upload bears one thread at
a time, which cannot be cancelled: each ends before a cancellation counts.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable
from typing import Any

from engine.errors import InvalidRequest, Violation
from engine.shelf import to_its_end
from gateway.adapter_codec import MAX_CHUNK_BYTES
from store.uploads import Upload

UPLOAD_IDLE_S = 60.0
"""How long an upload may say nothing. What came is kept."""


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
            await to_its_end(functools.partial(upload.write, chunk.offset, chunk.data))
        await to_its_end(upload.finish)
    finally:
        await to_its_end(upload.close)


async def _opened(open_upload: Callable[[], Upload]) -> Upload:
    """The upload, to be closed by the caller; if it is cancelled nobody else could."""
    opened: list[Upload] = []
    try:
        await to_its_end(lambda: opened.append(open_upload()))
    except asyncio.CancelledError:
        for upload in opened:
            await to_its_end(upload.close)
        raise
    return opened[0]


async def _next(requests: AsyncIterator[Any]) -> Any:
    try:
        async with asyncio.timeout(UPLOAD_IDLE_S):
            return await anext(requests, None)
    except TimeoutError:
        raise InvalidRequest(
            Violation("chunk", f"nothing came for {UPLOAD_IDLE_S:g} s; go on with the upload later")
        ) from None
