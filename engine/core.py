"""Engine cores: starting one, handing out its client slots, ending it.

A core is vLLM's engine process: scheduler, KV cache and model. Several processes may
drive one core, each through a client slot of its own, the way vLLM's multi-API-server mode
does. A slot can be used once, because the core greets it once; so many are bound, and each
new worker takes a fresh one (ADR 0002; measured: attaching takes milliseconds).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from engine.core_death import is_stopped
from engine.errors import CoreFailed, SlotsUsedUp
from engine.signals import group_signals_blocked

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine.utils import CoreEngineProcManager, EngineZmqListeners

CLIENT_SLOTS = 64
"""Slots bound per core: one for the host, one for each worker that ever lives."""
STAGING = "engine.staging.WorkerStaging"
"""What vLLM's workers are extended with, by its name."""
STOP_TIMEOUT_S = 15.0
"""How long a core gets to free its devices before it is killed."""


Environment: TypeAlias = Callable[[], contextlib.AbstractContextManager[None]]
"""Opened around the start of a process, which inherits what it sets."""
Started: TypeAlias = Callable[[int, str], None]
"""Told the pid of a process that has just been started, and what it is, for people."""


def ignore(pid: int, what: str) -> None:
    """For those who need not know which processes are started."""


_SPAWNING = threading.Lock()
"""Held while a core's process is started: the environment is one for all that start."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What a core is started with. Names and meanings are vLLM's."""

    model_path: Path
    served_model_name: str
    dtype: str
    quantization: str | None
    max_model_len: int
    max_num_seqs: int
    gpu_memory_utilization: float
    max_loras: int
    max_cpu_loras: int
    max_lora_rank: int
    otlp_endpoint: str | None = None
    devices: int = 1
    """Over how many GPUs it is spread: the first that it sees. 1 on a CPU."""
    adapter_loader: Literal["vllm", "staged"] = "vllm"
    """Who reads adapters: vLLM between two steps, or a thread of `engine/staging.py` (ADR 17)."""
    sleeps: bool = False
    """Whether it can let go of its GPUs and stay: `gateway_sleep` of `engine/core_plugin.py`."""

    def build_config(self) -> VllmConfig:
        """The full vLLM configuration. Raises CoreFailed when vLLM refuses it."""
        from vllm.engine.arg_utils import AsyncEngineArgs

        arguments = AsyncEngineArgs(
            model=str(self.model_path),
            served_model_name=[self.served_model_name],
            dtype=self.dtype,  # type: ignore[arg-type]  # one of vLLM's literals
            quantization=self.quantization,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            gpu_memory_utilization=self.gpu_memory_utilization,
            enable_lora=True,
            max_loras=self.max_loras,
            max_cpu_loras=self.max_cpu_loras,
            max_lora_rank=self.max_lora_rank,  # type: ignore[arg-type]  # one of vLLM's literals
            tensor_parallel_size=self.devices,
            enable_sleep_mode=self.sleeps,
            worker_extension_cls=STAGING if self.adapter_loader == "staged" else "",
            otlp_traces_endpoint=self.otlp_endpoint,
            use_tqdm_on_load=False,
            # vLLM's histograms begin at 0.3 s, too coarse for queue times.
            custom_histogram_buckets={"request_latency": list(LATENCY_BUCKETS_S)},
        )
        try:
            return arguments.create_engine_config()
        except (ValueError, OSError, RuntimeError) as error:
            reason = str(error).strip().splitlines()
            raise CoreFailed(f"vLLM refuses this model or these flags: {reason[-1]}") from error


EngineConfig: TypeAlias = "VllmConfig"
"""What `EngineOptions.build_config` builds, for those who do not look into it."""

LATENCY_BUCKETS_S = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0),
)
"""Bucket edges of all latency histograms, in seconds; 0.03 and 0.05 are alert thresholds."""


@dataclass(frozen=True, slots=True)
class ClientSlot:
    """The right to drive one core, once. Can be sent to another process of the host."""

    shard: str
    core_pid: int
    index: int
    count: int
    input_address: str
    output_address: str
    input_listener: socket.socket
    output_listener: socket.socket
    config: VllmConfig
    record_path: Path
    """Where the core writes down what it computes."""

    def client_addresses(self) -> dict[str, Any]:
        """As `AsyncLLM(client_addresses=...)` wants them (vllm/v1/engine/core_client.py:630)."""
        return {
            "input_address": self.input_address,
            "output_address": self.output_address,
            "input_listener": self.input_listener,
            "output_listener": self.output_listener,
        }

    def close(self) -> None:
        """Close this process's copy of the listeners, after another process took them."""
        self.input_listener.close()
        self.output_listener.close()


