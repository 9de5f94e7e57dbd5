"""The checks of `make chaos` can fail: scripted histories, one fault in each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.chaos.blow import Blow, BlowKind
from tests.chaos.call import CallRecord
from tests.chaos.census import Census
from tests.chaos.verdict import judge_blows, judge_calls, judge_censuses, judge_gauges

GOLDEN = {("", 4): "once", ("tale", 4): "upon"}
CORE = Blow(BlowKind.CORE_KILLED, "shard-0", at_s=100.0, whole_s=120.0)
STOPPED = Blow(BlowKind.CORE_STOPPED, "shard-1", at_s=200.0, whole_s=230.0)
WORKER = Blow(BlowKind.WORKER_KILLED, "worker 17", at_s=300.0, whole_s=302.0)
BLOWS = [CORE, STOPPED, WORKER]

GOOD = CallRecord(
    *("tale", True, 4, 60.0, 101.0, 103.0), code="OK", finished=True, tokens=4, text="upon"
)
HIT = CallRecord(*("", False, 4, 60.0, 99.0, 100.1), code="UNAVAILABLE", reason="SHARD_UNAVAILABLE")
CUT = CallRecord(*("", True, 4, 60.0, 299.0, 300.1), code="UNAVAILABLE", tokens=2, text="on")


def findings(*calls: CallRecord) -> list[str]:
    return [*judge_calls(calls, BLOWS, GOLDEN)]


def test_a_history_without_a_fault_has_no_finding() -> None:
    assert not findings(GOOD, HIT, CUT)


@pytest.mark.parametrize(
    ("call", "finding"),
    [
        (replace(GOOD, ended_s=None), "hung"),
        (replace(GOOD, ended_s=101.0 + 60.0 + 2.1), "hung"),
        (replace(HIT, started_s=30.0), "hung"),
        (replace(GOOD, tokens=3), "truncated OK: 3 tokens of 4"),
        (replace(GOOD, finished=False), "truncated OK: it has no end"),
        (replace(GOOD, text="once"), "truncated OK: another text"),
        (replace(GOOD, adapter="", text="upon"), "truncated OK: another text"),
        (replace(HIT, code="INTERNAL", reason="INTERNAL"), "INTERNAL: not a code"),
        (replace(HIT, code="DEADLINE_EXCEEDED"), "not a code"),
        (replace(HIT, reason="DRAINING"), "not a reason"),
        (replace(HIT, started_s=122.1, ended_s=123.0), "no core was hit"),
        (replace(HIT, started_s=98.0, ended_s=99.9), "no core was hit"),
        (replace(HIT, started_s=300.0, ended_s=301.0), "no core was hit"),
        (replace(CUT, started_s=304.1, ended_s=305.0), "no worker was hit"),
        (replace(CUT, started_s=100.0, ended_s=101.0), "no worker was hit"),
    ],
)
def test_a_fault_of_a_call_is_found(call: CallRecord, finding: str) -> None:
    (found,) = findings(GOOD, call, HIT)
    assert finding in found and found.startswith("call 1")


def test_a_gateway_that_is_never_whole_again_explains_what_fails_later() -> None:
    """It is a finding by itself, once."""
    never = replace(CORE, whole_s=None)
    late = replace(HIT, started_s=400.0, ended_s=401.0)
    assert not [*judge_calls([late], [never], GOLDEN)]
    assert [*judge_blows([never, WORKER])] == ["core SIGKILL of shard-0: never whole again"]


def census() -> Census:
    return Census(
        processes=Counter({"host": 1, "core": 2, "gateway worker": 3}),
        descriptors={1: Counter({"socket:[N]": 9, "/dev/null": 1}), 17: Counter({"socket:[N]": 5})},
    )


def test_the_same_count_is_no_finding_and_a_worker_that_is_new_is_none() -> None:
    last = census()
    last.descriptors = {1: last.descriptors[1], 18: Counter({"socket:[N]": 6})}
    assert not [*judge_censuses([census(), census(), last])]


def one_core_too_many(last: Census) -> None:
    last.processes["core"] += 1


def one_worker_too_few(last: Census) -> None:
    last.processes["gateway worker"] -= 1


def an_orphan(last: Census) -> None:
    last.strays = ["4711 VLLM::EngineCore"]


def a_socket_of_the_host(last: Census) -> None:
    last.descriptors[1]["socket:[N]"] += 1


def a_file_of_a_worker(last: Census) -> None:
    last.descriptors[17]["/tmp/leak"] += 1


@pytest.mark.parametrize(
    ("leak", "finding"),
    [
        (one_core_too_many, "processes: core 2 -> 3"),
        (one_worker_too_few, "processes: gateway worker 3 -> 2"),
        (an_orphan, "a process that nobody has: 4711 VLLM::EngineCore"),
        (a_socket_of_the_host, "descriptors of process 1: socket:[N] 9 -> 10"),
        (a_file_of_a_worker, "descriptors of process 17: /tmp/leak 0 -> 1"),
    ],
)
def test_what_leaks_is_found(leak: Callable[[Census], None], finding: str) -> None:
    last = census()
    leak(last)
    assert [*judge_censuses([census(), last])] == [finding]


def test_a_leak_that_began_after_the_first_count_is_found() -> None:
    """A worker that took a dead one's place is compared with itself."""
    first, second, last = census(), census(), census()
    for later, sockets in ((second, 5), (last, 6)):
        later.descriptors = {**later.descriptors, 18: Counter({"socket:[N]": sockets})}
    assert [*judge_censuses([first, second, last])] == [
        "descriptors of process 18: socket:[N] 5 -> 6"
    ]


def test_a_gauge_that_is_not_back_to_zero_is_found() -> None:
    gauges = {"gateway_inflight_calls": 2.0, "vllm:num_requests_waiting": 0.0}
    assert [*judge_gauges(gauges)] == ["gateway_inflight_calls is 2 while nothing runs"]
