"""What the plugin replaces in vLLM, on vLLM's own parts and without an engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from engine import core_plugin
from engine.core import STAGING

HIDDEN, RANK = 8, 2


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    core_plugin.register()
    core_plugin.register()  # vLLM may do it more than once


@pytest.mark.parametrize("kernel", ["bgmv_expand", "bgmv_expand_slice"])
def test_rows_without_an_adapter_stay_as_they_are(kernel: str) -> None:
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, HIDDEN, RANK, generator=generator)  # both slots are in use
    inputs = torch.randn(3, RANK, generator=generator)
    inputs[1] = torch.nan  # what the last slot made of the base model's row
    before = torch.randn(3, HIDDEN, generator=generator)
    output = before.clone()
    rest = (0, HIDDEN) if kernel.endswith("slice") else ()
    assert getattr(punica_cpu, kernel) is getattr(lora_ops, kernel)
    getattr(lora_ops, kernel)(inputs, weights, output, torch.tensor([0, -1, 1]), *rest)
    assert torch.equal(output[1], before[1])
    assert torch.allclose(output[0], before[0] + weights[0] @ inputs[0])
    assert torch.allclose(output[2], before[2] + weights[1] @ inputs[2])


def test_prefill_goes_through_the_mended_kernel() -> None:
    from vllm.lora.ops.torch_ops import lora_ops

    weights, output = torch.ones(2, HIDDEN, RANK), torch.zeros(5, HIDDEN)
    # Two sequences of 2 and 3 tokens: the base model's, and one of the adapter in slot 0.
    start, lengths, indices = torch.tensor([0, 2]), torch.tensor([2, 3]), torch.tensor([-1, 0])
    lora_ops.sgmv_expand(
        torch.ones(5, RANK), weights, output, start, lengths, indices, 2, 3, 5, add_inputs=True
    )
    assert torch.equal(output[:2], torch.zeros(2, HIDDEN))
    assert torch.equal(output[2:], torch.full((3, HIDDEN), float(RANK)))


def test_a_core_sleeps_with_its_weights_and_wakes_without_adapters() -> None:
    calls: list[object] = []

    def sleep(level: int, mode: str) -> str:
        calls.append((level, mode))
        return "when it sleeps"

    core = SimpleNamespace(
        vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(worker_extension_cls=STAGING)),
        model_executor=SimpleNamespace(collective_rpc=calls.append),
        sleep=sleep,
        wake_up=calls.append,
        list_loras=lambda: {3, 7},
        remove_lora=calls.append,
    )
    assert core_plugin.gateway_sleep(core) == "when it sleeps", "the answer waits for it"
    core_plugin.gateway_wake(core)
    assert calls[:3] == ["gateway_rest", (1, "abort"), None] and {*calls[3:]} == {3, 7}
    calls.clear()
    core.vllm_config.parallel_config.worker_extension_cls = ""
    core_plugin.gateway_sleep(core)
    assert calls == [(1, "abort")], "no such method in vLLM's own workers"


def test_blocks_are_always_zeroed_before_use() -> None:
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    config = KVCacheConfig(num_blocks=1, kv_cache_tensors=[], kv_cache_groups=[])
    assert config.needs_kv_cache_zeroing
    for runner in (CPUModelRunner, GPUModelRunner):
        assert callable(runner._zero_block_ids)


def test_logits_are_those_of_the_base_head() -> None:
    from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA

    asked = []

    def get_logits(hidden_states: object, head: object, bias: object, skip: object) -> str:
        asked.append((hidden_states, head, bias, skip))
        return "logits"

    layer = SimpleNamespace(base_layer=SimpleNamespace(_get_logits=get_logits))
    plain, wrapped = SimpleNamespace(), SimpleNamespace(base_layer="plain head")
    answer = LogitsProcessorWithLoRA._get_logits
    assert answer(layer, "rows", plain) == "logits"  # type: ignore[arg-type]
    assert answer(layer, "rows", wrapped, "bias", True) == "logits"  # type: ignore[arg-type]
    assert asked == [("rows", plain, None, False), ("rows", "plain head", "bias", True)]


def test_amx_is_asked_for_in_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor that has it, an engine in bfloat16 ends with SIGILL without."""
    asked: list[bool] = []
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: asked.append(True))
    core_plugin.register()
    assert asked
