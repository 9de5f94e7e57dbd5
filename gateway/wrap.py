"""What every RPC of ours goes through, in one place.

    bytes in -> Call opened, span started -> admission -> message parsed -> servicer
    -> messages out -> exception to status -> metrics and span closed

Handlers stay plain: coroutines for unary answers, async generators for streams. grpc.aio does
not close an async generator whose RPC is cancelled during a write (server.pyx), so
streams are driven here, inside `aclosing`: the engine request is aborted at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, status_pb2
from grpc_status import rpc_status

from gateway import metrics
from gateway.admission import Admission, Draining, Overloaded
from gateway.call import Call, Principal, set_current_call
from gateway.errors import status_of
from gateway.exceptions import DefaultDeadlineExceeded, MalformedMessage
from gateway.tracing import Tracing

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic in its stubs alone


HEAR_OUT_S = 2.0
"""How long an upload that has its answer is read on; 4 GiB are not waited for."""


def _anyone(context: Context) -> Principal:
    return Principal()


@dataclass(frozen=True, slots=True)
class Edge:
    """What all calls of a server share."""

    admission: Admission
    tracing: Tracing
    unary_deadline_s: float
    stream_deadline_s: float
    ended: Callable[[Call, str, float], None]
    """Told of each call that ended: with its code, and when on the monotonic clock."""
    principal: Callable[[Context], Principal] = _anyone
    """Who calls."""
    patient: frozenset[str] = frozenset()
    """Methods without a default deadline: they take as long as what they wait for."""
    running: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    """Entered while a call runs."""

    def deadline_s(self, method: str, *, streams: bool) -> float | None:
        """Default deadline of a method, in seconds."""
        if method in self.patient:
            return None
        return self.stream_deadline_s if streams else self.unary_deadline_s


class EdgeInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the handlers of our own services; health and reflection stay as they are."""

    def __init__(self, edge: Edge, services: tuple[str, ...]) -> None:
        self._edge = edge
        self._prefixes = tuple(f"/{service}/" for service in services)
        self._wrapped: dict[str, Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        path = handler_call_details.method
        if (wrapped := self._wrapped.get(path)) is not None:
            return wrapped
        handler = await continuation(handler_call_details)
        if handler is None or not path.startswith(self._prefixes):
            return handler
        return self._wrapped.setdefault(path, wrap(handler, path.rpartition("/")[2], self._edge))


def wrap(handler: Any, method: str, edge: Edge) -> Handler:
    """The handler with the edge around it. Takes raw bytes, so that parsing is ours too:
    grpc.aio itself answers a message that does not parse with UNKNOWN and its own internals."""
    parse = handler.request_deserializer
    streams = handler.response_streaming or handler.request_streaming
    deadline_s = edge.deadline_s(method, streams=streams)

    async def unary(raw: bytes, context: Context) -> Message:
        async with open_call(method, context, edge, deadline_s):
            return await handler.unary_unary(_parsed(raw, parse), context)  # type: ignore[no-any-return]

    async def upload(raws: AsyncIterator[bytes], context: Context) -> Message:
        async with open_call(method, context, edge, deadline_s):
            parsed = (_parsed(raw, parse) async for raw in raws)
            try:
                answer: Message = await handler.stream_unary(parsed, context)
            except Exception:
                await _hear_out(raws)
                raise
            await _hear_out(raws)
            return answer

    async def stream(raw: bytes, context: Context) -> None:
        async with open_call(method, context, edge, deadline_s) as call:
            events: AsyncGenerator[Message, None] = handler.unary_stream(
                _parsed(raw, parse), context
            )
            async with contextlib.aclosing(events):
                async for event in events:
                    await write(call, context, event)

    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(
            upload, response_serializer=handler.response_serializer
        )
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(
            stream, response_serializer=handler.response_serializer
        )
    return grpc.unary_unary_rpc_method_handler(
        unary, response_serializer=handler.response_serializer
    )


async def _hear_out(raws: AsyncIterator[bytes]) -> None:
    """Read what a caller still sends, for a moment, before a status ends the call: grpc.aio's
    client puts its own INTERNAL in place of a status that meets a message in flight
    (grpc/aio/_call.py, set_internal_error)."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(HEAR_OUT_S):
            async for _ in raws:
                pass


async def write(call: Call, context: Context, message: Any) -> None:
    """Send one message of a stream."""
    call.writing_since_s = time.monotonic()
    if call.first_write is None:
        call.first_write = asyncio.ensure_future(context.write(message))
        call.first_write.add_done_callback(_retrieve)
        await asyncio.shield(call.first_write)
    else:
        await context.write(message)
    call.writing_since_s = None


def _retrieve(write: asyncio.Future[None]) -> None:
    """Look at a write's error, which a cancelled call no longer does."""
    if not write.cancelled():
        write.exception()


def _parsed(raw: bytes, parse: Callable[[bytes], Message]) -> Message:
    try:
        return parse(raw)
    except DecodeError:
        # `parse` is FromString of the request class, bound by the generated code.
        message_type = getattr(parse, "__self__", None)
        raise MalformedMessage(
            message_type.DESCRIPTOR.full_name if message_type is not None else "message"
        ) from None


@contextlib.asynccontextmanager
async def open_call(
    method: str, context: Context, edge: Edge, default_deadline_s: float | None
) -> AsyncIterator[Call]:
    """Run the body as one call: tracked, timed, and every way out turned into a status."""
    call = Call(method, edge.principal(context))
    set_current_call(call)
    span = edge.tracing.start(call, context.invocation_metadata() or ())
    code = "OK"
    running = contextlib.ExitStack()
    running.enter_context(edge.running())
    try:
        # grpc ends the call itself when a client's deadline passes; ours is for those without.
        own_deadline_s = default_deadline_s if context.time_remaining() is None else None
        with edge.admission.track(call):
            try:
                async with asyncio.timeout(own_deadline_s) as deadline:
                    yield call
            except TimeoutError:
                if not deadline.expired():
                    raise
                assert own_deadline_s is not None
                raise DefaultDeadlineExceeded(own_deadline_s) from None
    except asyncio.CancelledError as cancelled:
        task = asyncio.current_task()
        assert task is not None
        if call.cut_by is None and task.cancelling() > 0:
            code = "CANCELLED"  # by the client, its deadline, or a lost connection
            raise
        if call.cut_by is not None:
            task.uncancel()
        # With nobody having cancelled us an inner task died. grpc would send no status at
        # all then, and the client would wait for its deadline (grpc#29248).
        status = status_of(call.cut_by or cancelled, call)
        code = code_pb2.Code.Name(status.code)
        await _abort(context, call, status, cancelled)
    except Exception as error:
        if isinstance(error, Overloaded | Draining):
            metrics.observe_shed(error.shed)
        status = status_of(error, call)
        code = code_pb2.Code.Name(status.code)
        await _abort(context, call, status, error)
    finally:
        running.close()
        edge.ended(call, code, time.monotonic())
        edge.tracing.end(span, call, code)


async def _abort(
    context: Context, call: Call, status: status_pb2.Status, cause: BaseException
) -> None:
    """End the call with `status`. Always raises grpc's AbortError; nothing else calls abort."""
    if status.code == code_pb2.INTERNAL:
        logger.error("request %s (%s) failed", call.request_id, call.method, exc_info=cause)
    if call.first_write is not None:
        await asyncio.wait((call.first_write,))
    rich = rpc_status.to_status(status)
    await context.abort(rich.code, rich.details, rich.trailing_metadata)