class EngineCore:
    """One running engine core. Owned by the host, which starts, watches and stops it."""

    def __init__(
        self,
        name: str,
        config: VllmConfig,
        listeners: EngineZmqListeners,
        processes: CoreEngineProcManager,
        record_path: Path,
    ) -> None:
        self.name = name
        self.record_path = record_path
        """Where it writes down what it computes, once it is told to."""
        self.config = config
        self._listeners: EngineZmqListeners | None = listeners
        self._processes = processes
        self._next_slot = 0
        self._tree: dict[int, int] = {}
        """Descriptors of its processes by their pids, which others may have later."""

    @classmethod
    async def start(
        cls,
        name: str,
        config: VllmConfig,
        record_path: Path,
        environment: Environment = contextlib.nullcontext,
        started: Started = ignore,
    ) -> EngineCore:
        """Start a core, in this environment, and wait until its model is loaded. `started` is
        called in a thread, before that.

        It is told by `gateway_record` to write down its steps at `record_path`. Raises CoreFailed
        if the process ends while loading. Cancelled, it ends the process.
        """
        spawned: list[CoreEngineProcManager] = []
        starting = asyncio.ensure_future(
            asyncio.to_thread(cls._start, name, config, record_path, environment, started, spawned)
        )
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            while not starting.done():  # vLLM's start waits in a thread, and cannot be told
                for processes in spawned:
                    for process in processes.processes:
                        process.kill()
                await asyncio.wait({starting}, timeout=0.2)
            if starting.exception() is None:
                await starting.result().stop()
            raise

    @classmethod
    def _start(
        cls,
        name: str,
        config: VllmConfig,
        record_path: Path,
        environment: Environment,
        started: Started,
        spawned: list[CoreEngineProcManager],
    ) -> EngineCore:
        from vllm.v1.engine.utils import (
            CoreEngineProcManager,
            bind_engine_zmq_listeners,
            launch_core_engines,
        )
        from vllm.v1.executor import Executor

        listeners = bind_engine_zmq_listeners(config, CLIENT_SLOTS)
        launching = launch_core_engines(
            config, Executor.get_class(config), True, listeners.addresses
        )
        try:
            with contextlib.ExitStack() as ready:
                with _SPAWNING, environment(), group_signals_blocked():
                    launch = ready.enter_context(launching)
                assert isinstance(launch.engine_manager, CoreEngineProcManager)
                spawned.append(launch.engine_manager)
                for process in launch.engine_manager.processes:
                    started(process.pid or 0, f"core of {name}")
                # Leaving this context waits for the core to be ready.
        except RuntimeError as error:
            listeners.cleanup()
            raise CoreFailed(
                f"{name} did not start; the cause stands in the log lines above"
            ) from error
        return cls(name, config, listeners, launch.engine_manager, record_path)

    @property
    def pids(self) -> list[int]:
        """Process ids of the core."""
        return [process.pid for process in self._processes.processes if process.pid is not None]

    @property
    def sentinels(self) -> list[int]:
        """File descriptors that become readable when a process of the core ends."""
        return [int(sentinel) for sentinel in self._processes.sentinels()]

    def adopt(self, pids: Sequence[int]) -> None:
        """Know these as processes of the core, those that compute for it among them."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                self._tree[pid] = os.pidfd_open(pid)

    def kill(self) -> None:
        """End all processes of the core at once, also if they are stopped."""
        for descriptor in self._tree.values():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        for process in self._processes.processes:
            process.kill()

    @property
    def slots_left(self) -> int:
        """Client slots that were never taken."""
        return CLIENT_SLOTS - self._next_slot

    def take_slot(self) -> ClientSlot:
        """The next fresh slot. Raises SlotsUsedUp."""
        if not self.slots_left:
            raise SlotsUsedUp(f"all {CLIENT_SLOTS} client slots of {self.name} are used up")
        assert self._listeners is not None, "a core that was stopped has no slots"
        index = self._next_slot
        self._next_slot += 1
        inputs, outputs = self._listeners.inputs[index], self._listeners.outputs[index]
        return ClientSlot(
            shard=self.name,
            core_pid=self.pids[0],
            index=index,
            count=CLIENT_SLOTS,
            input_address=inputs.address,
            output_address=outputs.address,
            input_listener=inputs.socket,
            output_listener=outputs.socket,
            config=self.config,
            record_path=self.record_path,
        )

    async def ended(self) -> None:
        """Wait until a process of the core ends."""
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        for sentinel in self.sentinels:
            loop.add_reader(sentinel, ended.set)
        try:
            await ended.wait()
        finally:
            for sentinel in self.sentinels:
                loop.remove_reader(sentinel)

    def issued(self, slot: ClientSlot) -> bool:
        """Whether the slot is one of this core, and not of one before it."""
        if self._listeners is None:
            return False
        return self._listeners.inputs[slot.index].address == slot.input_address

    async def exit_code(self) -> int | None:
        """How it ended, as `multiprocessing` has it; None if it has not within a second."""
        for _ in range(100):
            # Its pipe closes a little before it can be waited for.
            for process in self._processes.processes:
                if process.exitcode is not None:
                    return process.exitcode
            await asyncio.sleep(0.01)
        return None

    @property
    def is_stopped(self) -> bool:
        """Whether somebody has stopped one of its processes, so that it cannot go on."""
        return any(map(is_stopped, {*self._tree, *self.pids}))

    async def stop(self, request_stop: Callable[[], Any] | None = None) -> None:
        """End the core: by `request_stop` (its own shutdown call) if given, else by a kill.

        Whatever is still alive after STOP_TIMEOUT_S is killed. Safe to call twice.
        """
        if request_stop is not None:
            with contextlib.suppress(Exception):  # a core that is gone cannot be asked
                await asyncio.wait_for(request_stop(), STOP_TIMEOUT_S)
        else:
            self.kill()
        await asyncio.to_thread(self._reap, STOP_TIMEOUT_S if request_stop else 0.0)

    def _reap(self, timeout_s: float) -> None:
        for process in self._processes.processes:
            process.join(timeout_s)
            if process.is_alive():
                process.kill()
                process.join()
        self.kill()  # those that computed for it, if it could not end them
        self._processes.shutdown(timeout=0)
        while self._tree:
            os.close(self._tree.popitem()[1])
        if self._listeners is not None:
            self._listeners.cleanup()
            self._listeners = None  # its finalizer must not run at interpreter exit
