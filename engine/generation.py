"""What goes into a shard and what comes out of it.

The edge builds these from protobuf and back (`gateway/codec.py`); a shard builds
vLLM's types from them and back (`engine/shard.py`). Sampling parameters have no
type of their own: they travel as keyword arguments of `vllm.SamplingParams`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that the assistant continues, oldest turn first."""

    messages: Sequence[ChatMessage]


Prompt = str | Sequence[int] | Chat
"""Text, token ids, or a conversation."""


class VersionKey(NamedTuple):
    """Names one version of an adapter, over all tenants."""

    tenant: str
    adapter: str
    version: int


class Load(NamedTuple):
    """What an engine core has to do at one moment, for all of its clients."""

    running: int
    """Requests in the batch."""
    waiting: int
    """Requests that are not in it yet."""
    deferred: int
    """Of those that wait, the ones for which adapters of the batch leave no room."""
    kv_cache_usage: float
    """Share of the KV cache that is in use, 0 to 1."""


@dataclass(frozen=True, slots=True)
class ServedVersion:
    """One version of an adapter, as a shard loads it and names it to vLLM."""

    tenant: str
    adapter: str
    version: int
    lora_int_id: int
    """Identifies the version to vLLM; minted by the registry, never used again."""
    path: str
    """Folder of our own immutable copy, named by its digest."""
    digest: str

    @property
    def key(self) -> VersionKey:
        """Which version this is."""
        return VersionKey(self.tenant, self.adapter, self.version)

    @property
    def lora_name(self) -> str:
        """vLLM compares adapters by this name alone (vllm/lora/request.py:56)."""
        return lora_name_of(self.key)


def lora_name_of(key: VersionKey) -> str:
    """The name of a version to vLLM."""
    return f"{key.tenant}/{key.adapter}@{key.version}"


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One call, after decoding and before rendering."""

    request_id: str
    """Unique in this gateway; the engine aborts by it."""
    prompt: Prompt
    sampling: Mapping[str, Any]
    """Keyword arguments of `vllm.SamplingParams`; only what the caller set."""
    stream: bool
    """True: deltas as they come. False: one output at the end."""
    tokens_per_delta: int = 1
    """Tokens gathered before a delta, when streaming."""
    cache_salt: str = ""
    """Keeps one tenant's prefix cache from another's; empty for none."""
    trace_headers: Mapping[str, str] | None = None
    """W3C trace context, so that the engine's span joins the caller's trace."""
    accountable: bool = True
    """Whether it is a suspect when its engine crashes. A warm-up is not: no shard could start."""


class FinishReason(enum.Enum):
    """Why a completion ended."""

    STOP = "stop"
    LENGTH = "length"
    REPETITION = "repetition"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability of one token at one position."""

    token_id: int
    logprob: float
    rank: int
    """Place by likelihood, 1 is the likeliest; 0 is unknown."""
    token: str


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """Log probabilities at one position."""

    chosen: TokenLogprob | None
    """The token that stands there; None for a prompt's first token."""
    top: Sequence[TokenLogprob]


@dataclass(slots=True)
class Delta:
    """What one completion gained, and at its end why it ended."""

    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop: int | str | None = None
    """The stop id or stop string that matched, if one did."""


@dataclass(slots=True)
class Output:
    """One thing that a shard yields: deltas of one or more completions."""

    deltas: Sequence[Delta]
    finished: bool
    prompt_tokens: int
    cached_tokens: int
    queue_s: float = 0.0
    """Time in the engine's queue until first scheduled."""
    scheduled_s: float = 0.0
    """When it was first scheduled, on the machine's monotonic clock; 0: not known."""
    decode_s: float = 0.0
    """Time between the first and the last token so far."""
    prompt_logprobs: Sequence[PositionLogprobs] = field(default_factory=tuple)
    """On the first output only, when asked for."""
