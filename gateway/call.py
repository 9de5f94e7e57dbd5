"""One RPC while it runs: who, which, since when, and what is known of it so far.

The edge (`gateway/wrap.py`) opens a Call for every RPC and keeps it in a context variable;
the servicer fills in what it learns; metrics, traces and errors read it.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

BASE_MODEL_LABEL = "(base)"
"""Stands for the base model where adapters are named; no adapter can be called that."""
UNRESOLVED_LABEL = "(none)"
"""Label of calls that failed before an adapter was found, and of those that need none."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls. One tenant for all until there is authentication."""

    tenant: str = "default"
    actor: str = ""
    """For the audit trail: the name in the client certificate, else the peer's address."""


@dataclass(slots=True, eq=False)
class Call:
    """The state of one RPC."""

    method: str
    """Bare method name, for example `GenerateStream`."""
    principal: Principal = field(default_factory=Principal)
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started_s: float = field(default_factory=time.monotonic)
    task: asyncio.Task[object] | None = field(default_factory=asyncio.current_task)
    trace_headers: Mapping[str, str] | None = None
    """W3C trace context of this call's span; None when tracing is off."""

    adapter: str | None = None
    """Name of the adapter once resolved, `(base)` for the base model; None: not resolved."""
    adapter_label: str = UNRESOLVED_LABEL
    """What the adapter is called in metrics, from its resolution to the end of the call."""
    version: int = 0
    shard: str = ""
    render_s: float = 0.0
    """How long the prompt was rendered and tokenized."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    """Tokens generated so far; on a stream, those handed to the writer."""
    scheduled_s: float = 0.0
    """When an engine first scheduled it, known with its first token; 0: not known."""
    first_token_s: float | None = None
    last_token_s: float | None = None
    itl_s: list[float] = field(default_factory=list)
    """Times between deltas that no metric has counted yet."""
    finish_reasons: tuple[str, ...] = ()
    """Of the completions that ended, in lower case."""
    writing_since_s: float | None = None
    """Since when a write waits for the client to read; None when none does."""
    first_write: asyncio.Future[None] | None = None
    """The write of a stream's first message, which carries the response headers: no status may
    overtake it, or grpc refuses the status and the client waits for ever."""
    cut_by: Exception | None = None
    """Set when the server itself ends the call before its time; the reason."""

    def cut(self, reason: Exception) -> None:
        """End this call from outside with `reason` as its error."""
        if self.cut_by is None and self.task is not None:
            self.cut_by = reason
            self.task.cancel()


_CURRENT: ContextVar[Call] = ContextVar("call")


def current_call() -> Call:
    """The call that this task serves. Raises LookupError outside of one."""
    return _CURRENT.get()


def set_current_call(call: Call) -> None:
    """Make `call` the current one of this task. For the edge alone."""
    _CURRENT.set(call)
