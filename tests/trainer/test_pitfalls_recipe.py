"""What is known to go wrong in such recipes, each with a test that it does not here."""

from __future__ import annotations

import math
import shutil
import sys
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainer.conftest import HOLD_OUT_TWO
from tests.trainer.proxy import Proxy
from tests.trainer.training_run import Ended, adapter_config, read, resolved, start
from trainer.backends import LoadRequest, import_backend
from trainer.checkpoint import folder_of, verified_manifest
from trainer.ending import Failed, ending
from trainer.environment import training_environment
from trainer.events import FailureReason, WorkerEventKind
from trainer.life import EXIT_STORAGE_FULL
from trainer.rows import IGNORED
from trainer.spec import (
    DEFAULT_TARGET_MODULES,
    Backend,
    GradientCheckpointing,
    Optimizer,
    Precision,
    Quantization,
)


def test_pitfalls_both_backends_have_the_same_losses(peft_run: Ended, unsloth_run: Ended) -> None:
    assert len(peft_run.losses) == len(unsloth_run.losses) == 9
    assert peft_run.losses == pytest.approx(unsloth_run.losses, abs=1e-3)
    assert verified_manifest(peft_run.run).rows_sha256 == (
        verified_manifest(unsloth_run.run).rows_sha256
    )


def test_pitfalls_defaults_are_the_recipe(peft_run: Ended) -> None:
    lora, asked = peft_run.effective.lora, peft_run.effective.hyperparameters
    assert (lora.r, lora.alpha, lora.dropout, lora.use_rslora) == (32, 64.0, 0.05, True)
    assert lora.target_modules == DEFAULT_TARGET_MODULES and lora.bias == "none"
    assert (asked.epochs, asked.micro_batch_size, asked.gradient_accumulation) == (3.0, 2, 4)
    assert (asked.learning_rate, asked.weight_decay, asked.max_grad_norm) == (2e-4, 0.01, 0.3)
    assert asked.quantization is Quantization.NF4
    config = adapter_config(folder_of(peft_run.run, 9))
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (32, 64, 0.05)
    assert config["bias"] == "none"


def test_pitfalls_high_rslora_scale_is_told(peft_run: Ended) -> None:
    assert "11.3" in peft_run.notices["RSLORA_SCALE"]


@pytest.mark.parametrize("run", ["peft_run", "unsloth_run"])
def test_pitfalls_optimizer_is_mapped_on_a_cpu(run: str, request: pytest.FixtureRequest) -> None:
    ended: Ended = request.getfixturevalue(run)
    assert "adamw_torch_fused" in ended.notices["OPTIMIZER_MAPPED"]
    assert ended.effective.hyperparameters.optimizer is Optimizer.ADAMW


@pytest.mark.parametrize("run", ["peft_run", "unsloth_run"])
def test_pitfalls_learning_rate_falls_on_a_cosine(run: str, request: pytest.FixtureRequest) -> None:
    ended: Ended = request.getfixturevalue(run)
    rates = [step["learning_rate"] for step in ended.steps]
    expected = [2e-4 * (1 + math.cos(math.pi * step / 9)) / 2 for step in range(9)]
    assert rates == pytest.approx(expected)


def test_pitfalls_nothing_is_counted_or_fetched(
    peft_run: Ended, unsloth_run: Ended, proxy: Proxy
) -> None:
    assert peft_run.code == unsloth_run.code == 0
    assert proxy.asked == []
    # Who asks for something in the environment of such a process is seen.
    environment = training_environment(proxy.environment, peft_run.run)
    handler = urllib.request.ProxyHandler({"https": environment["https_proxy"]})
    with pytest.raises(OSError, match="403 Forbidden"):
        urllib.request.build_opener(handler).open("https://huggingface.co/unsloth")
    assert [line.split()[:2] for line in proxy.asked] == [["CONNECT", "huggingface.co:443"]]
    proxy.asked.clear()


def test_pitfalls_there_is_no_float16() -> None:
    assert {precision.value for precision in Precision} == {"bfloat16", "float32"}


def test_pitfalls_rows_are_padded_to_the_longest_of_the_batch(tiny: Path) -> None:
    from trainer.batches import BatchTokens, Collator

    collator = Collator(tiny)
    rows: list[dict[str, Any]] = [
        {"line": 7, "input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]},
        {"line": 8, "input_ids": [5, 6, 7, 8, 9], "labels": [IGNORED, IGNORED, 7, 8, 9]},
    ]
    batch = collator(rows)
    # Other columns do not reach the model.
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].shape == (2, 5)
    assert batch["input_ids"][0, :3].tolist() == [5, 6, 7]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"][0].tolist() == [IGNORED, 6, 7, IGNORED, IGNORED]
    assert list(collator.made) == [BatchTokens(seen=8, trained=5)]


