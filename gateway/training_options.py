"""Options of the commands that train, and the values of the contract that they stand for."""

from __future__ import annotations

import enum
from typing import Annotated

import typer

from lora_gateway import (
    AdapterVersionSource,
    Backend,
    CheckpointSource,
    DatasetFormat,
    InitFrom,
    JobState,
    Precision,
    PublishSpec,
    Quantization,
)


class FormatName(enum.StrEnum):
    """The formats of the contract, as they are typed."""

    CHAT = "chat"
    PROMPT_COMPLETION = "prompt_completion"
    ALPACA = "alpaca"

    @property
    def message(self) -> DatasetFormat.ValueType:
        """As the contract has it."""
        return DatasetFormat.Value(f"DATASET_FORMAT_{self.name}")


class BackendName(enum.StrEnum):
    """The backends of the contract, as they are typed."""

    UNSLOTH = "unsloth"
    PEFT = "peft"

    @property
    def message(self) -> Backend.ValueType:
        """As the contract has it."""
        return Backend.Value(f"BACKEND_{self.name}")


class QuantizationName(enum.StrEnum):
    """The quantizations of the contract, as they are typed."""

    NF4 = "nf4"
    NONE = "none"

    @property
    def message(self) -> Quantization.ValueType:
        """As the contract has it."""
        return Quantization.Value(f"QUANTIZATION_{self.name}")


class PrecisionName(enum.StrEnum):
    """The precisions of the contract, as they are typed."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"

    @property
    def message(self) -> Precision.ValueType:
        """As the contract has it."""
        return Precision.Value(f"PRECISION_{self.name}")


class StateName(enum.StrEnum):
    """The states of the contract, as they are typed."""

    VALIDATING = "validating"
    QUEUED = "queued"
    PREPARING = "preparing"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    RECOVERING = "recovering"
    CANCELLING = "cancelling"
    FINALIZING = "finalizing"
    SUCCEEDED = "succeeded"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def message(self) -> JobState.ValueType:
        """As the contract has it."""
        return JobState.Value(f"JOB_STATE_{self.name}")


Format = Annotated[
    FormatName | None, typer.Option(help="Of the lines. Without: detected from the first ones.")
]
Canary = Annotated[
    int | None,
    typer.Option(min=0, max=100, metavar="PERCENT", help="Of the traffic, for the new version."),
]
AllTraffic = Annotated[bool, typer.Option("--all-traffic", help="Give the new version all of it.")]


def init_from_of(version: str | None, checkpoint: str | None) -> InitFrom | None:
    """What `--init-from` and `--init-from-checkpoint` name; None: neither was given.

    Raises:
        BadParameter: both were, or a number is none.
    """
    if version is not None and checkpoint is not None:
        raise typer.BadParameter("--init-from goes without --init-from-checkpoint")
    if version is not None:
        name, number = _numbered(version, "@", "ADAPTER[@VERSION]")
        return InitFrom(adapter_version=AdapterVersionSource(adapter=name, version=number))
    if checkpoint is not None:
        name, number = _numbered(checkpoint, "/", "JOB[/STEP]")
        return InitFrom(checkpoint=CheckpointSource(job=name, step=number))
    return None


def _numbered(text: str, mark: str, form: str) -> tuple[str, int | None]:
    name, marked, number = text.partition(mark)
    if not marked:
        return name, None
    # As many digits as every number of the contract has room for.
    if not (number.isascii() and number.isdecimal() and len(number) < 10):
        raise typer.BadParameter(f"{text!r} is not {form}")
    return name, int(number)


def traffic_percent(canary: int | None, all_traffic: bool) -> int | None:
    """What the options ask for; None: neither was given.

    Raises:
        BadParameter: both were.
    """
    if all_traffic and canary is not None:
        raise typer.BadParameter("--all-traffic goes without --canary")
    return 100 if all_traffic else canary


def publish_spec(canary: int | None, all_traffic: bool) -> PublishSpec | None:
    """For what is published later; None: as the job says. Raises as `traffic_percent`."""
    percent = traffic_percent(canary, all_traffic)
    return None if percent is None else PublishSpec(traffic_percent=percent)
