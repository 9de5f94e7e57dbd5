"""The load on the gateway from h2load, which costs the machine far less than a Python client.

It speaks HTTP/2, and gRPC is that with a body of length-prefixed messages. It does not look
at the answers; the gateway's own metrics say whether all calls were good (`served.py`).
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile

from tests.bench.client import request_of
from tests.bench.workload import Round, Workload

PATH = "/lora_gateway.v1.Inference/GenerateStream"
PACKAGE = "nghttp2-client"
"""Where Debian has it."""


class LoadFailed(Exception):
    """Not every request was answered with 200. The message is h2load's own."""


def h2load_found() -> bool:
    """Whether this machine has it."""
    return shutil.which("h2load") is not None


def run_h2load(address: str, workload: Workload) -> Round:
    """Run the workload for throughput over one connection. Raises LoadFailed."""
    message = request_of(workload).SerializeToString()
    with tempfile.NamedTemporaryFile() as body:
        body.write(struct.pack(">BI", 0, len(message)) + message)
        body.flush()
        printed = subprocess.run(
            [
                *("h2load", "--clients=1", "--threads=1", f"--requests={workload.requests}"),
                *(f"--max-concurrent-streams={workload.in_flight}", f"--data={body.name}"),
                *("--header=content-type: application/grpc", "--header=te: trailers"),
                f"http://{address}{PATH}",
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    good = re.search(r"status codes: (\d+) 2xx", printed)
    # The rate has more digits than the time.
    rate = re.search(r"finished in \S+, ([\d.]+) req/s", printed)
    if good is None or rate is None or int(good[1]) != workload.requests:
        raise LoadFailed(printed)
    return Round(workload.requests * workload.tokens, workload.requests / float(rate[1]))
