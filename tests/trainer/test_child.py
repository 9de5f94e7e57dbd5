"""Children that are waited for."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.child import child_process, exit_code

ROOT = Path(__file__).parents[2]
STARTS = 100
"""Of which 7 crashed where the event loop forked them."""


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("code", [0, 3])
async def test_the_exit_code_is_told(code: int) -> None:
    async with child_process([sys.executable, "-S", "-c", f"raise SystemExit({code})"]) as child:
        assert await exit_code(child) == code


async def test_a_signal_that_killed_it_is_told() -> None:
    async with child_process(["sh", "-c", "kill -9 $$"]) as child:
        assert await exit_code(child) == -9


async def test_what_it_started_is_killed_with_it_when_nobody_waits_any_more() -> None:
    async def wait() -> None:
        async with child_process(
            ["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE
        ) as child:
            pids.append(child.pid)
            assert child.stdout is not None
            pids.append(int(await asyncio.to_thread(child.stdout.readline)))
            started.set()
            await exit_code(child)

    pids: list[int] = []
    started = asyncio.Event()
    task = asyncio.create_task(wait())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(5):
        while any(runs(pid) for pid in pids):
            await asyncio.sleep(0.01)


async def test_what_cannot_start_is_an_error() -> None:
    with pytest.raises(FileNotFoundError):
        async with child_process(["/no/such/program"]):
            pass


async def begin_many() -> None:
    """What the test below runs in a process of its own: a host with calls, on uvloop."""
    import grpc
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc

    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async def call() -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            while True:
                await stub.Check(health_pb2.HealthCheckRequest())

    calls = [asyncio.create_task(call()) for _ in range(4)]
    codes = []
    for _ in range(STARTS):
        async with child_process(["true"]) as child:
            codes.append(await exit_code(child))
    for task in calls:
        task.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    await server.stop(None)
    print(sum(code != 0 for code in codes), len(codes))


def test_none_crashes_while_grpc_is_at_work() -> None:
    program = f"import uvloop; from {__name__} import begin_many; uvloop.run(begin_many())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["0", str(STARTS)]
    assert "fork" not in done.stderr, "gRPC says of each that it looked"


async def test_a_second_cancel_leaves_no_process_and_no_pipe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel takes its time to end it: here until the second cancel has come."""
    children: list[subprocess.Popen[bytes]] = []
    started, killed = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        async with child_process(["sleep", "60"], stdout=subprocess.PIPE) as child:
            children.append(child)
            started.set()
            await asyncio.Event().wait()

    monkeypatch.setattr(os, "killpg", lambda pid, number: killed.set())
    task = asyncio.create_task(wait())
    await started.wait()
    task.cancel()
    await killed.wait()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    (child,) = children
    child.kill()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert child.returncode == -9 and child.stdout is not None and child.stdout.closed
