"""Real training on the tiny model, by both backends, in processes of their own."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from engine.base_model import fingerprints
from tests.trainer.training_run import Ended, adapter_config
from trainer.backends.quantization import keep_trainable_on_cpu
from trainer.checkpoint import CheckpointCorrupt, folder_of, verified_manifest, verify
from trainer.events import WorkerEventKind
from trainer.reference import Reference
from trainer.rows import IGNORED
from trainer.spec import DEFAULT_TARGET_MODULES


@pytest.fixture(params=["peft_run", "unsloth_run"])
def ended(request: pytest.FixtureRequest) -> Ended:
    run: Ended = request.getfixturevalue(request.param)
    assert run.code == 0, run.log[-3000:]
    return run


def test_a_run_ends_well_and_learns(ended: Ended) -> None:
    assert ended.exit.ok and not ended.exit.stopped
    # 24 rows less two that are held out, 8 a step, 3 epochs.
    assert [step["step"] for step in ended.steps] == list(range(1, 10))
    assert ended.losses[-1] < ended.losses[0] - 0.2


def test_events_come_in_order_and_without_a_gap(ended: Ended) -> None:
    events = ended.events
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    kinds = [event.kind for event in events]
    loaded = kinds.index(WorkerEventKind.LOADED)
    assert set(kinds[:loaded]) == {WorkerEventKind.NOTICE}
    epoch = [WorkerEventKind.PROGRESS] * 4 + [WorkerEventKind.CHECKPOINT]
    assert kinds[loaded + 1 :] == epoch * 3
    assert ended.run.alive.exists()


def test_progress_tells_tokens_time_and_memory(ended: Ended) -> None:
    last = ended.steps[-1]
    manifest = verified_manifest(ended.run)
    assert last["total_steps"] == last["step"] == 9 and last["epoch"] == 3.0
    assert 0 < last["trained_tokens"] < last["tokens_seen"]
    assert ended.steps[0]["tokens_seen"] * 3 < last["tokens_seen"] * 2
    assert last["tokens_per_second"] > 0 and last["eta_s"] == 0 and last["elapsed_s"] > 0
    assert 0 < last["memory_bytes"] <= last["memory_peak_bytes"]
    assert ended.steps[0]["eta_s"] > 0
    assert manifest.final_loss == last["loss"]


def test_tokens_are_counted_as_rows_have_them(ended: Ended, rows: Path) -> None:
    table = pq.read_table(rows / "rows.parquet")
    lengths = [len(ids) for ids in table["input_ids"].to_pylist()]
    trained = [sum(x != IGNORED for x in row[1:]) for row in table["labels"].to_pylist()]
    last = ended.steps[-1]
    pairs = itertools.combinations(zip(lengths, trained, strict=True), 2)
    # Three times all of them but the two that are held out.
    assert (last["tokens_seen"], last["trained_tokens"]) in {
        (3 * (sum(lengths) - one[0] - two[0]), 3 * (sum(trained) - one[1] - two[1]))
        for one, two in pairs
    }


def test_held_out_rows_are_evaluated_after_each_epoch(ended: Ended) -> None:
    progress = ended.payloads(WorkerEventKind.PROGRESS)
    measured = [(item["step"], item["eval_loss"]) for item in progress if item["loss"] is None]
    assert [step for step, _ in measured] == [3, 6, 9]
    assert [item["eval_loss"] for item in ended.payloads(WorkerEventKind.CHECKPOINT)] == [
        loss for _, loss in measured
    ]


def test_the_eval_loss_is_of_tokens_and_not_of_rows(ended: Ended) -> None:
    folder = folder_of(ended.run, 9)
    reference = Reference.model_validate_json((folder / "reference.json").read_text())
    logprobs = [logprob for row in reference.rows for logprob in row.logprobs]
    assert len(reference.rows) == 2 and reference.held_out
    assert verify(folder).eval_loss == pytest.approx(-sum(logprobs) / len(logprobs), abs=0.02)


def test_pitfalls_each_epoch_is_saved_and_the_newest_two_are_kept_whole(ended: Ended) -> None:
    saved = ended.payloads(WorkerEventKind.CHECKPOINT)
    assert [(item["step"], item["final"]) for item in saved] == [(3, False), (6, False), (9, True)]
    assert saved[-1]["folder"] == "attempts/1/checkpoints/checkpoint-9"
    assert sorted(path.name for path in ended.run.checkpoints.iterdir()) == [
        "checkpoint-6",
        "checkpoint-9",
    ]
    folder = folder_of(ended.run, 9)
    manifest = verify(folder)
    assert manifest.eval_loss == saved[-1]["eval_loss"]
    assert manifest.size_bytes == saved[-1]["size_bytes"]
    assert (
        hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest() == saved[-1]["sha256"]
    )
    for needed in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        assert needed in manifest.files


def test_pitfalls_the_manifest_tells_where_the_adapter_comes_from(ended: Ended, tiny: Path) -> None:
    manifest = verified_manifest(ended.run)
    assert manifest.dataset_sha256 == "d" * 64
    assert manifest.base_model == "tiny" and manifest.seed == 3407 and manifest.device
    assert manifest.base_model == adapter_config(folder_of(ended.run, 9))["base_model_name_or_path"]
    assert manifest.fingerprints == asdict(fingerprints(tiny))
    assert all(manifest.fingerprints.values())
    assert {"torch", "transformers", "peft"} <= set(manifest.versions)
    assert manifest.checkpoint.step == 9 and manifest.checkpoint.final
    assert manifest.effective_spec == ended.effective.model_dump(mode="json")
    adapter = folder_of(ended.run, 9) / "adapter"
    assert dict(manifest.files) == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in adapter.iterdir()
    }


def test_pitfalls_the_adapter_is_saved_as_it_is_served(ended: Ended, tiny: Path) -> None:
    folder = folder_of(ended.run, 9)
    config = adapter_config(folder)
    assert config["base_model_name_or_path"] == "tiny" and config["inference_mode"] is True
    assert config["target_modules"] == sorted(DEFAULT_TARGET_MODULES)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (32, 64, True)
    assert config["bias"] == "none" and config["modules_to_save"] is None
    assert str(tiny) not in (folder / "adapter" / "adapter_config.json").read_text()
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    layers = AutoConfig.from_pretrained(tiny).num_hidden_layers
    assert len(tensors) == 2 * 7 * layers
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in tensors)
    assert any(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name)


def test_pitfalls_the_exact_tokenizer_is_saved_with_the_adapter(ended: Ended, tiny: Path) -> None:
    adapter = folder_of(ended.run, 9) / "adapter"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (adapter / name).read_bytes() == (tiny / name).read_bytes()


def test_the_reference_is_what_the_saved_adapter_says(ended: Ended, tiny: Path) -> None:
    folder = folder_of(ended.run, 9)
    reference = Reference.model_validate_json((folder / "reference.json").read_text())
    assert reference.held_out and reference.trained_as == "nf4/bfloat16"
    row = max(reference.rows, key=lambda row: len(row.positions))
    base = AutoModelForCausalLM.from_pretrained(
        tiny,
        dtype=torch.bfloat16,
        device_map="cpu",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    keep_trainable_on_cpu(base)
    ids = torch.tensor([row.token_ids])

    def logprobs(model: Any) -> list[float]:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            said = torch.log_softmax(model(input_ids=ids).logits[0].float(), dim=-1)
        return [float(said[at - 1, row.token_ids[at]]) for at in row.positions]

    without = logprobs(base)
    adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
    assert list(row.logprobs) == pytest.approx(logprobs(adapted), abs=0.02)
    assert list(row.logprobs) != pytest.approx(without, abs=0.1)
    assert row.base_logprobs is not None, "and what the model says without it"
    assert list(row.base_logprobs) == pytest.approx(without, abs=0.02)


def test_a_changed_file_is_found(ended: Ended, tmp_path: Path) -> None:
    copy = shutil.copytree(folder_of(ended.run, 9), tmp_path / "checkpoint-9")
    verify(copy)
    weights = copy / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointCorrupt, match=r"adapter_model\.safetensors"):
        verify(copy)


def test_nothing_is_left_of_the_rows(ended: Ended) -> None:
    assert not (ended.run.path / "rows").exists()
