"""What the gateway adds to vLLM's engine core process: three utility calls.

vLLM loads this through the entry point group `vllm.general_plugins`, in every process
that it runs in (vllm/plugins/__init__.py). A client calls a utility by its method name
(`EngineCoreProc._handle_client_request`, vllm/v1/engine/core.py:1674), so adding methods
is enough: nothing of vLLM's is replaced. They run in the core's own loop, between steps.
`docs/adr/0002-processes-and-vllm-internals.md` tells why, and
`tests/contract/test_vllm_internals.py` fails when what they touch moves.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
from typing import Any

PARENT_POLL_S = 0.5
"""How often an adopted core looks for its host. An orphan ends this long after it."""


def register() -> None:
    """Add the utilities. vLLM may call this more than once in a process."""
    from vllm.v1.engine.core import EngineCoreProc

    # It warns that there is no Triton, in every process; on a CPU there is none.
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)

    for utility in (gateway_adopt, gateway_abort_client, gateway_stop):
        setattr(EngineCoreProc, utility.__name__, utility)


def gateway_adopt(self: Any, host_pid: int) -> int:
    """Tie this core to its host: it ends when the host is gone. Returns the core's pid.

    vLLM 0.32 leaves an engine core running when its parent is SIGKILLed (vllm#55510).
    """

    def watch() -> None:
        while os.getppid() == host_pid:
            time.sleep(PARENT_POLL_S)
        for executor_process in multiprocessing.active_children():
            executor_process.kill()
        os._exit(1)

    threading.Thread(target=watch, name="gateway-parent-watch", daemon=True).start()
    return os.getpid()


def gateway_abort_client(self: Any, client_index: int) -> int:
    """Abort all that one client slot has running or waiting. Returns how many that were.

    For a worker that died: nobody else can name its requests, and vLLM would decode them to
    their end for nobody.
    """
    request_ids = [
        request_id
        for request_id, request in self.scheduler.requests.items()
        if request.client_index == client_index
    ]
    if request_ids:
        self.abort_requests(request_ids)
    return len(request_ids)


def gateway_stop(self: Any) -> None:
    """End the core in order: it frees its devices and exits with 0.

    By call and not by signal, because signals for the process group must not reach a core
    while its streams drain (`engine/core.py`).
    """
    from vllm.v1.engine.core import EngineShutdownState

    self.shutdown_state = EngineShutdownState.REQUESTED
