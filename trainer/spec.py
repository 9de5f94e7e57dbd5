"""What a job is asked to do, and what of it is really done.

A `JobSpec` has None where its owner left a field to us; `resolved` fills every field. The same
types are stored with a job, read by the training process, and told by the contract
(`training.proto` has meanings, units and limits of each field).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

DEFAULT_TARGET_MODULES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
DEFAULT_SEQUENCE_TOKENS = 2048
DEFAULT_ROW_TOKENS = 1800
"""Of DEFAULT_SEQUENCE_TOKENS; that share of another limit."""
MAX_TARGET_MODULES, MAX_MODULE_CHARACTERS = 64, 128
MAX_BASE_MODEL_CHARACTERS = 256
MAX_BIAS_CHARACTERS = 32
MAX_ACCUMULATION = 1024
DEFAULT_MAX_ATTEMPTS = 3


class DatasetFormat(enum.Enum):
    """How a line is laid out."""

    CHAT = "chat"
    PROMPT_COMPLETION = "prompt_completion"
    ALPACA = "alpaca"


class LossMask(enum.Enum):
    """Which tokens are trained on."""

    ASSISTANT = "assistant"
    LAST_ASSISTANT = "last_assistant"
    ALL = "all"


class OverlengthPolicy(enum.Enum):
    """What becomes of rows that have too many tokens."""

    DROP = "drop"
    TRUNCATE_TURNS = "truncate_turns"


class Backend(enum.Enum):
    """What trains."""

    UNSLOTH = "unsloth"
    PEFT = "peft"


class Quantization(enum.Enum):
    """How the base model's weights are held while training."""

    NF4 = "nf4"
    NONE = "none"


class Precision(enum.Enum):
    """What is computed in. There is no float16."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class Optimizer(enum.Enum):
    """What updates the adapter's weights."""

    ADAMW_8BIT = "adamw_8bit"
    ADAMW = "adamw"


class LearningRateSchedule(enum.Enum):
    """The learning rate's way after warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


class GradientCheckpointing(enum.Enum):
    """Saves memory by computing activations twice."""

    UNSLOTH = "unsloth"
    STANDARD = "standard"
    OFF = "off"


class Fields(BaseModel):
    """Base of all parts: immutable, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def filled(self, **defaults: object) -> Self:
        """A copy in which fields that are None have the given values."""
        unset = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return self.model_copy(update=unset)


