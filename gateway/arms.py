"""How requests ended, told by workers to the host, and remembered there by version.

    worker: Call ends -> Outcome -> Reporter --batches--> host: Arms -> comparison, guard

Nothing of it is stored: the memory begins with the gateway's start, and is bounded.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.call import Call

OK = "OK"
"""Code of a request that was answered to its end."""

MAX_ARM_OUTCOMES = 10_000
MAX_ARMS = 1_000
MAX_OUTCOMES = 1_000_000
"""Over all arms: some 430 MB."""
MAX_REQUESTS = 100_000
"""Whose arm is known."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one request of an adapter version ended."""

    tenant: str
    adapter: str
    version: int
    request_id: str
    code: str
    """Name of the status code, for example `OK`."""
    end_s: float
    """When it ended, in seconds since the epoch."""
    ttft_s: float | None
    """From arrival to the first token; None if none came."""
    total_s: float
    """From arrival to the last token if it ended OK, else to the end."""
    prompt_tokens: int
    completion_tokens: int
    inter_token_s: float | None
    """Between the tokens of a completion, on average; None unless a second one came."""
    finish_reasons: tuple[str, ...]
    """Of the completions that ended."""

    @classmethod
    def of(cls, call: Call, code: str, end_monotonic_s: float) -> Outcome:
        """The outcome of a call that an adapter version answered, or was to."""
        assert call.adapter is not None, "a version was resolved, so its adapter was"
        first_s, last_s = call.first_token_s, call.last_token_s
        done_s = last_s if code == OK and last_s is not None else end_monotonic_s
        return cls(
            tenant=call.principal.tenant,
            adapter=call.adapter,
            version=call.version,
            request_id=call.request_id,
            code=code,
            end_s=time.time() - (time.monotonic() - end_monotonic_s),
            ttft_s=None if first_s is None else first_s - call.started_s,
            total_s=done_s - call.started_s,
            prompt_tokens=call.prompt_tokens,
            completion_tokens=call.completion_tokens,
            inter_token_s=_inter_token_s(call),
            finish_reasons=call.finish_reasons,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle: several times as fast as its own way with frozen dataclasses."""
        return _received, (
            self.tenant,
            self.adapter,
            self.version,
            self.request_id,
            self.code,
            self.end_s,
            self.ttft_s,
            self.total_s,
            self.prompt_tokens,
            self.completion_tokens,
            self.inter_token_s,
            self.finish_reasons,
        )


class Arms:
    """The host's memory of outcomes. Of one event loop; reads copy.

    Keeps the newest 10,000 of each arm (a version of an adapter of a tenant). Beyond 1,000 arms
    the one that has been idle longest is forgotten, beyond 1,000,000 outcomes its oldest ones.
    """

    def __init__(self) -> None:
        self.since_s = time.time()
        """Begin of the memory, in seconds since the epoch."""
        self._arms: OrderedDict[tuple[str, str, int], deque[Outcome]] = OrderedDict()
        """By the time of the newest outcome."""
        self._kept = 0
        self._requests: OrderedDict[tuple[str, str], Outcome] = OrderedDict()

    def record(self, outcomes: Iterable[Outcome]) -> None:
        """Remember requests that ended, the oldest first."""
        for outcome in outcomes:
            arm = self._arm(outcome)
            if len(arm) >= MAX_ARM_OUTCOMES:
                arm.popleft()
                self._kept -= 1
            arm.append(outcome)
            self._kept += 1
            self._forget_idle()
            request = outcome.tenant, outcome.request_id
            self._requests[request] = outcome
            self._requests.move_to_end(request)
            if len(self._requests) > MAX_REQUESTS:
                self._requests.popitem(last=False)

    def arm_of(self, tenant: str, request_id: str) -> tuple[str, int] | None:
        """Adapter and version of a request; None unless it is among the newest 100,000."""
        outcome = self._requests.get((tenant, request_id))
        return None if outcome is None else (outcome.adapter, outcome.version)

    def outcomes(
        self, tenant: str, adapter: str, version: int, since_s: float = 0.0
    ) -> list[Outcome]:
        """What is remembered of a version and ended at `since_s` (since the epoch) or later."""
        arm = self._arms.get((tenant, adapter, version), ())
        return [outcome for outcome in arm if outcome.end_s >= since_s]

    def newest(
        self, tenant: str, adapter: str, version: int, *, since_s: float, limit: int
    ) -> list[Outcome]:
        """At most `limit` outcomes of a version, back to `since_s` (since the epoch), the newest
        first. Costs no more than it returns."""
        arm = self._arms.get((tenant, adapter, version), ())
        lately = itertools.takewhile(lambda outcome: outcome.end_s >= since_s, reversed(arm))
        return list(itertools.islice(lately, limit))

    def versions(self, tenant: str, adapter: str) -> list[int]:
        """Versions of which anything is remembered, in ascending order."""
        return sorted(
            version for of, name, version in self._arms if (of, name) == (tenant, adapter)
        )

    def _arm(self, outcome: Outcome) -> deque[Outcome]:
        """The arm of an outcome, as the one that was used last."""
        key = outcome.tenant, outcome.adapter, outcome.version
        arm = self._arms.get(key)
        if arm is None:
            arm = self._arms[key] = deque()
        else:
            self._arms.move_to_end(key)
        return arm

    def _forget_idle(self) -> None:
        if len(self._arms) > MAX_ARMS:
            self._kept -= len(self._arms.popitem(last=False)[1])
        while self._kept > MAX_OUTCOMES:
            key, idle = next(iter(self._arms.items()))
            idle.popleft()
            self._kept -= 1
            if not idle:
                del self._arms[key]


class Reporter:
    """A worker's side: collects outcomes, and sends them on in batches."""

    def __init__(
        self,
        send: Callable[[Sequence[Outcome]], None],
        interval_s: float = 0.25,
        max_batch: int = 256,
    ) -> None:
        """`send` gets each batch for its own. It must not wait, because calls would."""
        self._send = send
        self._interval_s = interval_s
        self._max_batch = max_batch
        self._batch: list[Outcome] = []

    def record(self, outcome: Outcome) -> None:
        """Take one outcome, to be sent with its batch. A full batch is sent at once."""
        self._batch.append(outcome)
        if len(self._batch) >= self._max_batch:
            self.flush()

    def flush(self) -> None:
        """Send what is collected. The owner calls it last of all."""
        if self._batch:
            batch, self._batch = self._batch, []
            self._send(batch)

    async def run(self) -> None:
        """Send what is collected after each interval, until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s)
            self.flush()


def _received(
    tenant: str,
    adapter: str,
    version: int,
    request_id: str,
    code: str,
    end_s: float,
    ttft_s: float | None,
    total_s: float,
    prompt_tokens: int,
    completion_tokens: int,
    inter_token_s: float | None,
    finish_reasons: tuple[str, ...],
) -> Outcome:
    """An outcome out of a pickle; it shares its names with those that came before."""
    return Outcome(
        sys.intern(tenant),
        sys.intern(adapter),
        version,
        request_id,
        sys.intern(code),
        end_s,
        ttft_s,
        total_s,
        prompt_tokens,
        completion_tokens,
        inter_token_s,
        tuple(map(sys.intern, finish_reasons)),
    )


def _inter_token_s(call: Call) -> float | None:
    if call.first_token_s is None or call.last_token_s is None:
        return None
    # Completions of one request come side by side. One that was cut off has no finish reason.
    completions = max(1, len(call.finish_reasons))
    steps = call.completion_tokens / completions - 1
    return (call.last_token_s - call.first_token_s) / steps if steps > 0 else None
