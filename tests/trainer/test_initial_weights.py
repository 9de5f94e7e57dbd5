"""A run that begins with the weights of another, with both libraries that train."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from engine.models import resolve_model
from tests.trainer.training_run import STARTED, Ended, start, write_rows
from trainer.checkpoint import folder_of, sha256_of, steps_of
from trainer.events import FailureReason, WorkerEventKind
from trainer.failure import RunFailed
from trainer.initial_weights import begin_with, put_weights
from trainer.run_folder import RunFolder
from trainer.spec import Backend, CheckpointSource, InitFrom

EXACT = {"precision": "float32", "quantization": "none"}
ROWS = 8
"""Of the dataset that the first run evaluates and the others begin with, all in one batch: so the
loss of their first step is what an evaluation measures."""
ONE_STEP: dict[str, Any] = {
    "hyperparameters": {
        **EXACT,
        "max_steps": 1,
        "warmup_ratio": 1.0,  # the first step has a learning rate of 0
        "micro_batch_size": ROWS,
        "gradient_accumulation": 1,
    },
    "lora": {"dropout": 0.0},
    "data": {"eval_fraction": 0.0},
}


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Ends training processes of a test that failed."""
    yield
    while STARTED:
        STARTED.pop().kill()


def small_model(rank: int = 2) -> Any:
    """An adapter on a model of one layer, in this process."""
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    return get_peft_model(
        LlamaForCausalLM(config),
        LoraConfig(r=rank, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def write_weights(path: Path, dtype: torch.dtype = torch.float32, rank: int = 2) -> Path:
    """Of an adapter like that of `small_model`, every weight another."""
    tensors = weights_of(small_model(rank))
    for number, name in enumerate(tensors, 1):
        values = torch.arange(tensors[name].numel(), dtype=torch.float32) / 7 + number
        tensors[name] = values.reshape(tensors[name].shape).to(dtype)
    save_file(tensors, path)
    return path


def named(file: Path) -> InitFrom:
    return InitFrom(checkpoint=CheckpointSource(job="one", step=3), weights_sha256=sha256_of(file))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_weights_are_replaced_and_keep_the_type_that_they_are_trained_in(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    file, model = write_weights(tmp_path / "weights", dtype), small_model()
    begin_with(model, file, named(file))
    theirs, ours = load_file(file), weights_of(model)
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        assert tensor.dtype is torch.float32 and torch.equal(tensor, theirs[name].float())


def test_a_file_that_is_not_what_the_job_was_created_with_is_refused(tmp_path: Path) -> None:
    file, model = write_weights(tmp_path / "weights"), small_model()
    before, init_from = weights_of(model), named(file)
    write_weights(file, torch.bfloat16)
    with pytest.raises(RunFailed) as failed:
        begin_with(model, file, init_from)
    assert failed.value.failure.reason is FailureReason.INIT_FROM_UNUSABLE
    assert failed.value.failure.metadata == {"init_from": "one/3"}
    assert not failed.value.failure.retryable, "the file stays what it is"
    file.unlink()
    with pytest.raises(RunFailed):
        begin_with(model, file, init_from)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(model).items())


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    model = small_model()
    with pytest.raises(ValueError, match="another adapter"):
        put_weights(model, write_weights(tmp_path / "wider", rank=4))
    tensors = load_file(write_weights(tmp_path / "weights"))
    tensors.popitem()
    save_file(tensors, tmp_path / "fewer")
    with pytest.raises(ValueError, match="another adapter"):
        put_weights(model, tmp_path / "fewer")


def ended(run: Any) -> Ended:
    found: Ended = run.wait()
    assert found.code == 0, found.log[-3000:]
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", list(Backend))
def test_the_first_step_computes_what_the_last_evaluation_did(
    backend: Backend, tmp_path: Path
) -> None:
    tiny = resolve_model("tiny", tmp_path / "models")
    rows = write_rows(tmp_path / "rows")
    others = write_rows(tmp_path / "others", ROWS)
    fields: dict[str, Any] = {"hyperparameters": {**EXACT, "epochs": 4, "learning_rate": 2e-3}}
    before = ended(
        start(tmp_path / "before", tiny, rows, fields, backend=backend, eval_rows=str(others))
    )
    folder = folder_of(before.run, steps_of(before.run)[-1])
    told = before.payloads(WorkerEventKind.PROGRESS)
    [*_, eval_loss] = (one["eval_loss"] for one in told if one["eval_loss"] is not None)

    losses, kept = {}, {}
    served = folder / "adapter" / "adapter_model.safetensors"
    half = tmp_path / "bfloat16.safetensors"  # as it would be served
    save_file({name: t.bfloat16() for name, t in load_file(served).items()}, half)
    for name, file in {"checkpoint": folder / served.name, "bfloat16": half, "new": None}.items():
        changed = {} if file is None else {"init_from": named(file).model_dump()}
        run = start(
            tmp_path / name, tiny, others, {**ONE_STEP, **changed}, backend=backend, initial=file
        )
        after = ended(run)
        [losses[name]] = after.losses
        kept[name] = load_file(folder_of(after.run, 1) / served.name)

    # An attempt that goes on has its checkpoint, and needs nothing else.
    further = {"hyperparameters": {**ONE_STEP["hyperparameters"], "max_steps": 2}}
    goes_on = start(
        tmp_path / "goes_on",
        tiny,
        others,
        {**ONE_STEP, **further, "init_from": named(folder / served.name).model_dump()},
        backend=backend,
        resume=str(folder_of(RunFolder(tmp_path / "checkpoint"), 1)),
    )
    assert [step["step"] for step in ended(goes_on).steps] == [2]

    theirs = load_file(folder / served.name)
    assert theirs.keys() == kept["checkpoint"].keys()
    for name, tensor in theirs.items():
        assert torch.equal(tensor, kept["checkpoint"][name]), name
    assert losses["checkpoint"] == pytest.approx(eval_loss, rel=1e-5)
    assert losses["bfloat16"] == pytest.approx(eval_loss, rel=1e-2)
    assert abs(losses["new"] - eval_loss) > 0.1
    print(
        f"{backend.value}: last evaluation {eval_loss:.6f}; first steps: "
        + ", ".join(f"{name} {loss:.6f}" for name, loss in losses.items())
    )