@pytest.mark.parametrize("backend", list(Backend))
def test_pitfalls_arguments_to_the_trainer(backend: Backend, tmp_path: Path) -> None:
    from trainer.training_loop import training_arguments

    spec = resolved({"hyperparameters": {"warmup_ratio": 0.25, "optimizer": "adamw"}}, backend)
    arguments = training_arguments(spec, tmp_path, steps=10, evaluates=True, on_gpu=False)
    assert arguments.fp16 is False
    assert arguments.logging_nan_inf_filter is False and arguments.logging_steps == 1
    assert arguments.remove_unused_columns is False
    assert arguments.report_to == [] or arguments.report_to == "none"
    assert arguments.dataloader_num_workers == 0
    assert arguments.warmup_steps == 3
    assert arguments.seed == arguments.data_seed == 3407


@pytest.mark.parametrize(("on_gpu", "place"), [(True, 0), (False, "cpu")])
def test_pitfalls_all_of_the_model_is_on_one_device_in_nf4_twice(
    monkeypatch: pytest.MonkeyPatch, on_gpu: bool, place: object
) -> None:
    from transformers import AutoModelForCausalLM

    from trainer.backends.peft import PeftBackend

    class Asked(Exception):
        pass

    def ask(*_: object, **options: Any) -> None:
        assert options["device_map"] == {"": place}
        nf4 = options["quantization_config"]
        assert nf4.load_in_4bit and nf4.bnb_4bit_use_double_quant
        assert nf4.bnb_4bit_quant_type == "nf4"
        assert nf4.bnb_4bit_compute_dtype is torch.bfloat16
        raise Asked

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", ask)
    with pytest.raises(Asked):
        PeftBackend().load(LoadRequest(resolved({}, Backend.PEFT), "/none", on_gpu))


@pytest.mark.parametrize(("on_gpu", "place"), [(True, {"": 0}), (False, None)])
@pytest.mark.parametrize("checkpointing", list(GradientCheckpointing))
def test_pitfalls_unsloth_is_asked_for_exactly_the_model_that_is_named(
    monkeypatch: pytest.MonkeyPatch,
    on_gpu: bool,
    place: object,
    checkpointing: GradientCheckpointing,
) -> None:
    asked: dict[str, Any] = {}

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(name: str, **options: Any) -> tuple[torch.nn.Module, None]:
            asked.update(options, name=name)
            return torch.nn.Module(), None

        @staticmethod
        def get_peft_model(model: torch.nn.Module, **options: Any) -> torch.nn.Module:
            asked.update(adapter=options)
            return model

    # The real one changes torch for the whole process as it is imported.
    stand_in = ModuleType("unsloth")
    monkeypatch.setattr(stand_in, "FastLanguageModel", FastLanguageModel, raising=False)
    monkeypatch.setitem(sys.modules, "unsloth", stand_in)
    name = "trainer.backends.unsloth"
    monkeypatch.setitem(sys.modules, name, ModuleType(name))  # forgotten at the end
    del sys.modules[name]
    fields = {"hyperparameters": {"gradient_checkpointing": checkpointing}}
    spec = resolved(fields, Backend.UNSLOTH)
    import_backend(Backend.UNSLOTH).load(LoadRequest(spec, "Qwen/Qwen3-8B", on_gpu))

    assert asked["name"] == "Qwen/Qwen3-8B"
    assert asked["use_exact_model_name"] is True
    assert asked["device_map"] == place
    assert asked["load_in_4bit"] is True and asked["dtype"] is torch.bfloat16
    assert asked["max_seq_length"] == asked["adapter"]["max_seq_length"] == 512
    assert asked["adapter"]["random_state"] == 3407
    mode = {"unsloth": "unsloth", "standard": True, "off": False}[checkpointing.value]
    assert asked["use_gradient_checkpointing"] == mode
    assert asked["adapter"]["use_gradient_checkpointing"] == mode


def test_pitfalls_activations_are_computed_twice_without_reentering() -> None:
    from trainer.backends.peft import PeftBackend

    class Model:
        """Remembers what it was told."""

        def __init__(self) -> None:
            self.told: list[object] = []

        def gradient_checkpointing_enable(self, **options: object) -> None:
            self.told.append(options)

        def gradient_checkpointing_disable(self) -> None:
            self.told.append("off")

    model = Model()
    for mode in (GradientCheckpointing.STANDARD, GradientCheckpointing.OFF):
        PeftBackend().set_checkpointing(model, mode)
    # Reentrant, it needs inputs with gradients, which frozen embeddings do not give.
    assert model.told == [{"gradient_checkpointing_kwargs": {"use_reentrant": False}}, "off"]


@pytest.mark.parametrize("run", ["peft_run", "unsloth_run"])
def test_pitfalls_nothing_is_computed_twice_on_a_cpu_by_default(
    run: str, request: pytest.FixtureRequest
) -> None:
    ended: Ended = request.getfixturevalue(run)
    used = ended.effective.hyperparameters.gradient_checkpointing
    assert used is GradientCheckpointing.OFF
    assert "GRADIENT_CHECKPOINTING_MAPPED" not in ended.notices


