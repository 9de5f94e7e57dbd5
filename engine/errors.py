"""What can go wrong at the engine's seam.

    EngineError
    ├── ModelNotFound            --model names nothing that can be served
    ├── CoreFailed               an engine core did not start, or died
    ├── SlotsUsedUp              a core has no client slot left for another process
    ├── InvalidRequest           the caller's fault; carries every violation found
    │   ├── PromptMissing
    │   ├── PromptTooLong
    │   ├── InvalidStructuredOutput
    │   ├── ChatTemplateRefused
    │   └── PoisonRequest        it crashed an engine twice
    ├── ChatTemplateMissing      the base model has no chat template
    ├── AdapterInvalid           refused by validation
    │   ├── ProbeFailed          refused for its answers in the engine
    │   ├── TrialFailed          refused by what its kind of source has to pass besides
    │   └── AdapterNotChecked    it could not be checked; it may be as good as any
    ├── AdapterNotFound
    │   └── VersionNotFound
    ├── AdapterNotReady          it exists, and cannot answer
    ├── AdapterLoadFailed        it is READY, and could not be loaded
    ├── AdapterQuarantined       it is READY, and crashed an engine twice
    ├── ShardUnavailable         the engine died, or aborted the request unasked
    └── GenerationFailed         the engine failed this one request

`gateway/errors.py` maps each to a status; nothing here knows gRPC. Messages are
for callers: they say what to do, and hold no internals.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice


class EngineError(Exception):
    """Base of everything that this package raises on purpose."""


class ModelNotFound(EngineError):
    """`--model` is no built-in name, no model folder and no hub id."""


class CoreFailed(EngineError):
    """An engine core did not start, or died. The message names the cause if known."""


class SlotsUsedUp(EngineError):
    """A core has no client slot left for another process; it serves those that it has."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing that is wrong with a request."""

    field: str
    """Path of the request field, for example `sampling.top_p`."""
    description: str
    """What is wrong and what would be right."""


MAX_VIOLATIONS = 16
MAX_DESCRIPTION_BYTES = 200
"""They travel in response trailers, and a client's gRPC refuses trailers of over 8 KiB."""


def _short(text: str) -> str:
    return text.encode()[:MAX_DESCRIPTION_BYTES].decode(errors="ignore")


class InvalidRequest(EngineError):
    """The request breaks its contract. Catch it to tell the caller all violations at once.

    Keeps the first MAX_VIOLATIONS. The text is the first one's, with how many more there are.
    """

    def __init__(self, *violations: Violation, metadata: dict[str, str] | None = None) -> None:
        self.violations: Sequence[Violation] = [
            Violation(_short(v.field), _short(v.description)) for v in violations[:MAX_VIOLATIONS]
        ]
        first = self.violations[0]
        more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
        super().__init__(f"{first.field}: {first.description}{more}")
        self.metadata = metadata or {}


class PromptMissing(InvalidRequest):
    """There is no prompt, or it holds nothing."""


class PromptTooLong(InvalidRequest):
    """The prompt leaves no room for an answer."""


class InvalidStructuredOutput(InvalidRequest):
    """The structured output constraint cannot be compiled."""


class ChatTemplateRefused(InvalidRequest):
    """The model's chat template raised on these messages."""


def _moment(time_s: float) -> str:
    """RFC 3339, to the second."""
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class PoisonRequest(InvalidRequest):
    """An engine crashed twice while it computed this request."""

    def __init__(self, fingerprint: int, until_s: float) -> None:
        """`until_s` is in seconds since the epoch."""
        self.until = _moment(until_s)
        super().__init__(
            Violation(
                "prompt",
                "an engine crashed twice while it computed this request; it is refused until "
                f"{self.until}; send another prompt or other sampling, and tell the operator",
            ),
            metadata={"fingerprint": f"{fingerprint:016x}", "until": self.until},
        )


class ChatTemplateMissing(EngineError):
    """Chat was asked of a base model that has no chat template."""

    def __init__(self, base_model: str) -> None:
        super().__init__(
            f"{base_model} has no chat template; send the prompt as `text` or `token_ids`"
        )
        self.base_model = base_model


