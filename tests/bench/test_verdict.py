import pytest

from tests.bench.comparison import FirstTokens, Throughput
from tests.bench.front_end import Kind
from tests.bench.verdict import TARGETS, Verdict, verdicts
from tests.bench.workload import ADAPTER, Workload


def throughput(streaming: bool, adapter: bool, in_flight: int, **rates: list[float]) -> Throughput:
    workload = Workload((1,), ADAPTER if adapter else "", 4, in_flight, 8, streaming)
    by_kind = {Kind[name.upper()]: series for name, series in rates.items()}
    return Throughput(workload, by_kind, dict.fromkeys(by_kind, "a"))


def row(what: str, *throughputs: Throughput) -> Verdict:
    (found,) = (v for v in verdicts(throughputs, []) if v.what.startswith(what))
    return found


FIRST = "streaming, with adapter, 128 in flight: gateway : AsyncLLM.generate"


@pytest.mark.parametrize(
    ("gateway", "met", "verdict"),
    [([95.0, 96.0, 90.0], True, "met"), ([94.0, 99.0, 91.0], False, "missed by 0.010")],
)
def test_a_ratio_is_one_of_medians(gateway: list[float], met: bool, verdict: str) -> None:
    measured = throughput(True, True, 128, generate=[100.0, 120.0, 90.0], gateway=gateway)
    found = row(FIRST, measured)
    assert (found.met, found.verdict) == (met, verdict)


def test_the_spread_is_that_of_turns() -> None:
    measured = throughput(
        True, True, 128, generate=[100.0, 120.0, 90.0], gateway=[95.0, 96.0, 90.0]
    )
    assert row(FIRST, measured).found == "0.95 (0.80 to 1.00)"


def test_cases_with_fewer_in_flight_or_of_another_kind_are_not_judged() -> None:
    rates = {"generate": [1.0] * 3, "gateway": [1.0] * 3}
    others = [
        throughput(True, True, 32, **rates),
        throughput(True, False, 128, **rates),
        throughput(False, True, 128, **rates),
    ]
    found = row(FIRST, *others)
    assert (found.met, found.verdict) == (None, "not measured")


def test_a_peer_that_is_not_there_is_named() -> None:
    measured = throughput(False, False, 128, generate=[1.0], gateway=[1.0])
    found = row("unary, without adapter, 128 in flight: gateway : vLLM Rust HTTP", measured)
    assert (found.met, found.verdict) == (None, "not known: no vLLM Rust HTTP here")


def test_what_is_aimed_at_is_reported_and_not_judged() -> None:
    measured = throughput(False, False, 128, rust_http=[100.0], gateway=[50.0])
    found = row("unary, without adapter, 128 in flight: gateway : vLLM Rust HTTP", measured)
    assert (found.met, found.target, found.verdict) == (None, "aim 1.00", "missed by 0.500")


@pytest.mark.parametrize(
    ("gateway_s", "met", "verdict"),
    [(0.01065, True, "met"), (0.01200, False, "missed by 1.30 ms")],
)
def test_first_tokens_may_come_a_little_later(gateway_s: float, met: bool, verdict: str) -> None:
    blocks_s = {Kind.GENERATE: [[0.010] * 3] * 2, Kind.GATEWAY: [[gateway_s] * 3] * 2}
    timed = FirstTokens("text", Workload("a", "", 3, 1, 8), blocks_s)
    *_, found = verdicts([], [timed])
    assert (found.met, found.verdict) == (met, verdict)
    assert found.found == "{0:.2f} ({0:.2f} to {0:.2f}) ms".format((gateway_s - 0.010) * 1000)
    assert found.what == "first token, text, one in flight: gateway - AsyncLLM.generate"


def test_every_target_has_a_row() -> None:
    assert len(list(verdicts([], []))) == len(TARGETS)
