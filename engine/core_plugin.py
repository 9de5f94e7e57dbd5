"""What the gateway adds to vLLM's engine core process: a few utility calls.

vLLM loads this through the entry point group `vllm.general_plugins`, in every process
that it runs in (vllm/plugins/__init__.py). A client calls a utility by its method name
(`EngineCoreProc._handle_client_request`, vllm/v1/engine/core.py:1674), so adding methods
is enough. They run in the core's own loop, between steps. Three things of vLLM's are replaced,
so that no adapter reaches the requests of others: see `logits_without_lora`,
`expanding_adapters_only` and `always`.
`docs/adr/0002-processes-and-vllm-internals.md` tells why, and
`tests/contract/test_vllm_internals.py` fails when what they touch moves.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.core_staging import STAGING_UTILITIES, rest

PARENT_POLL_S = 0.5
"""How often an adopted core looks for its host. An orphan ends this long after it."""


def register() -> None:
    """Add the utilities. vLLM may call this more than once in a process."""
    from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
    from vllm.platforms import current_platform
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.kv_cache_interface import KVCacheConfig

    # It warns that there is no Triton, in every process; on a CPU there is none.
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)

    for utility in (
        gateway_adopt,
        gateway_record,
        gateway_abort_client,
        gateway_requests_of,
        gateway_load,
        gateway_sleep,
        gateway_wake,
        gateway_stop,
        *STAGING_UTILITIES,
    ):
        setattr(EngineCoreProc, utility.__name__, utility)
    LogitsProcessorWithLoRA._get_logits = logits_without_lora  # type: ignore[method-assign]
    KVCacheConfig.needs_kv_cache_zeroing = property(always)  # type: ignore[assignment]
    if current_platform.is_cpu():
        _mend_cpu_kernels()


def gateway_adopt(self: Any, host_pid: int) -> list[int]:
    """Tie this core to its host: it ends when the host is gone. Returns the pids of the core and
    of the processes that compute for it.

    vLLM 0.32 leaves an engine core running when its parent is SIGKILLed (vllm#55510).
    """

    def watch() -> None:
        while os.getppid() == host_pid:
            time.sleep(PARENT_POLL_S)
        for executor_process in multiprocessing.active_children():
            executor_process.kill()
        os._exit(1)

    threading.Thread(target=watch, name="gateway-parent-watch", daemon=True).start()
    return [os.getpid(), *(child.pid or 0 for child in multiprocessing.active_children())]


def gateway_record(self: Any, path: str) -> None:
    """Write down each step in this file from now on, for whoever asks why this core died."""
    from engine.step_recorder import StepRecorder

    StepRecorder(self, Path(path))


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


def gateway_requests_of(self: Any, client_index: int, lora_int_id: int) -> int:
    """Count the requests of one client slot on one adapter. An adapter that is removed while
    a request names it is read again from disk in the next step (ADR 0007)."""
    return sum(
        request.client_index == client_index
        and request.lora_request is not None
        and request.lora_request.lora_int_id == lora_int_id
        for request in self.scheduler.requests.values()
    )


def gateway_load(self: Any) -> list[float]:
    """What `engine.generation.Load` holds, in its order, over all clients."""
    scheduler = self.scheduler
    running, waiting = scheduler.get_request_counts()
    deferred = len(scheduler.deferred_waiting)
    return [running, waiting, deferred, float(scheduler.get_kv_cache_usage())]


def gateway_sleep(self: Any) -> Any:
    """Give up the GPU's memory, and answer once that is done. What still runs is aborted.

    At level 1 vLLM copies the weights to the host's memory, the slots of adapters among them, which
    lie beside the weights. At level 2 it would read the weights again from disk, but nothing fills
    those slots: adapters would be answered in what another process left there
    (vllm/v1/worker/gpu_worker.py:294). The KV cache and its index are dropped.
    """
    rest(self)
    return self.sleep(1, "abort")


def gateway_wake(self: Any) -> None:
    """Take the GPU's memory again, and forget all adapters: the host loads what belongs here.

    The KV cache comes back with whatever is in that memory, NaN perhaps: `always` is what makes
    that harmless. Fails where the memory is not there.
    """
    self.wake_up(None)
    for lora_int_id in [*self.list_loras()]:
        self.remove_lora(lora_int_id)


def gateway_stop(self: Any) -> None:
    """End the core in order: it frees its devices and exits with 0.

    By call and not by signal, because signals for the process group must not reach a core
    while its streams drain (`engine/core.py`).
    """
    from vllm.v1.engine.core import EngineShutdownState

    self.shutdown_state = EngineShutdownState.REQUESTED


def logits_without_lora(
    self: Any,
    hidden_states: Any,
    lm_head: Any,
    embedding_bias: Any = None,
    skip_gather: bool = False,
) -> Any:
    """Logits of the base model's output head, in place of `LogitsProcessorWithLoRA._get_logits`.

    vLLM adds the head's LoRA weights by a mapping of one row for each request that samples, also
    to the rows of a prompt whose tokens are scored (`prompt_logprobs`, vllm/v1/worker/
    gpu_model_runner.py:5375). Two requests at once, one of them with prompt_logprobs, ended the
    engine on a CPU: "einsum(): subscript b has size 2 for operand 1". So no adapter of the
    output head is taken in (`engine/base_model.py`), and here is nothing to add.
    """
    head = getattr(lm_head, "base_layer", lm_head)
    return self.base_layer._get_logits(hidden_states, head, embedding_bias, skip_gather)


def expanding_adapters_only(expand: Callable[..., None]) -> Callable[..., None]:
    """One of vLLM's expand kernels for the CPU, made to leave the base model's rows alone.

    Rows without an adapter have the index -1, by which these kernels take the last slot
    (vllm/lora/ops/torch_ops/lora_ops.py:32). Once an adapter was in it, requests of the base
    model that shared a batch with any adapter were answered with that adapter's weights.
    """

    @functools.wraps(expand)
    def expand_adapters(
        inputs: Any, weights: Any, output: Any, indices: Any, *rest: Any, **options: Any
    ) -> None:
        inputs = inputs.masked_fill((indices < 0).unsqueeze(1), 0.0)
        expand(inputs, weights, output, indices, *rest, **options)

    return expand_adapters


def always(self: Any) -> bool:
    """Zero the blocks of the KV cache before a request gets them, in place of
    `KVCacheConfig.needs_kv_cache_zeroing`.

    An adapter whose activations overflow leaves NaN in its blocks, and the block that it filled
    in part is the first to be used again (vllm/v1/core/block_pool.py:801). Attention weighs what
    lies beyond a request's end with 0, and 0 * NaN is NaN: on a CPU the next request, of
    whomever, was answered in NaN.
    """
    return True


def _mend_cpu_kernels() -> None:
    import torch

    # Linux gives the registers of AMX to processes that ask. vLLM's attention in bfloat16 uses them
    # and asks for nothing (vllm/v1/attention/backends/cpu_attn.py:544): the first request ended the
    # engine with an illegal instruction on an Intel Xeon.
    torch.cpu._init_amx()

    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for name in ("bgmv_expand", "bgmv_expand_slice"):  # the sgmv ones call these
        kernel = getattr(lora_ops, name)
        if not hasattr(kernel, "__wrapped__"):
            mended = expanding_adapters_only(kernel)
            setattr(lora_ops, name, mended)
            setattr(punica_cpu, name, mended)
