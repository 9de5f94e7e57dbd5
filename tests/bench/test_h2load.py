import pytest

from tests.bench.h2load import LoadFailed, round_of
from tests.bench.workload import Workload

WORKLOAD = Workload((1, 2), "", requests=512, in_flight=128, tokens=32)
PRINTED = """\
finished in 1.42s, 360.25 req/s, 1.26MB/s
requests: 512 total, 512 started, 512 done, 512 succeeded, 0 failed, 0 errored, 0 timeout
status codes: 512 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 1.79MB (1880064) total, 67.00KB (68608) headers (space savings 0.00%), 1.68MB data
"""


def test_a_round_is_timed_by_the_rate_which_has_more_digits_than_the_time() -> None:
    measured = round_of(PRINTED, WORKLOAD)
    assert measured.tokens == 512 * 32
    assert measured.seconds == pytest.approx(512 / 360.25)


@pytest.mark.parametrize(
    "printed",
    [
        PRINTED.replace("512 2xx, 0 3xx, 0 4xx, 0 5xx", "511 2xx, 0 3xx, 0 4xx, 1 5xx"),
        PRINTED.replace("status codes", "codes"),
        PRINTED.replace("finished in", "stopped after"),
    ],
)
def test_a_round_in_which_not_all_calls_were_answered_is_refused(printed: str) -> None:
    with pytest.raises(LoadFailed, match="traffic"):
        round_of(printed, WORKLOAD)