@pytest.mark.slow
class TestWithOtherRuns:
    """Each needs a process of its own."""

    def test_pitfalls_the_same_seed_gives_the_same_losses(
        self, peft_run: Ended, tiny: Path, rows: Path, tmp_path: Path
    ) -> None:
        again = start(tmp_path / "again", tiny, rows, HOLD_OUT_TWO).wait()
        assert again.losses == peft_run.losses
        name = "adapter_model.safetensors"
        assert (
            verified_manifest(again.run).files[name]
            == (verified_manifest(peft_run.run).files[name])
        )
        other = start(tmp_path / "other", tiny, rows, {"hyperparameters": {"seed": 7}}).wait()
        assert other.code == 0 and other.losses[0] != peft_run.losses[0]

    @pytest.mark.parametrize("backend", list(Backend))
    def test_pitfalls_unquantized_float32_with_checkpointing(
        self, backend: Backend, tiny: Path, rows: Path, tmp_path: Path
    ) -> None:
        def train(checkpointing: str) -> Ended:
            fields: dict[str, Any] = {
                "hyperparameters": {
                    "quantization": "none",
                    "precision": "float32",
                    "gradient_checkpointing": checkpointing,
                    "max_steps": 4,
                },
                "lora": {"alpha": 16, "dropout": 0.0},
                "data": {"eval_fraction": 0.0},
                "checkpoints_kept": 1,
            }
            return start(
                tmp_path / checkpointing, tiny, rows, fields, backend=backend,
                served_dtype="bfloat16",
            ).wait()  # fmt: skip

        ended = train("unsloth")
        assert ended.code == 0, ended.log[-3000:]
        assert "GRADIENT_CHECKPOINTING_MAPPED" in ended.notices
        assert "RSLORA_SCALE" not in ended.notices
        effective = ended.effective.hyperparameters
        assert effective.gradient_checkpointing is GradientCheckpointing.STANDARD
        assert [step["step"] for step in ended.steps] == [1, 2, 3, 4]
        saved = ended.payloads(WorkerEventKind.CHECKPOINT)
        assert [(item["step"], item["final"], item["eval_loss"]) for item in saved] == [
            (3, False, None),
            (4, True, None),
        ]
        assert [path.name for path in ended.run.checkpoints.iterdir()] == ["checkpoint-4"]
        weights = load_file(folder_of(ended.run, 4) / "adapter" / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
        # Computing activations twice does not change what is learned.
        assert train("off").losses == pytest.approx(ended.losses, abs=1e-5)

    @pytest.mark.parametrize("backend", list(Backend))
    def test_pitfalls_a_loss_that_is_no_number_ends_the_run_at_its_step(
        self, backend: Backend, tiny: Path, rows: Path, tmp_path: Path
    ) -> None:
        broken = shutil.copytree(tiny, tmp_path / "broken")
        tensors = load_file(broken / "model.safetensors")
        tensors["model.norm.weight"][0] = math.nan
        save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
        ended = start(tmp_path / "run", broken, rows, backend=backend).wait()
        failure = ended.exit.failure
        assert ended.code == 1 and failure is not None
        assert failure.reason is FailureReason.LOSS_DIVERGED
        assert failure.metadata == {"step": "1"} and "learning_rate" in failure.message
        assert ended.losses == [] and not list(ended.run.checkpoints.glob("*"))

    def test_pitfalls_no_checkpoint_is_half_written_when_the_disk_is_full(
        self, tiny: Path, rows: Path, tmp_path: Path
    ) -> None:
        def fill(run: Any) -> None:
            # The second checkpoint's optimizer goes where no byte fits.
            (run.checkpoints / "checkpoint-6").mkdir(parents=True)
            (run.checkpoints / "checkpoint-6" / "optimizer.pt").symlink_to("/dev/full")

        ended = start(tmp_path / "run", tiny, rows, prepare=fill).wait()
        failure = ended.exit.failure
        assert ended.code == 1 and failure is not None, ended.log[-3000:]
        assert failure.reason is FailureReason.STORAGE_FULL and "free some space" in failure.message
        assert [path.name for path in ended.run.checkpoints.iterdir()] == ["checkpoint-3"]
        assert not ended.run.manifest.exists()

    def test_pitfalls_a_disk_without_room_for_a_word_is_told_by_the_exit_code(
        self, tiny: Path, rows: Path, tmp_path: Path
    ) -> None:
        def fill(run: Any) -> None:
            run.events.symlink_to("/dev/full")
            run.exit.with_name("exit.json.new").symlink_to("/dev/full")

        ended = start(tmp_path / "run", tiny, rows, prepare=fill).wait()
        assert ended.code == EXIT_STORAGE_FULL, ended.log[-3000:]
        assert not ended.run.exit.exists() and not ended.run.manifest.exists()
        how = ending(ended.run, ended.code)
        assert isinstance(how, Failed) and how.failure.reason is FailureReason.STORAGE_FULL

    def test_pitfalls_other_errors_are_named_and_their_trace_is_logged(
        self, rows: Path, tmp_path: Path
    ) -> None:
        ended = start(tmp_path / "run", tmp_path / "nothing", rows).wait()
        failure = ended.exit.failure
        assert ended.code == 1 and failure is not None
        assert failure.reason is FailureReason.TRAINER_FAILED
        assert failure.message.count("\n") == 0 and failure.metadata["error"] in failure.message
        assert "Traceback" in read(ended.run.log)
