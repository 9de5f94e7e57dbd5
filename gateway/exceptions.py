"""What goes wrong at the edge itself; what the engine and the store raise is theirs."""

from __future__ import annotations

from collections.abc import Iterable

from google.rpc import status_pb2


class MalformedMessage(Exception):
    """The request's bytes are no message of the method's type."""

    def __init__(self, message_type: str) -> None:
        super().__init__(
            f"the request is no valid {message_type}: generate the client from the current "
            ".proto files and send strings as UTF-8"
        )
        self.message_type = message_type


class DefaultDeadlineExceeded(Exception):
    """The server's default deadline ended; the client had set none."""

    def __init__(self, deadline_s: float) -> None:
        super().__init__(
            f"took longer than the server's default deadline of {deadline_s:g} s; "
            "set a deadline on the call to choose your own"
        )
        self.deadline_s = deadline_s


class ControlPlaneUnavailable(Exception):
    """The host does not answer."""

    def __init__(self) -> None:
        super().__init__(
            "the gateway's control plane does not answer; inference may still be served, retry"
        )


class RequestNotFound(Exception):
    """Feedback for a request that nobody remembers."""

    def __init__(self, request_id: str) -> None:
        super().__init__(
            f"no adapter answered a request {request_id[:64]!r} lately; send feedback soon after "
            "the answer, with its request_id"
        )
        self.request_id = request_id


class SequenceUnknown(Exception):
    """A watcher has seen events that are not in this registry."""

    def __init__(self, newest: int) -> None:
        super().__init__(
            f"after_sequence is above the newest event, {newest}: it belongs to another state "
            "folder; watch from 0"
        )
        self.newest = newest


class ShardUnknown(Exception):
    """There is no shard of that name."""

    def __init__(self, shard: str, names: Iterable[str]) -> None:
        super().__init__(f"there is no shard {shard[:64]!r}; there are: {', '.join(names)}")
        self.shard = shard


class LastOpenShard(Exception):
    """Without this shard nobody would answer."""

    def __init__(self, shard: str) -> None:
        super().__init__(
            f"no shard but {shard} takes requests, so it cannot be drained: resume another one, "
            "wait until one is up, or stop the gateway with SIGTERM, which drains it whole"
        )
        self.shard = shard


class LoopbackOnly(Exception):
    """A service for callers on this machine, asked from elsewhere."""

    def __init__(self, service: str) -> None:
        super().__init__(
            f"{service} is answered to callers on the gateway's own machine alone: call it there, "
            "by a loopback address"
        )
        self.service = service


class Relayed(Exception):
    """A status that another process of the gateway made already."""

    def __init__(self, status: status_pb2.Status) -> None:
        super().__init__(status.message)
        self.status = status
