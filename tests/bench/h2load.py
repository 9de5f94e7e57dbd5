"""The load from h2load, which costs the machine far less than a Python client.

It speaks HTTP/1.1 and HTTP/2, and gRPC is the latter with a body of length-prefixed messages. It
does not look at the answers; the servers' own metrics say whether all calls were good
(`served.py`, `peer.py`).
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from tests.bench.client import request_of
from tests.bench.http_client import COMPLETIONS, completion_of
from tests.bench.workload import Round, Workload

STREAMING = "/lora_gateway.v1.Inference/GenerateStream"
UNARY = "/lora_gateway.v1.Inference/Generate"
PACKAGE = "nghttp2-client"
"""Where Debian has it."""
FOR_EVER_S = 3600
"""Longer than any load is wanted."""


class LoadFailed(Exception):
    """Not every request was answered with 200. The message is h2load's own."""


def h2load_found() -> bool:
    """Whether this machine has it."""
    return shutil.which("h2load") is not None


def run_h2load(
    address: str,
    workload: Workload,
    path: str = STREAMING,
    *,
    connections: int = 1,
    threads: int = 1,
) -> Round:
    """Run the workload for throughput. What is in flight is divided among the connections, and
    they among the threads, so each number should divide the one before. Raises LoadFailed."""
    with tempfile.NamedTemporaryFile() as body:
        _write_body(body.name, workload)
        command = _command(address, workload, path, body.name, connections, threads)
        command += [f"--requests={workload.requests}"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return round_of(printed, workload)


def run_h2load_http(address: str, workload: Workload) -> Round:
    """Run the workload for throughput on one of vLLM's HTTP servers, whose clients have a
    connection for each request in flight: HTTP/1.1 knows no other way. Raises LoadFailed."""
    with tempfile.NamedTemporaryFile("w") as body:
        json.dump(completion_of(workload), body)
        body.flush()
        command = [
            *("h2load", "--h1", f"--clients={workload.in_flight}", "--threads=1"),
            *(f"--requests={workload.requests}", f"--data={body.name}"),
            *("--header=content-type: application/json", f"http://{address}{COMPLETIONS}"),
        ]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return round_of(printed, workload)


def round_of(printed: str, workload: Workload) -> Round:
    """What h2load prints at its end. Raises LoadFailed unless all requests were answered with
    200."""
    good = re.search(r"status codes: (\d+) 2xx", printed)
    # The rate has more digits than the time.
    rate = re.search(r"finished in \S+, ([\d.]+) req/s", printed)
    if good is None or rate is None or int(good[1]) != workload.requests:
        raise LoadFailed(printed)
    return Round(workload.requests * workload.tokens, workload.requests / float(rate[1]))


@contextmanager
def h2load_running(
    address: str, workload: Workload, path: str = STREAMING, *, connections: int, threads: int
) -> Iterator[subprocess.Popen[str]]:
    """Requests of the workload without end, divided as in `run_h2load`, until the block ends. Then
    those that are in flight are cut."""
    with tempfile.NamedTemporaryFile() as body:
        _write_body(body.name, workload)
        command = _command(address, workload, path, body.name, connections, threads)
        with subprocess.Popen(
            [*command, f"--duration={FOR_EVER_S}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as load:
            try:
                yield load
            finally:
                load.kill()


def _write_body(path: str, workload: Workload) -> None:
    message = request_of(workload).SerializeToString()
    with open(path, "wb") as body:
        body.write(struct.pack(">BI", 0, len(message)) + message)


def _command(
    address: str, workload: Workload, path: str, body: str, connections: int, threads: int
) -> list[str]:
    return [
        *("h2load", f"--clients={connections}", f"--threads={threads}"),
        f"--max-concurrent-streams={workload.in_flight // connections}",
        f"--data={body}",
        *("--header=content-type: application/grpc", "--header=te: trailers"),
        f"http://{address}{path}",
    ]
