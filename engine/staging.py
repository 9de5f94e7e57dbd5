"""Adapters that are read while the engine computes: a thread of ours in each of vLLM's workers.

    gateway_stage -> (a thread reads, casts, packs; then it tells the core)
    -> gateway_commit, once between any two steps until vLLM has it as if `add_lora` had loaded it

vLLM's own `add_lora` does all of it between two steps, and everyone waits (ADR 17). `WorkerStaging`
is injected into vLLM's worker class by `worker_extension_cls`; the core calls its methods through
`collective_rpc` (`engine/core_staging.py`), on the thread that computes.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import queue
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from engine.slot_filling import SlotFilling
from engine.spare_slot import SpareSlot, fits
from engine.staged_weights import StagedModel, read_ahead

logger = logging.getLogger(__name__)

FILL_BUDGET_S = 0.001
"""How long a slot is filled between two steps. A step of a small model takes a few of these."""
SWITCH_INTERVAL_S = 0.0005
"""How long the thread may keep Python's lock while the engine wants it; by itself it gives it up
with each tensor. Python's own value is 5 ms, as long as a step."""
MOST_ERROR_CHARACTERS = 2000


class WorkerStaging:
    """What vLLM's worker gets in addition. It is given no `__init__`: state is made when needed."""

    def gateway_stage(self, name: str, lora_int_id: int, path: str, core: str) -> None:
        """Begin to read an adapter, and return. The socket `core` is told when that is done."""
        self._gateway_staging().stage(LoRARequest(name, lora_int_id, path), core)

    def gateway_commit(self, lora_int_id: int) -> bool:
        """Copy a part of one that is staged into a slot, and then give it to vLLM. Whether it has
        it; else this is to be called again.

        Raises KeyError if it is not staged, and what vLLM raises for weights that do not fit; it is
        staged no more then.
        """
        return self._gateway_staging().commit(lora_int_id)

    def gateway_unstage(self, lora_int_id: int) -> None:
        """Forget it, also while it is read. What is committed stays."""
        self._gateway_staging().drop(lora_int_id)

    def gateway_rest(self) -> None:
        """Give back the GPU's memory. Nothing may be staged, or being read."""
        self._gateway_staging().rest()

    def _gateway_staging(self) -> Staging:
        staging: Staging | None = self.__dict__.get("_gateway_staged")
        if staging is None:
            runner = self.model_runner  # type: ignore[attr-defined]  # the worker's
            staging = self.__dict__["_gateway_staged"] = Staging(runner.lora_manager)
        return staging