class Hyperparameters(Fields):
    """Of one run."""

    epochs: Annotated[float, Field(gt=0, le=1000)] | None = None
    max_steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """None also when resolved: as many as the epochs have."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    learning_rate_schedule: LearningRateSchedule | None = None
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    micro_batch_size: Annotated[int, Field(ge=1, le=1024)] | None = None
    gradient_accumulation: Annotated[int, Field(ge=1, le=MAX_ACCUMULATION)] | None = None
    fit_micro_batch: bool | None = None
    weight_decay: Annotated[float, Field(ge=0, le=1)] | None = None
    max_grad_norm: Annotated[float, Field(ge=0, le=1000)] | None = None
    optimizer: Optimizer | None = None
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None
    quantization: Quantization | None = None
    precision: Precision | None = None
    gradient_checkpointing: GradientCheckpointing | None = None


def _unique(names: Sequence[str]) -> Sequence[str]:
    if len(set(names)) != len(names):
        raise PydanticCustomError("unique", "must name each module once")
    return names


TargetModules = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=MAX_MODULE_CHARACTERS)], ...],
    Field(max_length=MAX_TARGET_MODULES),
    AfterValidator(_unique),
]
"""Few and short: each is looked for among all modules of the base model."""


class LoraSpec(Fields):
    """The adapter's shape."""

    r: Annotated[int, Field(ge=1, le=512)] | None = None
    alpha: Annotated[float, Field(gt=0, le=4096)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    use_rslora: bool | None = None
    target_modules: TargetModules = ()
    bias: Annotated[str, Field(max_length=MAX_BIAS_CHARACTERS)] = "none"

    @property
    def scale(self) -> float:
        """What the adapter's output is multiplied with, of a resolved spec."""
        assert self.r is not None and self.alpha is not None
        return self.alpha / (self.r**0.5 if self.use_rslora else self.r)


class AdapterVersionSource(Fields):
    """A version of an adapter."""

    adapter: str = ""
    version: Annotated[int, Field(ge=1)] | None = None
    """None: the one with the most traffic."""


class CheckpointSource(Fields):
    """A checkpoint of a job."""

    job: str = ""
    step: Annotated[int, Field(ge=1)] | None = None
    """None: the newest."""


class InitFrom(Fields):
    """What an adapter begins with: one of the two."""

    adapter_version: AdapterVersionSource | None = None
    checkpoint: CheckpointSource | None = None
    weights_sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    """Of the file that is taken; empty in a request: any."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.adapter_version is None) == (self.checkpoint is None):
            raise PydanticCustomError("one", "must name an adapter_version or a checkpoint")
        return self

    @property
    def text(self) -> str:
        """`ADAPTER@VERSION`, or `JOB/STEP`; no name has such a character."""
        if self.adapter_version is not None:
            return _joined(self.adapter_version.adapter, "@", self.adapter_version.version)
        assert self.checkpoint is not None
        return _joined(self.checkpoint.job, "/", self.checkpoint.step)


def _joined(name: str, mark: str, number: int | None) -> str:
    return name if number is None else f"{name}{mark}{number}"


class DataSpec(Fields):
    """How a dataset becomes rows of tokens."""

    format: DatasetFormat | None = None
    """None also when resolved: to be detected."""
    max_bad_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    max_sequence_tokens: Annotated[int, Field(ge=16)] | None = None
    overlength: OverlengthPolicy | None = None
    max_row_tokens: Annotated[int, Field(ge=1)] | None = None
    reserve_tokens: Annotated[int, Field(ge=0)] | None = None
    loss_mask: LossMask | None = None
    eval_fraction: Annotated[float, Field(ge=0, le=0.5)] | None = None
    eval_dataset: str = ""

    def resolved(self, *, max_model_len: int, format: DatasetFormat | None = None) -> DataSpec:
        """Every field set, for a server of this context; `format` is the dataset's own."""
        sequence_tokens = self.max_sequence_tokens or min(DEFAULT_SEQUENCE_TOKENS, max_model_len)
        return self.filled(
            format=format,
            max_bad_ratio=0.05,
            max_sequence_tokens=sequence_tokens,
            overlength=OverlengthPolicy.DROP,
            max_row_tokens=max(1, sequence_tokens * DEFAULT_ROW_TOKENS // DEFAULT_SEQUENCE_TOKENS),
            reserve_tokens=min(50, sequence_tokens - 1),
            loss_mask=LossMask.ASSISTANT,
            eval_fraction=0.05,
        )


class GateSpec(Fields):
    """What an adapter must show in the engine. None: not limited, once resolved."""

    max_logprob_delta_mean: Annotated[float, Field(gt=0)] | None = None
    max_logprob_delta: Annotated[float, Field(gt=0)] | None = None
    max_eval_loss_ratio: Annotated[float, Field(gt=0)] | None = None
    max_eval_loss: Annotated[float, Field(gt=0)] | None = None
    min_effect_ratio: Annotated[float, Field(ge=0, le=1)] | None = None

    def resolved(self, hyperparameters: Hyperparameters, served_dtype: str) -> GateSpec:
        """Limits filled in, for resolved hyperparameters and what the engine computes in.

        Measured on SmolLM2-135M: 2e-6 nats a token on average where both compute alike in
        float32, 0.02 to 0.06 where one rounds to bfloat16, and from a base of 4 bits to one of 16
        between 0.7 for an adapter that has learned nothing and 0.02 for one that has learned its
        rows. One that the engine ignores is off by what it is worth, which may be less: see
        `engine/gate.py` for what shows it.
        """
        exact = hyperparameters.precision is Precision.FLOAT32 and served_dtype == "float32"
        if hyperparameters.quantization is not Quantization.NONE:
            mean, worst = 1.0, None
        elif exact:
            mean, worst = 0.01, 0.1
        else:
            mean, worst = 0.2, None
        return self.filled(
            max_logprob_delta_mean=mean,
            max_logprob_delta=worst,
            max_eval_loss_ratio=1.0,
            min_effect_ratio=0.5,
        )


class PublishSpec(Fields):
    """What becomes of the adapter."""

    traffic_percent: Annotated[int, Field(ge=0, le=100)] = 0
    gate: GateSpec = GateSpec()


class JobSpec(Fields):
    """All that a job is asked to do."""

    dataset: str
    adapter: str
    hyperparameters: Hyperparameters = Hyperparameters()
    lora: LoraSpec = LoraSpec()
    publish: PublishSpec | None = None
    data: DataSpec = DataSpec()
    backend: Backend | None = None
    base_model: Annotated[str, Field(max_length=MAX_BASE_MODEL_CHARACTERS)] = ""
    cancel_grace_s: Annotated[float, Field(ge=0, le=600)] | None = None
    checkpoints_kept: Annotated[int, Field(ge=1, le=100)] | None = None
    checkpoint_interval_s: Annotated[float, Field(ge=1, le=24 * 3600)] | None = None
    max_attempts: Annotated[int, Field(ge=1, le=100)] | None = None
    init_from: InitFrom | None = None
    """None also when resolved: a new adapter. Else every field set, and `lora` is the source's."""

    def resolved(
        self,
        *,
        base_model: str,
        max_model_len: int,
        served_dtype: str,
        backend: Backend,
        on_gpu: bool,
        bfloat16: bool = True,
        format: DatasetFormat | None = None,
    ) -> JobSpec:
        """Every field set by the recipe, as far as it is known before a device is held.

        `bfloat16`: the device computes in it. A CPU that does not trains in float32, and what
        depends on the precision is told of that; a GPU that does not has to refuse.
        """
        hyperparameters = self.hyperparameters.filled(
            epochs=3.0,
            learning_rate=2e-4,
            learning_rate_schedule=LearningRateSchedule.COSINE,
            warmup_ratio=0.0,
            micro_batch_size=2,
            gradient_accumulation=4,
            fit_micro_batch=on_gpu,
            weight_decay=0.01,
            max_grad_norm=0.3,
            optimizer=Optimizer.ADAMW_8BIT,
            seed=3407,
            quantization=Quantization.NF4,
            precision=Precision.BFLOAT16,
            gradient_checkpointing=(
                GradientCheckpointing.UNSLOTH if on_gpu else GradientCheckpointing.OFF
            ),
        )
        if hyperparameters.precision is Precision.BFLOAT16 and not (bfloat16 or on_gpu):
            hyperparameters = hyperparameters.model_copy(update={"precision": Precision.FLOAT32})
        lora = self.lora.filled(r=32, alpha=64.0, dropout=0.05, use_rslora=True)
        if not lora.target_modules:
            lora = lora.model_copy(update={"target_modules": DEFAULT_TARGET_MODULES})
        publish = self.publish
        if publish is not None:
            gate = publish.gate.resolved(hyperparameters, served_dtype)
            publish = publish.model_copy(update={"gate": gate})
        return self.model_copy(
            update={
                "hyperparameters": hyperparameters,
                "lora": lora,
                "publish": publish,
                "data": self.data.resolved(max_model_len=max_model_len, format=format),
                "base_model": base_model,
                "backend": self.backend or backend,
                "cancel_grace_s": 10.0 if self.cancel_grace_s is None else self.cancel_grace_s,
                "checkpoints_kept": self.checkpoints_kept or 2,
                "checkpoint_interval_s": self.checkpoint_interval_s or 600.0,
                "max_attempts": self.max_attempts or DEFAULT_MAX_ATTEMPTS,
            }
        )
