"""How much of a device's memory a run takes, by formula. Pure; an estimate, not a promise."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.micro_batch import Probe, Shape, fit
from trainer.model_size import ModelSize
from trainer.spec import (
    Backend,
    GradientCheckpointing,
    JobSpec,
    Optimizer,
    Precision,
    Quantization,
)

NF4_BYTES = 4.5 / 8
"""Of a weight in 4 bits, with its share of the scales."""
WIDTH_BYTES = {Precision.BFLOAT16: 2, Precision.FLOAT32: 4}
MASTER_BYTES, GRADIENT_BYTES = 4, 4
"""Of a weight of the adapter, which is trained in float32."""
OPTIMIZER_BYTES = {Optimizer.ADAMW_8BIT: 2, Optimizer.ADAMW: 8}
"""AdamW's two numbers of a weight."""
LIBRARIES_GPU_BYTES, LIBRARIES_CPU_BYTES = 700 * 1024**2, 900 * 1024**2
"""A CUDA context with its kernels; PyTorch and Unsloth in a process's memory."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """What the kernels of a backend keep of each token for the backward pass."""

    layer_hidden: int
    layer_intermediate: int
    """Of a layer: vectors of these two lengths."""
    logit_copies: float
    """Of the logits in float32, while the loss is computed."""


STOCK = Kernels(layer_hidden=14, layer_intermediate=4, logit_copies=3.0)
"""PyTorch's. Of logits: themselves, softmax, gradient."""
FUSED = Kernels(layer_hidden=11, layer_intermediate=2, logit_copies=0.35)
"""Unsloth's on a GPU, which also computes the loss piece by piece; from what docs/benchmarks.md
measured."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of one run of an effective spec."""

    spec: JobSpec
    size: ModelSize
    longest_row_tokens: int
    on_gpu: bool

    def total_bytes(self, shape: Shape) -> int:
        """All that the process takes when it computes in this shape."""
        return self._fixed_bytes + self._step_bytes(shape) + self._libraries_bytes

    def fitted(self, limit_bytes: int) -> Shape | None:
        """What the trainer would find to fit into a limit; None: not even one row does."""
        # More rows at once are faster. By how much is no matter where all others are equal.
        return fit(
            self.spec.hyperparameters,
            limit_bytes,
            self._seen_bytes(0),
            lambda shape: Probe(
                self._seen_bytes(self._step_bytes(shape)), float(shape.micro_batch_size)
            ),
        )

    def _seen_bytes(self, step_bytes: int) -> int:
        """What the trainer measures: on a GPU what PyTorch has allocated there."""
        libraries = 0 if self.on_gpu else self._libraries_bytes
        return self._fixed_bytes + step_bytes + libraries

    @property
    def _libraries_bytes(self) -> int:
        return LIBRARIES_GPU_BYTES if self.on_gpu else LIBRARIES_CPU_BYTES

    @property
    def _width_bytes(self) -> int:
        assert self.spec.hyperparameters.precision
        return WIDTH_BYTES[self.spec.hyperparameters.precision]

    @property
    def _fixed_bytes(self) -> int:
        """Weights, and what the optimizer has of the adapter's."""
        asked, lora, size = self.spec.hyperparameters, self.spec.lora, self.size
        assert asked.optimizer and lora.r
        quantized = asked.quantization is Quantization.NF4
        linear = size.linear * (NF4_BYTES if quantized else self._width_bytes)
        adapter = size.adapter_parameters(lora.r, lora.target_modules)
        trained = adapter * (MASTER_BYTES + GRADIENT_BYTES + OPTIMIZER_BYTES[asked.optimizer])
        return round(linear + size.other * self._width_bytes + trained)

    def _step_bytes(self, shape: Shape) -> int:
        """What rows take that are computed at once."""
        size = self.size
        kernels = FUSED if self.on_gpu and self.spec.backend is Backend.UNSLOTH else STOCK
        tokens = shape.micro_batch_size * self.longest_row_tokens
        layer = tokens * (
            kernels.layer_hidden * size.hidden + kernels.layer_intermediate * size.intermediate
        )
        match shape.checkpointing:
            case GradientCheckpointing.OFF:
                numbers = layer * size.layers
            case GradientCheckpointing.UNSLOTH:
                numbers = layer  # what is kept of the others goes to the host
            case GradientCheckpointing.STANDARD:
                numbers = layer + tokens * size.hidden * size.layers
        logits = tokens * size.vocabulary * 4 * kernels.logit_copies
        return round(numbers * self._width_bytes + logits)
