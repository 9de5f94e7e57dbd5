"""What reading a dataset found."""

from __future__ import annotations

import enum
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from trainer.spec import DatasetFormat

MAX_ISSUES = 10_000
"""That are kept of each kind; a caller may ask for fewer."""


class LineIssueCode(enum.Enum):
    """What may be wrong with a line; values are names of the contract."""

    EMPTY = "EMPTY"
    NOT_UTF8 = "NOT_UTF8"
    NOT_JSON = "NOT_JSON"
    NOT_OBJECT = "NOT_OBJECT"
    TOO_LONG = "TOO_LONG"
    FIELD_MISSING = "FIELD_MISSING"
    WRONG_TYPE = "WRONG_TYPE"
    WRONG_ROLE = "WRONG_ROLE"
    NO_TARGET = "NO_TARGET"
    TEMPLATE_REFUSED = "TEMPLATE_REFUSED"
    MASK_UNSTABLE = "MASK_UNSTABLE"
    DOUBLE_BOS = "DOUBLE_BOS"


class Part(BaseModel):
    """Base of the parts of a report."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LineIssue(Part):
    """Why one line is no row."""

    line: int
    """From 1."""
    code: LineIssueCode
    field: str
    """For example `messages[2].role`; empty: the line."""
    message: str


class LengthBucket(Part):
    """Counts rows by length."""

    up_to: int
    """Tokens; a power of two."""
    rows: int


class TokenStatistics(Part):
    """Lengths of rows, in tokens."""

    total: int = 0
    trained: int = 0
    mean: float = 0.0
    p50: int = 0
    p95: int = 0
    max: int = 0
    histogram: tuple[LengthBucket, ...] = ()
    """Without empty buckets."""


class DatasetReport(Part):
    """What reading a dataset found; lists hold at most MAX_ISSUES entries."""

    valid: bool
    reasons: tuple[str, ...] = ()
    """Why it is not valid, and what to do."""
    format: DatasetFormat | None = None
    """None: no line told."""
    total_lines: int = 0
    bad_lines: int = 0
    issues: tuple[LineIssue, ...] = ()
    issue_counts: Mapping[LineIssueCode, int] = {}
    rows: int = 0
    overlength_rows: int = 0
    overlength_lines: tuple[int, ...] = ()
    truncated_rows: int = 0
    duplicate_rows: int = 0
    duplicate_lines: tuple[int, ...] = ()
    untrained_rows: int = 0
    tokens: TokenStatistics = TokenStatistics()
