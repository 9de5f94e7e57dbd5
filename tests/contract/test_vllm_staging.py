"""What ADR 0017 says that staged loads touch of vLLM 0.32, looked up in the installed one."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
from vllm.config import ParallelConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.layers import BaseLayerWithLoRA, LoRAMapping
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import (
    AdapterLRUCache,
    LoRAModelManager,
    LRUCacheLoRAModelManager,
)
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager
from vllm.utils import network_utils, torch_utils
from vllm.utils.cache import LRUCache
from vllm.utils.gpu_sync_debug import gpu_sync_allowed
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.executor.abstract import Executor
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin
from vllm.v1.worker.worker_base import WorkerWrapperBase

from engine import core_plugin
from engine.core import STAGING
from engine.core_staging import STAGING_UTILITIES
from engine.staging import WorkerStaging


def code(owner: Callable[..., Any]) -> str:
    """Its source on one line each statement, whatever the indentation."""
    return re.sub(r"\s+", " ", inspect.getsource(owner))


def test_the_extension_is_injected_into_the_worker_class_and_collides_with_nothing() -> None:
    assert "worker_extension_cls" in inspect.signature(AsyncEngineArgs).parameters
    module, _, name = STAGING.rpartition(".")
    assert (WorkerStaging.__module__, WorkerStaging.__name__) == (module, name)
    source = code(WorkerWrapperBase.init_worker)
    assert "worker_class.__bases__ = worker_class.__bases__ + ( worker_extension_cls, )" in source
    ours = [name for name in dir(WorkerStaging) if not name.startswith("__")]
    assert ours
    for worker in (Worker, CPUWorker):
        taken = {
            name for kind in worker.__mro__ if kind is not WorkerStaging for name in vars(kind)
        }
        assert not taken & {*ours}
    for runner in (GPUModelRunner, GPUModelRunnerV2):
        assert issubclass(runner, LoRAModelRunnerMixin)
    assert "self.lora_manager = LRUCacheWorkerLoRAManager(" in code(
        LoRAModelRunnerMixin.load_lora_model
    )
    assert "self.model_runner.add_lora(" in code(Worker.add_lora)


def test_the_core_has_the_utilities_and_what_they_call() -> None:
    core_plugin.register()
    for utility in STAGING_UTILITIES:
        assert getattr(EngineCoreProc, utility.__name__) is utility
    assert "self.model_executor.add_lora(" in code(EngineCore.add_lora)
    assert {"method", "args"} <= set(inspect.signature(Executor.collective_rpc).parameters)
    # An answer that comes later; a worker's exception comes as its words.
    assert "isinstance(result, Future)" in code(EngineCoreProc._invoke_utility_method)
    assert "output.failure_message = " in code(EngineCoreProc._invoke_utility_method)
    assert "world_size" in {field.name for field in dataclasses.fields(ParallelConfig)}
    assert network_utils.get_open_zmq_ipc_path().startswith("ipc://")


def test_vllm_reads_an_adapter_through_the_class_that_is_replaced() -> None:
    source = code(WorkerLoRAManager._load_adapter)
    assert "self._lora_model_cls.from_local_checkpoint(" in source
    assert 'device="cpu", dtype=self.lora_config.lora_dtype,' in source
    assert "_load_adapter" not in vars(LRUCacheWorkerLoRAManager), "one for both"
    # It changes nothing of the manager, so that a thread may do it.
    assert not re.search(r"self\.[\w.]+ = ", source)
    source = code(LoRAModel.from_local_checkpoint)
    assert "return cls.from_lora_tensors( " in source and "tensors=tensors," in source
    parameters = [*inspect.signature(LoRAModel.from_lora_tensors).parameters]
    wanted = ["lora_model_id", "tensors", "peft_helper", "device", "dtype"]
    assert parameters[: len(wanted)] == wanted
    # A tensor of the served type that is pinned already is taken as it is.
    source = code(LoRAModel.from_lora_tensors)
    for kind in ("lora_a", "lora_b"):
        assert f"loras[module_name].{kind} = tensor.to(device=device, dtype=dtype)" in source
    assert "if is_base_embedding_weights(tensor_name): continue" in source
    assert isinstance(torch_utils.PIN_MEMORY, bool)


def test_packing_is_of_the_adapter_alone() -> None:
    """And so may happen in a thread."""
    source = code(LoRAModelManager._create_merged_loras_inplace)
    assert not re.search(r"self\.[\w.\[\]]+ = ", source)
    assert "lora.optimize()" in source and "lora.lora_a.pin_memory()" in source
    assert "self._is_moe = is_moe" in code(LoRAModelManager.__init__)


def test_an_adapter_is_registered_and_has_its_slot_as_before() -> None:
    # What `Staging._register` does in place of this.
    source = code(LRUCacheWorkerLoRAManager.add_adapter)
    steps = [
        "lora_request.lora_int_id not in self.list_adapters()",
        "self._load_adapter(lora_request)",
        "self._adapter_manager.add_adapter(lora)",
        "self._adapter_manager.activate_adapter(lora_request.lora_int_id)",
    ]
    places = [source.index(step) for step in steps]
    assert places == sorted(places)
    source = code(LoRAModelManager._add_adapter)
    assert "self._registered_adapters[lora.id] = lora" in source
    assert source.count("self.") == 3, "it validates, packs, and registers"
    # What `SlotFilling` does in place of this.
    source = code(LoRAModelManager.activate_adapter)
    for step in (
        "if lora_id in self._active_adapters: return False",
        "self._active_adapters[lora_id] = None",
        "self.lora_index_to_id[index] = lora_model.id",
        "for module_name, module in self.modules.items():",
        "module_lora = self._get_lora_layer_weights(lora_model, module_name)",
        "if not module_lora: module.reset_lora(index)",
        "module.set_lora( index, module_lora.lora_a, module_lora.lora_b, )",
    ):
        assert step in source, step
    assert "self._active_adapters.remove_oldest()" in code(
        LRUCacheLoRAModelManager.activate_adapter
    )
    assert "self.lora_index_to_id[index] = None" in code(LoRAModelManager._deactivate_adapter)
    assert "self._active_adapters.pop(adapter_id, None)" in code(
        LoRAModelManager.deactivate_adapter
    )
    assert isinstance(inspect.getattr_static(LRUCache, "order"), property)
    assert issubclass(AdapterLRUCache, LRUCache)
    for method in ("set_lora", "reset_lora"):
        assert next(iter([*inspect.signature(getattr(BaseLayerWithLoRA, method)).parameters][1:]))


def test_the_batch_that_runs_is_known_by_its_mapping() -> None:
    source = code(LoRAModelManager.set_adapter_mapping)
    assert "self._last_mapping = mapping" in source
    assert "self._last_slot_layout != slot_layout" in source, "a slot may change hands between"
    assert "prompt_mapping" in inspect.signature(LoRAMapping).parameters


def test_loads_are_let_through_where_vllm_watches_for_waits_of_the_gpu() -> None:
    assert "with gpu_sync_allowed():" in inspect.getsource(LRUCacheWorkerLoRAManager.add_adapter)
    with gpu_sync_allowed():
        pass


@pytest.mark.parametrize("loader", ["staged", "vllm"])
def test_the_extension_can_be_left_out(loader: str, tmp_path: Any) -> None:
    from engine.core import EngineOptions
    from engine.models import resolve_model

    config = EngineOptions(
        model_path=resolve_model("tiny", tmp_path),
        served_model_name="tiny",
        dtype="float32",
        quantization=None,
        max_model_len=64,
        max_num_seqs=2,
        gpu_memory_utilization=0.5,
        max_loras=1,
        max_cpu_loras=1,
        max_lora_rank=8,
        adapter_loader=loader,  # type: ignore[arg-type]
    ).build_config()
    named = config.parallel_config.worker_extension_cls
    assert named == ("" if loader == "vllm" else STAGING)
