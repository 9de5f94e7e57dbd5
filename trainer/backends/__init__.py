"""The two libraries that train, behind one seam: they differ in how a model is loaded.

Rows, masks, order, trainer and files are the same for both. A backend's module is imported
before transformers: Unsloth changes libraries as it is imported.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Protocol

from trainer.spec import Backend, GradientCheckpointing, JobSpec


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What to load."""

    spec: JobSpec
    """Effective on the device."""
    model_path: str
    on_gpu: bool


class TrainingBackend(Protocol):
    """Loads models. Implemented by modules of this package."""

    def load(self, request: LoadRequest) -> Any:
        """The base model with a new adapter, ready to be trained.

        Raises RunFailed if the base model is not quantized as asked.
        """

    def set_checkpointing(self, model: Any, checkpointing: GradientCheckpointing) -> None:
        """Change what a loaded model does with activations."""


def import_backend(backend: Backend) -> TrainingBackend:
    """The backend's module. Call it before anything else imports transformers."""
    module: Any = importlib.import_module(f"{__name__}.{backend.value}")
    return module.BACKEND  # type: ignore[no-any-return]


def peft_alpha(spec: JobSpec) -> int | float:
    """Alpha as PEFT's config has it, which knows whole numbers only; it computes with any."""
    assert spec.lora.alpha is not None
    return int(spec.lora.alpha) if spec.lora.alpha.is_integer() else spec.lora.alpha
