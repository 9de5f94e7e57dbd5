"""One call as its caller saw it."""

from __future__ import annotations

from dataclasses import dataclass

OK, UNAVAILABLE = "OK", "UNAVAILABLE"


@dataclass(slots=True)
class CallRecord:
    """What was asked, and how it ended. Times are of the monotonic clock."""

    adapter: str
    """Empty: the base model."""
    stream: bool
    asked_tokens: int
    deadline_s: float
    """From its start."""
    started_s: float
    ended_s: float | None = None
    """None: it has not ended."""
    code: str = ""
    """Name of the status."""
    reason: str = ""
    """Of its ErrorInfo; empty: the status came without one."""
    finished: bool = False
    """Whether the answer came with its end: `finished` of a stream, a finish reason else."""
    tokens: int = 0
    """That came, counted one by one."""
    text: str = ""

    @property
    def outcome(self) -> str:
        """How it ended, in a word or two."""
        if self.ended_s is None:
            return "did not end"
        if self.code == UNAVAILABLE:
            return f"UNAVAILABLE, {self.reason or 'connection broke'}"
        return self.code if self.code == OK else f"{self.code} {self.reason}".strip()