class AdapterInvalid(EngineError):
    """An adapter was refused: `findings` are sentences that say what is wrong and what to do."""

    def __init__(self, adapter: str, findings: Sequence[str], version: int = 0) -> None:
        super().__init__(f"adapter {adapter!r} cannot be served: " + "; ".join(findings))
        self.adapter = adapter
        self.findings = tuple(findings)
        self.version = version
        """The number that it had got; 0 if none."""


class ProbeFailed(AdapterInvalid):
    """Its answers in the engine are of no use."""


class TrialFailed(AdapterInvalid):
    """It does not pass what versions of its kind of source have to pass."""


class AdapterNotChecked(AdapterInvalid):
    """It could not be checked to the end, and `findings` say why: the same again may pass."""


MAX_NAMES = 10
"""Names that an error lists; there may be thousands."""


class AdapterNotFound(EngineError):
    """There is no adapter of that name."""

    def __init__(self, adapter: str, served: Collection[str]) -> None:
        known = ", ".join(islice(served, MAX_NAMES)) or "none"
        more = len(served) - MAX_NAMES
        super().__init__(
            f"adapter {adapter!r} is unknown; served here: {known}"
            + (f" and {more} more" if more > 0 else "")
        )
        self.adapter = adapter


class VersionNotFound(AdapterNotFound):
    """The adapter is there, but has no READY version of that number."""

    def __init__(self, adapter: str, version: int, ready: Collection[int]) -> None:
        known = ", ".join(str(v) for v in sorted(ready)[-MAX_NAMES:]) or "none"
        EngineError.__init__(
            self, f"adapter {adapter!r} has no READY version {version}; READY here: {known}"
        )
        self.adapter = adapter
        self.version = version


class AdapterNotReady(EngineError):
    """The adapter is there, but no version of it has traffic."""

    def __init__(self, adapter: str, ready: Collection[int]) -> None:
        known = ", ".join(str(v) for v in sorted(ready)[-MAX_NAMES:])
        advice = (
            f"name one ({known}), or give one traffic with PromoteVersion"
            if ready
            else "none is READY yet: GetAdapterVersion tells its state"
        )
        super().__init__(f"no version of adapter {adapter!r} has traffic; {advice}")
        self.adapter = adapter


class LoadFault(enum.Enum):
    """What kept a version from being loaded; the values are a metric's label."""

    ENGINE = "engine"
    """The engine refused it."""
    FILES = "files"
    """Our copy of its files is gone, or is not what it was."""
    STATE = "state"
    """It is READY no more."""
    SHARD = "shard"
    """The shard died, or did not answer."""
    OTHER = "other"
    """The gateway failed, and logged why."""


class AdapterLoadFailed(EngineError):
    """A version that passed its checks could not be loaded. Other versions are not touched."""

    def __init__(
        self, adapter: str, version: int, reason: str, fault: LoadFault = LoadFault.OTHER
    ) -> None:
        super().__init__(f"version {version} of adapter {adapter!r} cannot be loaded: {reason}")
        self.adapter = adapter
        self.version = version
        self.reason = reason
        self.fault = fault


class AdapterQuarantined(EngineError):
    """An engine crashed twice on requests of this version. Other versions are not touched."""

    def __init__(self, adapter: str, version: int, until_s: float, left_s: float) -> None:
        """`until_s` is in seconds since the epoch, which is in `left_s`."""
        self.until = _moment(until_s)
        super().__init__(
            f"an engine crashed twice on requests of version {version} of adapter {adapter!r}; it "
            f"is refused until {self.until}; name another version, or roll the adapter back"
        )
        self.adapter = adapter
        self.version = version
        self.left_s = left_s


class CrashPart(enum.Enum):
    """What a request has to do with its engine's death."""

    NONE = "none"
    SUSPECT = "suspect"
    """It was computed, among others, when the engine crashed."""
    ALONE = "alone"
    """Nothing else was, or nothing else that was new to the engine."""


class ShardUnavailable(EngineError):
    """The engine that runs or should run the request is dead, or aborted it unasked."""

    def __init__(self, shard: str, part: CrashPart = CrashPart.NONE) -> None:
        super().__init__(f"{shard} is not available; retry")
        self.shard = shard
        self.part = part


class GenerationFailed(EngineError):
    """The engine failed this one request, and goes on with the others."""
