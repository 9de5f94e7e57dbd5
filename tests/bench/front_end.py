"""The front ends that are compared: each a way to ask an engine core, all cores alike."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

from tests.bench.workload import Round, Workload


class Kind(StrEnum):
    """Which front end, in the words of the tables."""

    GENERATE = "AsyncLLM.generate"
    ADD_REQUEST = "AsyncLLM.add_request"
    GATEWAY = "gateway"
    PYTHON_HTTP = "vLLM Python HTTP"
    RUST_HTTP = "vLLM Rust HTTP"


class FrontEnd(Protocol):
    """One of them, up and waiting."""

    @property
    def kind(self) -> Kind:
        """Which it is."""

    def serves(self, adapter: str) -> bool:
        """Whether it can answer with this adapter; empty for the base model."""

    def round(self, workload: Workload) -> Round:
        """Run the workload for throughput. Raises LoadFailed or CallsFailed if any call did not
        end well with all its tokens."""

    def first_tokens(self, workload: Workload) -> list[float]:
        """Run the workload one request at a time; seconds to each first token. Raises CallsFailed
        as `round`."""

    def text(self, workload: Workload) -> str:
        """The answer to one request of the workload."""


class CallsFailed(Exception):
    """Calls or tokens were counted other than were asked for."""


def check_tokens(workload: Workload, tokens: int) -> None:
    """Raises CallsFailed unless these are the tokens of all requests."""
    if tokens != (asked := workload.requests * workload.tokens):
        raise CallsFailed(f"{tokens} tokens came of {asked}")
