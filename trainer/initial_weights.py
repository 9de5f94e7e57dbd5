"""Puts weights into the adapter of a loaded model: what a run goes on with, or begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from trainer.checkpoint import sha256_of
from trainer.events import FailureReason, JobFailure
from trainer.failure import RunFailed
from trainer.spec import InitFrom


def put_weights(model: Any, file: Path) -> None:
    """Replace all weights of the adapter; they keep the type that they are trained in.

    Raises ValueError if the file is of an adapter of another shape.
    """
    saved = load_file(file)
    ours = get_peft_model_state_dict(model, save_embedding_layers=False)
    shapes = {name: tensor.shape for name, tensor in ours.items()}
    if {name: tensor.shape for name, tensor in saved.items()} != shapes:
        raise ValueError(f"{file} has the weights of another adapter")
    set_peft_model_state_dict(model, saved)


def begin_with(model: Any, file: Path, init_from: InitFrom) -> None:
    """Replace all weights of a new adapter by those that the job begins with.

    Raises RunFailed if the file is not the one that the job was created with.
    """
    try:
        if sha256_of(file) != init_from.weights_sha256:
            raise ValueError(f"{file} has another sha256 than the job was created with")
        put_weights(model, file)
    except (OSError, ValueError) as error:
        raise RunFailed(
            JobFailure(
                reason=FailureReason.INIT_FROM_UNUSABLE,
                message=f"the weights of {init_from.text}, which were kept with the job, are "
                "damaged: create the job again",
                metadata={"init_from": init_from.text},
            )
        ) from error
