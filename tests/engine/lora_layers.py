"""vLLM's own LoRA layers of the tiny model in this process: slots and cache, and no engine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.core import EngineOptions

if TYPE_CHECKING:
    import torch
    from vllm.lora.model_manager import LRUCacheLoRAModelManager
    from vllm.lora.request import LoRARequest
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

SLOTS, PLACES, MAX_RANK = 2, 3, 16


@contextmanager
def lora_layers(model: Path, folder: Path) -> Iterator[LRUCacheWorkerLoRAManager]:
    """The layers with their slots, as a worker of vLLM makes them. The base's weights are not
    read: whoever looks at slots needs none."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
    from vllm.model_executor.model_loader.utils import initialize_model

    config = EngineOptions(
        model_path=model,
        served_model_name="tiny",
        dtype="float32",
        quantization=None,
        max_model_len=64,
        max_num_seqs=2,
        gpu_memory_utilization=0.5,
        max_loras=SLOTS,
        max_cpu_loras=PLACES,
        max_lora_rank=MAX_RANK,
    ).build_config()
    switch_interval_s = sys.getswitchinterval()
    try:
        with set_current_vllm_config(config):
            rendezvous = f"file://{folder}/rendezvous"
            init_distributed_environment(1, 0, rendezvous, 0, backend="gloo")
            initialize_model_parallel(1, 1)
            model_without_weights = initialize_model(vllm_config=config)
            loras = LRUCacheWorkerLoRAManager(
                config, torch.device("cpu"), model_without_weights.embedding_modules
            )
            loras.create_lora_manager(model_without_weights, config)
        yield loras
    finally:
        destroy_model_parallel()
        destroy_distributed_environment()
        sys.setswitchinterval(switch_interval_s)


def request(lora_int_id: int, folder: Path) -> LoRARequest:
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"acme/{folder.name}@{lora_int_id}", lora_int_id, str(folder))


def empty(loras: LRUCacheWorkerLoRAManager) -> None:
    """Remove all adapters."""
    loras.remove_all_adapters()  # type: ignore[no-untyped-call]


def manager_of(loras: LRUCacheWorkerLoRAManager) -> LRUCacheLoRAModelManager:
    manager: Any = loras._adapter_manager
    return manager  # type: ignore[no-any-return]


def in_slot(manager: LRUCacheLoRAModelManager, lora_int_id: int) -> dict[str, torch.Tensor]:
    """Copies of all that lies in the slot of an adapter, by module, kind and slice."""
    slot = manager.lora_index_to_id.index(lora_int_id)
    return {
        f"{name} {kind} {number}": stacked[slot].clone()
        for name, module in manager.modules.items()
        for kind in ("lora_a_stacked", "lora_b_stacked")
        for number, stacked in enumerate(stacked_of(module, kind))
    }


def stacked_of(module: Any, kind: str) -> tuple[torch.Tensor, ...]:
    """Slots of one module; an embedding has one tensor, and no tuple."""
    stacked = getattr(module, kind)
    return stacked if isinstance(stacked, tuple) else (stacked,)
