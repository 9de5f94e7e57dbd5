"""The load on servers: h2load, which speaks HTTP/1.1 and, with a framed body, gRPC.

One process of it for each adapter, because it sends one body. It does not look at answers: the
servers' own counters say whether all calls were good.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_gateway.v1 import inference_pb2 as pb
from tests.gpu.measured_engine import ROUND_S, Load

SERVICE = "/lora_gateway.v1.Inference"


class LoadFailed(Exception):
    """Not every request was answered with 200, or h2load is not here."""


@dataclass(frozen=True, slots=True)
class Call:
    """One body, and where it goes."""

    url: str
    body: bytes
    headers: tuple[str, ...]
    http1: bool


def grpc_call(address: str, load: Load, adapter: str) -> Call:
    """Of the gateway."""
    request = pb.GenerateRequest(
        adapter=adapter,
        sampling=pb.SamplingParams(max_tokens=load.tokens, temperature=0.0, ignore_eos=True),
        max_tokens_per_chunk=load.tokens_per_delta if load.stream else 0,
    )
    request.token_ids.ids.extend(load.prompt)
    message = request.SerializeToString()
    method = "GenerateStream" if load.stream else "Generate"
    return Call(
        f"http://{address}{SERVICE}/{method}",
        struct.pack(">BI", 0, len(message)) + message,
        ("content-type: application/grpc", "te: trailers"),
        http1=False,
    )


def http_call(address: str, load: Load, model: str) -> Call:
    """Of vLLM's own server."""
    body = {
        "model": model,
        "prompt": list(load.prompt),
        "max_tokens": load.tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": load.stream,
    }
    return Call(
        f"http://{address}/v1/completions",
        json.dumps(body).encode(),
        ("content-type: application/json",),
        http1=True,
    )


def run(calls: Sequence[Call], load: Load, *, connections: int, threads: int) -> float:
    """Run the load over these calls in equal parts; returns seconds. Raises LoadFailed.

    `connections` are of all calls together, for gRPC; HTTP/1.1 has one for each in flight.
    """
    program = shutil.which("h2load")
    if program is None:
        raise LoadFailed("h2load is not here")
    in_flight = load.in_flight // len(calls)
    assert in_flight * len(calls) == load.in_flight, "the load does not divide"
    running = []
    with tempfile.TemporaryDirectory(prefix="load-") as folder:
        for number, call in enumerate(calls):
            body = Path(folder) / str(number)
            body.write_bytes(call.body)
            clients = in_flight if call.http1 else max(1, connections // len(calls))
            while in_flight % clients:
                clients -= 1
            command = [
                *(program, f"--clients={clients}", f"--requests={in_flight * load.waves}"),
                f"--threads={max(1, min(clients, threads // len(calls)))}",
                f"--max-concurrent-streams={in_flight // clients}",
                *(f"--data={body}", *(f"--header={header}" for header in call.headers)),
                *(("--h1",) if call.http1 else ()),
                call.url,
            ]
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            running.append(process)
        try:
            seconds = [_seconds(process, in_flight * load.waves) for process in running]
        finally:
            for process in running:
                process.kill()
                process.wait()
    return max(seconds)


def _seconds(process: subprocess.Popen[str], requests: int) -> float:
    try:
        printed = process.communicate(timeout=ROUND_S)[0]
    except subprocess.TimeoutExpired:
        raise LoadFailed(f"h2load took over {ROUND_S:.0f} s") from None
    good = re.search(r"status codes: (\d+) 2xx", printed)
    # The rate has more digits than the time.
    rate = re.search(r"finished in \S+, ([\d.]+) req/s", printed)
    if good is None or rate is None or int(good[1]) != requests:
        raise LoadFailed(printed[-1500:])
    return requests / float(rate[1])
