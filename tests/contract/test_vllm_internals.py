"""What ADR 0002 says we touch of vLLM 0.32, looked up in the installed one.

A release of vLLM that moves any of it fails here, with the name, before it fails at run time.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import vllm
from vllm.device_allocator.sleep_mode_backend import CuMemBackend
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.renderers import BaseRenderer
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore, EngineCoreProc, EngineShutdownState
from vllm.v1.engine.core_client import AsyncMPClient, BackgroundResources
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.engine.utils import (
    CoreEngineLaunch,
    CoreEngineProcManager,
    EngineZmqListeners,
    bind_engine_zmq_listeners,
    launch_core_engines,
)
from vllm.v1.executor import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProcHandle
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.stats import RequestStateStats
from vllm.v1.request import Request
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from engine import core_plugin
from engine.sampling import MAX_BAD_WORDS_BYTES, MAX_ENTRIES
from gateway.run_dir import LONGEST_NAME_BYTES

CALLS: list[tuple[Callable[..., Any], list[str]]] = [
    (bind_engine_zmq_listeners, ["vllm_config", "num_api_servers"]),
    (launch_core_engines, ["vllm_config", "executor_class", "log_stats", "addresses"]),
    (Executor.get_class, ["vllm_config"]),
    (
        AsyncLLM.__init__,
        [
            *("vllm_config", "executor_class", "log_stats", "log_requests", "stat_loggers"),
            *("client_addresses", "client_count", "client_index"),
        ],
    ),
    (
        AsyncLLM.add_request,
        ["request_id", "prompt", "params", "lora_request", "trace_headers"],
    ),
    (AsyncLLM.abort, ["request_id", "internal"]),
    (AsyncLLM.add_lora, ["lora_request"]),
    (AsyncLLM.remove_lora, ["lora_id"]),
    (AsyncLLM.get_supported_tasks, []),
    (BaseRenderer.render_cmpl_async, ["prompts"]),
    (BaseRenderer.render_chat_async, ["conversations", "chat_params"]),
    (PEFTHelper.from_dict, ["config_dict"]),
    (AsyncMPClient.call_utility_async, ["method", "args"]),
    (RequestOutputCollector.get, []),
    (RequestOutputCollector.get_nowait, []),
    (OutputProcessor.propagate_error, ["e"]),
    (EngineCoreProc.abort_requests, ["request_ids"]),
    (Scheduler.get_request_counts, []),
    (EngineCoreProc._handle_client_request, ["request_type", "request"]),
    (CoreEngineProcManager.sentinels, []),
    (CoreEngineProcManager.shutdown, ["timeout"]),
]


def test_the_version_is_the_one_that_was_read() -> None:
    assert vllm.__version__.startswith("0.32.0"), "read ADR 0002 again before you move on"


@pytest.mark.parametrize(
    ("function", "parameters"), CALLS, ids=lambda value: getattr(value, "__qualname__", "")
)
def test_what_we_call_takes_what_we_pass(
    function: Callable[..., Any], parameters: list[str]
) -> None:
    missing = set(parameters) - set(inspect.signature(function).parameters)
    assert not missing


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (CoreEngineLaunch, ["engine_manager", "addresses"]),
        (EngineZmqListeners, ["inputs", "outputs"]),
        (BackgroundResources, ["ctx", "engine_dead"]),
        (RequestStateStats, ["queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts"]),
        (
            CompletionOutput,
            ["index", "text", "token_ids", "logprobs", "finish_reason", "stop_reason"],
        ),
        (
            AsyncEngineArgs,
            [
                *("model", "served_model_name", "dtype", "quantization", "max_model_len"),
                *("max_num_seqs", "gpu_memory_utilization", "enable_lora", "max_loras"),
                *("max_cpu_loras", "max_lora_rank", "otlp_traces_endpoint", "use_tqdm_on_load"),
                *("custom_histogram_buckets", "tensor_parallel_size", "enable_sleep_mode"),
            ],
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_we_read_has_the_fields(kind: type, fields: list[str]) -> None:
    missing = set(fields) - {field.name for field in dataclasses.fields(kind)}
    assert not missing


def test_structs_have_the_fields_that_we_set_or_read() -> None:
    for kind, names in (
        (LoRARequest, {"lora_name", "lora_int_id", "lora_path"}),
        (EngineCoreRequest, {"client_index", "request_id"}),
        (SamplingParams, {"stream_interval", "skip_clone", "output_kind", "structured_outputs"}),
    ):
        assert names <= set(inspect.signature(kind).parameters), kind
    assert {"prompt_logprobs", "metrics", "num_cached_tokens", "finished"} <= set(
        inspect.signature(RequestOutput.__init__).parameters
    )
    assert {"client_index", "lora_request"} <= set(inspect.signature(Request.__init__).parameters)


def test_sources_hold_what_no_signature_shows() -> None:
    """Attributes and behaviours that live inside functions."""
    for owner, text in (
        # The core looks a utility up by name, so the plugin can add some.
        (EngineCoreProc._handle_client_request, "getattr(self, method_name)"),
        # The core's loop ends by itself once this state is requested.
        (EngineCoreProc._handle_shutdown, "EngineShutdownState.REQUESTED"),
        # The collector merges deltas while the reader is busy.
        (RequestOutputCollector.put, "aggregate=self.aggregate"),
        # Our stat logger chooses the metric classes.
        (PrometheusStatLogger.__init__, "self._gauge_cls("),
        (PrometheusStatLogger.__init__, "self.gauge_lora_info"),
        # Ours observes these, all of a step at once.
        (PrometheusStatLogger.record, "in iteration_stats.inter_token_latencies_iter:"),
        (PrometheusStatLogger.record, "self.histogram_inter_token_latency[engine_idx].observe"),
        (InputProcessor.__init__, "self.process_inputs_async"),
        (AsyncLLM.__init__, "self.output_processor"),
        (AsyncLLM.__init__, "self.renderer"),
        (CoreEngineProcManager.__init__, "self.processes"),
        (CoreEngineProcManager.__init__, 'else "EngineCore"'),
        (Scheduler.__init__, "self.requests"),
        # What counts the requests of one process on one adapter, and of all.
        (Request.__init__, "self.client_index = client_index"),
        (Request.__init__, "self.lora_request = lora_request"),
        (Scheduler.get_request_counts, "return len(self.running), len(self.waiting)"),
        # Our fingerprint stands before what vLLM adds to an id, in front and behind.
        (InputProcessor.assign_request_id, 'f"{request.external_req_id}-{random_uuid():.8}"'),
        (ParentRequest.get_child_info, 'f"{index}_{self.request_id}"'),
        # A client that is attached learns of its core's death from this flag alone.
        (AsyncMPClient.ensure_alive, "self.resources.engine_dead"),
        # Asleep at level 1 the weights are kept, the slots of adapters among them.
        (CuMemBackend.suspend, 'offload_tags = ("weights", *offload_tags)'),
        (Worker.load_model, 'self._maybe_get_memory_pool_context(tag="weights")'),
        (GPUModelRunner.load_model, "self.load_lora_model("),
        (GPUModelRunnerV2.load_model, "self.load_lora_model("),
        # The index of the KV cache is dropped with it, and who waits for a sleep gets its end.
        (EngineCore.sleep, "clear_prefix_cache = level >= 1"),
        (EngineCoreProc._invoke_utility_method, "isinstance(result, Future)"),
    ):
        assert text in inspect.getsource(owner), f"{owner.__qualname__} lost {text!r}"
    assert list(inspect.signature(EngineCore.sleep).parameters) == ["self", "level", "mode"]
    assert list(inspect.signature(EngineCore.wake_up).parameters) == ["self", "tags"]
    assert {"RUNNING", "REQUESTED"} <= set(EngineShutdownState.__members__)


def test_vllm_finds_the_plugin_and_it_adds_its_utilities() -> None:
    names = {point.value for point in entry_points(group="vllm.general_plugins")}
    assert "engine.core_plugin:register" in names
    core_plugin.register()
    for utility in (
        *("gateway_adopt", "gateway_abort_client", "gateway_requests_of", "gateway_load"),
        *("gateway_record", "gateway_sleep", "gateway_wake", "gateway_stop"),
    ):
        assert callable(getattr(EngineCoreProc, utility))


def test_the_logits_that_are_replaced_are_there_and_called_as_before() -> None:
    # In a process of its own, `register` has not replaced it yet.
    source = inspect.getsource(sys.modules[LogitsProcessorWithLoRA.__module__])
    (replaced,) = (
        node
        for kind in ast.parse(source).body
        if isinstance(kind, ast.ClassDef) and kind.name == LogitsProcessorWithLoRA.__name__
        for node in kind.body
        if isinstance(node, ast.FunctionDef) and node.name == "_get_logits"
    )
    ours = inspect.signature(core_plugin.logits_without_lora)
    assert [argument.arg for argument in replaced.args.args] == list(ours.parameters)
    assert len(replaced.args.defaults) == 2 and not replaced.args.kwonlyargs
    # What ours passes on, in this order.
    wanted = ["self", "hidden_states", "lm_head", "embedding_bias", "skip_gather"]
    assert list(inspect.signature(LogitsProcessor._get_logits).parameters) == wanted
    assert "self._get_logits(" in inspect.getsource(LogitsProcessor.forward)
    assert "self.base_layer = base_layer" in inspect.getsource(LogitsProcessorWithLoRA.__init__)
    assert "forward" in LogitsProcessorWithLoRA.__dict__, "it calls the base's with itself as self"


def test_a_step_begins_and_ends_in_the_two_methods_that_are_wrapped() -> None:
    """And in this order: a step is recorded before the model computes it."""
    for step in (EngineCore.step, EngineCore.step_with_batch_queue):
        source = inspect.getsource(step)
        places = [
            source.index("self.scheduler.schedule("),
            source.index("self.model_executor.execute_model("),
            source.index("self.scheduler.update_from_output("),
        ]
        assert places == sorted(places)
        assert source.count("self.scheduler.schedule(") == 1
    assert inspect.getsource(EngineCore).count("scheduler.update_from_output(") == 2
    source = inspect.getsource(EngineCore.__init__)
    assert "self.batch_queue_size = vllm_config.max_concurrent_batches" in source
    assert "assert len(batch_queue) < self.batch_queue_size" in inspect.getsource(
        EngineCore.step_with_batch_queue
    )
    for kind, fields in (
        (SchedulerOutput, {"scheduled_new_reqs", "scheduled_cached_reqs", "num_scheduled_tokens"}),
        (NewRequestData, {"req_id"}),
        (CachedRequestData, {"req_ids"}),
    ):
        assert fields <= {field.name for field in dataclasses.fields(kind)}
    # Who died before an exception ended the core, told before the clients hear of it.
    run = inspect.getsource(EngineCoreProc.run_engine_core)
    assert "engine_core._send_engine_dead()" in run
    assert run.index("engine_core._send_engine_dead()") < run.index("engine_core.shutdown()")
    assert "self.workers = " in inspect.getsource(MultiprocExecutor._init_executor)
    assert "proc" in {field.name for field in dataclasses.fields(WorkerProcHandle)}


def test_the_environment_says_where_a_cpu_engine_runs_and_how_long_a_client_waits_for_it() -> None:
    from vllm.utils.ompmultiprocessing import OMPProcessManager
    from vllm.v1.engine import core_client

    binding = inspect.getsource(OMPProcessManager._parse_omp_threads_bind_env)
    assert "envs.VLLM_CPU_OMP_THREADS_BIND" in binding and 'split("|")' in binding
    assert "VLLM_ENGINE_READY_TIMEOUT_S * 1000" in inspect.getsource(core_client.MPClient.__init__)


def test_all_sockets_are_made_in_the_folder_that_the_environment_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from vllm.utils import network_utils

    monkeypatch.setenv("VLLM_RPC_BASE_PATH", str(tmp_path))
    address = network_utils.get_open_zmq_ipc_path()
    assert address.startswith(f"ipc://{tmp_path}/")
    assert len(address.rpartition("/")[2]) == LONGEST_NAME_BYTES
    # Nobody makes an address otherwise.
    package = Path(vllm.__file__).parent
    for folder in ("v1/engine", "v1/executor", "distributed/device_communicators"):
        for source in (package / folder).glob("*.py"):
            assert 'f"ipc://' not in source.read_text(), source


def test_our_limits_stay_within_those_that_end_vllms_gpu_runner() -> None:
    """It raises inside a step beyond these, which ends the engine for everyone."""
    gpu = Path(vllm.__file__).parent / "v1" / "worker" / "gpu" / "sample" / "logit_bias.py"
    found = dict(re.findall(r"^MAX_NUM_(\w+) = (\d+)$", gpu.read_text(), re.MULTILINE))
    assert MAX_ENTRIES["allowed_token_ids"] <= int(found["ALLOWED_TOKEN_IDS"])
    assert MAX_ENTRIES["logit_bias"] <= int(found["LOGIT_BIAS_TOKENS"])
    assert 2 * MAX_ENTRIES["stop_token_ids"] <= int(found["STOP_TOKEN_IDS"])
    assert MAX_ENTRIES["bad_words"] <= vllm.envs.VLLM_MAX_NUM_BAD_WORDS
    assert 2 * MAX_BAD_WORDS_BYTES <= vllm.envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS
