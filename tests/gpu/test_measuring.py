"""The measuring on GPUs, as far as it needs none: turns, traces, flags, kernels to try."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.gpu import kernel_times, lora_kernels, measured_server
from tests.gpu.measured_engine import Load
from tests.gpu.turns import Turns


def test_turns_go_back_and_forth_and_leave_out_what_fails() -> None:
    order: list[str] = []

    def measured(name: str, figures: list[float]) -> float:
        order.append(name)
        return figures.pop()

    turns = Turns(time.monotonic() + 600)
    cells: dict[str, Callable[[], float]] = {
        "a": partial(measured, "a", [3.0, 1.0, 2.0]),
        "b": partial(measured, "b", [4.0]),
    }
    turns.run(cells, 3)
    assert order == ["a", "b", "b", "a", "a"], "b fails in the second round"
    assert turns.figures == {"a": [2.0, 1.0, 3.0], "b": [4.0]}
    assert (turns.median("a"), turns.best("a", "b", "c"), turns.median("c")) == (2.0, 4.0, None)


def test_no_turn_begins_after_the_end() -> None:
    turns = Turns(time.monotonic() - 1)
    turns.run({"a": lambda: 1.0}, 3)
    assert not turns.figures


@pytest.mark.parametrize(
    ("over", "verdict"), [(75.0, "0.750, target 0.75: met"), (74.0, "0.740, target 0.75: missed")]
)
def test_a_ratio_is_told_with_its_verdict(
    over: float, verdict: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Turns(0).ratio("tax", over, 100.0, 0.75)
    assert verdict in capsys.readouterr().out


def test_a_trace_is_added_up_by_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernels = [("_lora_expand_kernel", 0, 30), ("gemm", 40, 50), ("_lora_expand_kernel", 90, 10)]
    events = [
        {"cat": "kernel", "name": name, "ts": begin, "dur": took} for name, begin, took in kernels
    ]
    events += [{"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 900}, {"name": "metadata"}]
    trace = tmp_path / "rank0.pt.trace.json.gz"
    trace.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    assert kernel_times.newest(tmp_path, set()) == trace
    assert kernel_times.newest(tmp_path, {trace}) is None
    kernel_times.show("today", trace, steps=2)
    printed = capsys.readouterr().out.splitlines()
    assert "kernels 0.1 ms (0.90 of it), of that LoRA 0.0 ms" in printed[0]
    assert "25 us a step,    0.5 times,    50.0 us each  gemm" in printed[1]
    assert "20 us a step,    1.0 times,    20.0 us each  _lora_expand_kernel" in printed[2]
    assert len(printed) == 3


def test_arguments_become_flags_of_vllm() -> None:
    engine = {"load_format": "dummy", "enable_prefix_caching": False, "trust": True, "c": {"a": 1}}
    assert measured_server.as_flags(engine) == [
        *("--load-format", "dummy", "--no-enable-prefix-caching", "--trust", "--c", '{"a": 1}')
    ]


def test_counters_must_have_grown_by_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured_server, "COUNTED_S", 0.0)
    load = Load(4, 2, (1,), 3)
    measured_server.check(lambda: (9, 1, 25), (1, 1, 1), load)
    for counted in ((8, 1, 25), (9, 2, 25), (9, 1, 24)):
        with pytest.raises(measured_server.CallsFailed):
            measured_server.check(partial(tuple, counted), (1, 1, 1), load)


@pytest.mark.parametrize("rank", [8, 16, 32])
@pytest.mark.parametrize("op", ["shrink", "expand"])
def test_kernels_to_try_are_some_that_vllm_can_read(op: str, rank: int) -> None:
    """A dot product of Triton's has at least 16 on each side."""
    tried = list(lora_kernels.candidates(op, rank))
    assert len(tried) == len({json.dumps(config, sort_keys=True) for config in tried})
    sizes = {"block_m", "block_n", "block_k", "num_warps", "num_stages", "num_ctas", "max_nreg"}
    needed = sizes | ({"split_k", "group_size_m"} if op == "shrink" else set())
    for config in tried:
        assert config.keys() == needed
        assert min(config[f"block_{side}"] or 0 for side in "mnk") >= 16
