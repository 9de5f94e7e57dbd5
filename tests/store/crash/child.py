"""The program that is crashed: forks one run of a script for each order on its input.

An order is a line of JSON, the fields of `Order`. The answer is the run's exit status, negative
for a signal. Forked, because most of what a process costs here is importing; there is no thread
before that.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import sys
import traceback
from pathlib import Path

from tests.store.crash.host import Host
from tests.store.crash.order import Order
from tests.store.crash.script import Script, run_script


def _run(order: Order) -> None:
    layer = ctypes.CDLL(None)  # preloaded
    layer.crash_layer_arm(
        os.fsencode(order.watched),
        os.fsencode(order.journal),
        ctypes.c_uint64(order.kill_at),
        int(order.within),
    )

    async def acknowledge(index: int, result: object) -> None:
        layer.crash_layer_note(f"{index} {result!r}".encode())

    host = Host(Path(order.watched), Path(order.sources))
    asyncio.run(run_script(Script(order.script), host, acknowledge))


def main() -> None:
    """Serve until the input ends."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _run(Order(**json.loads(line)))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        _, wait_status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(wait_status), flush=True)


if __name__ == "__main__":
    main()
