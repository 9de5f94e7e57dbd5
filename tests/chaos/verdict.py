"""What must hold after all blows. Each finding is a line; none is a pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from tests.chaos.blow import Blow
from tests.chaos.call import OK, UNAVAILABLE, CallRecord
from tests.chaos.census import Census

SLACK_S = 2.0
"""How long after its deadline a call may be told so."""
AFTERMATH_S = 2.0
"""How long after the gateway was whole again a client may notice a blow: it connects anew."""
TYPED = {"SHARD_UNAVAILABLE"}
"""Reasons with which calls may fail that a core's death has hit."""


def judge_calls(
    calls: Sequence[CallRecord], blows: Sequence[Blow], golden: Mapping[tuple[str, int], str]
) -> Iterator[str]:
    """Hung calls, truncated answers, and failures that nothing explains."""
    for number, call in enumerate(calls):
        name = f"call {number} ({call.adapter or 'base model'})"
        if call.ended_s is None or call.ended_s - call.started_s > call.deadline_s + SLACK_S:
            yield f"{name} hung: it did not end within its deadline"
        elif call.code == OK:
            if problem := _incomplete(call, golden[call.adapter, call.asked_tokens]):
                yield f"{name} is a truncated OK: {problem}"
        elif problem := _unexplained(call, blows):
            yield f"{name} ended with {call.outcome}: {problem}"


def _incomplete(call: CallRecord, golden: str) -> str | None:
    if not call.finished:
        return "it has no end"
    if call.tokens != call.asked_tokens:
        return f"{call.tokens} tokens of {call.asked_tokens}"
    return None if call.text == golden else "another text than without blows"


def _unexplained(call: CallRecord, blows: Sequence[Blow]) -> str | None:
    if call.code != UNAVAILABLE:
        return "not a code for what was done"
    if call.reason and call.reason not in TYPED:
        return "not a reason for what was done"
    # Without details only a connection breaks, and that a worker had.
    core = bool(call.reason)
    if any(blow.hits_core is core and _met(call, blow) for blow in blows):
        return None
    return f"no {'core' if core else 'worker'} was hit meanwhile"


def _met(call: CallRecord, blow: Blow) -> bool:
    assert call.ended_s is not None
    over_s = float("inf") if blow.whole_s is None else blow.whole_s + AFTERMATH_S
    return call.started_s <= over_s and call.ended_s >= blow.at_s


def judge_blows(blows: Sequence[Blow]) -> Iterator[str]:
    """Blows after which the gateway was not whole again."""
    for blow in blows:
        if blow.whole_s is None:
            yield f"{blow.kind.value} of {blow.target}: never whole again"


def judge_censuses(censuses: Sequence[Census]) -> Iterator[str]:
    """Processes and descriptors that are too many, or too few, at the end.

    A process that lived through blows is compared with itself, as it was first counted.
    """
    first, last = censuses[0], censuses[-1]
    if first.processes != last.processes:
        yield f"processes: {_changes(first.processes, last.processes)}"
    for stray in last.strays:
        yield f"a process that nobody has: {stray}"
    for pid, now in last.descriptors.items():
        counts = [census.descriptors[pid] for census in censuses if pid in census.descriptors]
        before = counts[0]
        if now.total() > before.total():
            yield f"descriptors of process {pid}: {_changes(before, now)}"


def _changes(before: Counter[str], after: Counter[str]) -> str:
    kinds = sorted(before.keys() | after.keys())
    return ", ".join(
        f"{kind} {before[kind]} -> {after[kind]}" for kind in kinds if before[kind] != after[kind]
    )


def judge_gauges(gauges: Mapping[str, float]) -> Iterator[str]:
    """What is not back to 0 when nothing runs."""
    for name, value in gauges.items():
        if value:
            yield f"{name} is {value:g} while nothing runs"
