"""Staged loads as the core sees them: utilities that its workers' staging answers to.

Added to vLLM's core by `engine/core_plugin.py`. They run between steps, and return at once; what
takes time happens in a thread of each worker (`engine/staging.py`), which sends a datagram here.
"""

from __future__ import annotations

import json
import socket
import threading
from concurrent.futures import Future
from typing import Any

MOST_BYTES = 16 * 1024


class StagedAnswers:
    """Waits for the workers of one core."""

    def __init__(self, workers: int) -> None:
        from vllm.utils.network_utils import get_open_zmq_ipc_path

        self._workers = workers
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[Future[float], list[dict[str, Any]]]] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        # In the folder where vLLM's own sockets are: it is the gateway's, and goes with it.
        self.address = get_open_zmq_ipc_path().removeprefix("ipc://")
        self._socket.bind(self.address)
        threading.Thread(target=self._listen, name="gateway-staged", daemon=True).start()

    def expect(self, lora_int_id: int) -> Future[float]:
        """Done when all workers have staged it: how long the slowest took, in seconds. Fails with
        RuntimeError and the words of one that could not."""
        future: Future[float] = Future()
        with self._lock:
            self._waiting[lora_int_id] = future, []
        return future

    def forget(self, lora_int_id: int) -> None:
        """Nobody waits for it any more."""
        with self._lock:
            self._waiting.pop(lora_int_id, None)

    def _listen(self) -> None:
        while True:
            self._hear(json.loads(self._socket.recv(MOST_BYTES)))

    def _hear(self, answer: dict[str, Any]) -> None:
        with self._lock:
            future, answers = self._waiting.get(answer["lora_int_id"], (None, []))
            answers.append(answer)
            if future is None or len(answers) < self._workers:
                return
            del self._waiting[answer["lora_int_id"]]
        errors = [each["error"] for each in answers if each["error"]]
        if errors:
            future.set_exception(RuntimeError(errors[0]))
        else:
            future.set_result(max(each["seconds"] for each in answers))


def gateway_stage(self: Any, name: str, lora_int_id: int, path: str) -> Future[float]:
    """Have the workers read an adapter. Answers when they have, while steps go on; vLLM lets a
    utility answer later by a future (vllm/v1/engine/core.py:1739)."""
    if (answers := self.__dict__.get("_gateway_answers")) is None:
        workers = self.vllm_config.parallel_config.world_size
        answers = self.__dict__["_gateway_answers"] = StagedAnswers(workers)
    staged: Future[float] = answers.expect(lora_int_id)
    try:
        self.model_executor.collective_rpc(
            "gateway_stage", args=(name, lora_int_id, path, answers.address)
        )
    except BaseException:
        answers.forget(lora_int_id)
        raise
    return staged


def gateway_commit(self: Any, lora_int_id: int) -> bool:
    """Copy a part of a staged adapter into a slot, and once all is there give it to vLLM: True, and
    requests may name it."""
    committed = self.model_executor.collective_rpc("gateway_commit", args=(lora_int_id,))
    return all(committed)


def gateway_unstage(self: Any, lora_int_id: int) -> None:
    """Forget an adapter that was not committed."""
    if (answers := self.__dict__.get("_gateway_answers")) is not None:
        answers.forget(lora_int_id)
    self.model_executor.collective_rpc("gateway_unstage", args=(lora_int_id,))


def rest(core: Any) -> None:
    """Have the workers give back what staging has of the GPU, where there is any."""
    if core.vllm_config.parallel_config.worker_extension_cls:
        core.model_executor.collective_rpc("gateway_rest")


STAGING_UTILITIES = (gateway_stage, gateway_commit, gateway_unstage)
