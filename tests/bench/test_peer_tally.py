from tests.bench.peer_tally import PeerTally

PAGE = """\
# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="base"} 1640.0
# HELP vllm:generation_tokens_created Number of generation tokens processed.
# TYPE vllm:generation_tokens_created gauge
vllm:generation_tokens_created{engine="0",model_name="base"} 1.7643e+09
# HELP vllm:request_success_total Count of successfully processed requests.
# TYPE vllm:request_success_total counter
vllm:request_success_total{engine="0",finished_reason="stop",model_name="base"} 1.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="base"} 51.0
vllm:request_success_total{engine="0",finished_reason="abort",model_name="base"} 2.0
"""


def test_only_requests_that_ended_by_their_length_are_good() -> None:
    assert PeerTally.of(PAGE) == PeerTally(good=51, other=3, tokens=1640)


def test_a_tally_is_told_since_another() -> None:
    before = PeerTally(good=50, other=3, tokens=1608)
    assert PeerTally.of(PAGE).since(before) == PeerTally(good=1, other=0, tokens=32)


def test_counters_come_with_what_they_count() -> None:
    assert PeerTally.of("") == PeerTally(good=0, other=0, tokens=0)
