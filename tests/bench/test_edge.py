"""The benchmark of the edge runs what it says, and believes no call that went wrong."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from gateway.run_dir import run_dir
from lora_gateway.v1.inference_pb2_grpc import InferenceStub
from tests.bench.client import request_of
from tests.bench.edge import CallsFailed, _check
from tests.bench.edge_side import EdgeSide, Tally
from tests.bench.workload import Workload

if TYPE_CHECKING:
    from lora_gateway.v1.inference_pb2_grpc import InferenceStub as SyncInferenceStub

TOKENS = 32
CONNECTIONS = 16
"""Two workers both get some: that one gets none is one case in 30,000."""


def tally(tokens: int, **codes: int) -> Tally:
    return Tally(codes, tokens, outputs=0, open=0, processor_s=0.0, uss_bytes=0)


def test_workers_share_a_port_and_count_what_they_streamed(tmp_path: Path) -> None:
    request = request_of(Workload((1, 2, 3), "", 1, 1, TOKENS))
    with run_dir() as metrics:
        side = EdgeSide(tmp_path, metrics, workers=2, shards=2, step_s=0.001)
        with closing(side):
            for number in range(CONNECTIONS):
                options = [("grpc.use_local_subchannel_pool", 1), ("number", number)]
                with grpc.insecure_channel(side.address, options) as channel:
                    stub: SyncInferenceStub = InferenceStub(channel)
                    events = list(stub.GenerateStream(request))
                assert events[-1].finished.usage.completion_tokens == TOKENS
            tallies = side.wait_idle()
    assert sum(one.good for one in tallies) == CONNECTIONS
    assert min(one.good for one in tallies) > 0
    assert sum(one.tokens for one in tallies) == CONNECTIONS * TOKENS
    assert all(one.good <= one.outputs <= one.good * TOKENS for one in tallies)


def test_calls_that_were_cut_at_the_end_are_no_failures() -> None:
    before, after = tally(TOKENS, OK=1), tally(4 * TOKENS, OK=4, CANCELLED=2)
    _check([before], [after], in_flight=2)


@pytest.mark.parametrize(
    "after",
    [
        tally(3 * TOKENS, OK=4),
        tally(4 * TOKENS, OK=4, CANCELLED=3),
        tally(4 * TOKENS, OK=4, INTERNAL=1),
    ],
    ids=["too few tokens", "too many cut", "an error"],
)
def test_other_ends_are_told(after: Tally) -> None:
    with pytest.raises(CallsFailed):
        _check([tally(TOKENS, OK=1)], [after], in_flight=2)