class Staging:
    """The adapters of one worker that are read, or were and are not committed."""

    def __init__(self, loras: LRUCacheWorkerLoRAManager, spare: bool | None = None) -> None:
        """With a `spare` slot or without; by itself with one on a GPU."""
        self._loras = loras
        self._has_spare = loras.device.type == "cuda" if spare is None else spare
        self._spare: SpareSlot | None = None
        self._reader = copy.copy(loras)
        self._reader._lora_model_cls = StagedModel
        self._lock = threading.Lock()
        """Of the next two."""
        self._wanted: set[int] = set()
        self._models: dict[int, LoRAModel] = {}
        self._fillings: dict[int, SlotFilling] = {}
        self._tasks: queue.SimpleQueue[tuple[LoRARequest, str]] = queue.SimpleQueue()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        threading.Thread(target=self._read_all, name="gateway-staging", daemon=True).start()

    def stage(self, request: LoRARequest, core: str) -> None:
        """Begin to read; the socket `core` is told of the end."""
        self._wanted.add(request.lora_int_id)
        self._tasks.put((request, core))

    def commit(self, lora_int_id: int) -> bool:
        """See `WorkerStaging.gateway_commit`."""
        if lora_int_id in self._loras.list_adapters():
            return True  # another worker of this engine needs longer
        model = self._models[lora_int_id]
        try:
            with gpu_sync_allowed():
                if (filling := self._fillings.get(lora_int_id)) is None:
                    filling = self._fillings[lora_int_id] = self._filling(model)
                if not filling.go_on(FILL_BUDGET_S):
                    return False
                self._register(model)
        except BaseException:
            self.drop(lora_int_id)
            raise
        del self._fillings[lora_int_id]
        self._forget(lora_int_id)
        return True

    def drop(self, lora_int_id: int) -> None:
        """Forget one that is read, or was. One that is committed stays."""
        self._forget(lora_int_id)
        if (filling := self._fillings.pop(lora_int_id, None)) is not None:
            filling.give_up()

    @property
    def _manager(self) -> LRUCacheLoRAModelManager:
        manager = self._loras._adapter_manager
        assert isinstance(manager, LRUCacheLoRAModelManager)
        return manager

    def _register(self, model: LoRAModel) -> None:
        # As `add_adapter` does. A full cache drops what was used least recently; the host never
        # lets it come to that.
        if self._manager._is_moe:
            self._manager.add_adapter(model)
        else:  # it is packed already
            self._manager._registered_adapters[model.id] = model

    def _filling(self, model: LoRAModel) -> SlotFilling:
        spare = self._spare
        holds = spare is not None and spare.holds == model.id
        return SlotFilling(self._manager, model, spare if holds else None)

    def _forget(self, lora_int_id: int) -> None:
        with self._lock:
            if self._spare is not None and self._spare.holds == lora_int_id:
                self._spare.holds = None
            self._wanted.discard(lora_int_id)
            self._models.pop(lora_int_id, None)

    def _read_all(self) -> None:
        leave_processors_that_compute()
        if self._loras.device.type == "cuda":
            torch.cuda.set_device(self._loras.device)  # a new thread begins on the first
        while True:
            request, core = self._tasks.get()
            begin_s, error = time.monotonic(), ""
            try:
                model = self._read(request)
                self._fill_spare(model)
                self._keep(model)
                del model
            except BaseException as failure:
                logger.exception("%s could not be read", request.lora_name)
                error = str(failure)[:MOST_ERROR_CHARACTERS] or type(failure).__name__
            seconds = time.monotonic() - begin_s
            answer = {"lora_int_id": request.lora_int_id, "error": error, "seconds": seconds}
            with contextlib.suppress(OSError):  # a core that is gone wants no answer
                tell(core, answer)

    def _fill_spare(self, model: LoRAModel) -> None:
        if not self._has_spare:
            return
        if self._spare is None:
            self._spare = self._make_spare()
        with self._lock:
            if self._spare is None or self._spare.holds is not None:
                return  # another one waits for its commit there
            self._spare.holds = model.id
        try:
            self._spare.fill(model)
        except BaseException:
            self._spare.holds = None
            raise

    def _make_spare(self) -> SpareSlot | None:
        try:
            if fits(self._manager):
                return SpareSlot(self._manager)
        except torch.OutOfMemoryError:
            logger.warning("no memory for a spare slot: slots are filled between steps, by parts")
        self._has_spare = False
        return None

    def rest(self) -> None:
        """Give back what it has of the GPU's memory; nothing is read, and nothing is staged."""
        self._spare = None

    def _keep(self, model: LoRAModel) -> None:
        with self._lock:
            if model.id in self._wanted:
                self._models[model.id] = model
            elif self._spare is not None and self._spare.holds == model.id:
                self._spare.holds = None

    def _read(self, request: LoRARequest) -> LoRAModel:
        read_ahead(Path(request.lora_path))
        model: LoRAModel = self._reader._load_adapter(request)
        if not self._manager._is_moe:  # packing experts twice is not the same as once
            self._manager._create_merged_loras_inplace(model)
        return model


def tell(address: str, answer: dict[str, Any]) -> None:
    """Send one message to a socket of the core. Raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(json.dumps(answer).encode(), address)


def leave_processors_that_compute() -> None:
    """Move this thread to the processors on which an engine on the CPU does not compute, if
    there are any. Its threads are bound to theirs, and a new thread inherits that."""
    mine = os.sched_getaffinity(0)
    others = os.sched_getaffinity(os.getppid()) - mine
    if others:
        os.sched_setaffinity(0, others)
