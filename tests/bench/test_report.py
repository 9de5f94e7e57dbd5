import json
import re

from tests.bench.comparison import FirstTokens, Throughput
from tests.bench.front_end import Kind
from tests.bench.machine import Machine
from tests.bench.report import Report
from tests.bench.workload import ADAPTER, Workload

MACHINE = Machine("a processor", 2, 0.5, "0.32.0", "1.85.1", "3.11.7")
IDS = (1, 2, 3)


def throughput(adapter: str, in_flight: int, text: str = "a") -> Throughput:
    rates = {Kind.GENERATE: [200.0, 210.0, 190.0], Kind.GATEWAY: [150.0, 160.0, 140.0]}
    if not adapter:
        rates[Kind.RUST_HTTP] = [300.0, 300.0, 300.0]
    texts = {kind: text if kind == Kind.RUST_HTTP else "a" for kind in rates}
    return Throughput(Workload(IDS, adapter, 4, in_flight, 8), rates, texts)


def report(*throughputs: Throughput) -> Report:
    blocks_s = {Kind.GENERATE: [[0.010, 0.011], [0.012, 0.011]], Kind.GATEWAY: [[0.012] * 2] * 2}
    return Report(
        machine=MACHINE,
        model="tiny-1layer",
        dtype="float32",
        workers=1,
        connections=1,
        throughputs=throughputs,
        first_tokens=[FirstTokens("text", Workload("a", "", 2, 1, 8), blocks_s)],
        absent={Kind.RUST_HTTP: "it has no adapters"},
    )


WHOLE = report(
    throughput(ADAPTER, 1), throughput(ADAPTER, 128), throughput("", 1), throughput("", 128)
)


def lines(text: str, beginning: str) -> list[str]:
    return [
        re.sub(r" +", " ", line).strip()
        for line in text.splitlines()
        if line.strip().startswith(beginning)
    ]


def test_each_side_has_a_line_with_its_rates_and_what_the_gateway_does_over_it() -> None:
    cell = "200 (190 to 210) 0.75"
    text = WHOLE.text()
    with_adapter, without, first_token = lines(text, "AsyncLLM.generate ")
    assert with_adapter == without == f"AsyncLLM.generate {cell} {cell}"
    assert first_token == "AsyncLLM.generate 11.00 ms +1.00"
    assert lines(text, "gateway ")[:2] == ["gateway 150 (140 to 160) 150 (140 to 160)"] * 2


def test_a_side_without_the_adapter_has_no_line_there_and_is_explained() -> None:
    text = WHOLE.text()
    assert lines(text, "vLLM Rust HTTP ") == [
        "vLLM Rust HTTP 300 (300 to 300) 0.50 300 (300 to 300) 0.50"
    ]
    assert "vLLM Rust HTTP: it has no adapters" in text


def test_answers_that_differ_are_told_with_the_side_that_gave_them() -> None:
    cases = throughput("", 1, "b"), throughput("", 32), throughput("", 128, "b")
    assert "of the 3 cases were the same on all sides, but for vLLM Rust HTTP in 2." in (
        report(*cases).text()
    )
    assert "of each case were the same on all sides." in report(throughput("", 128)).text()


def test_targets_are_rows() -> None:
    (row,) = lines(
        WHOLE.text(), "streaming, with adapter, 128 in flight: gateway : AsyncLLM.generate"
    )
    assert row.endswith("0.75 (0.74 to 0.76) >= 0.95 missed by 0.200")


def test_all_figures_can_be_written_down() -> None:
    raw = json.loads(json.dumps(WHOLE.raw()))
    assert raw["throughputs"][1]["requests_per_s"]["gateway"] == [150.0, 160.0, 140.0]
    assert raw["medians"][1] == {
        "streaming": True,
        "adapter": ADAPTER,
        "in_flight": 128,
        "requests_per_s": {"AsyncLLM.generate": 200.0, "gateway": 150.0},
    }
    assert raw["targets"][0]["verdict"] == "missed by 0.200"
