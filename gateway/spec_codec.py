"""A job's spec from protobuf and back: fields of one name are one field.

Both sides have the same names (`trainer/spec.py`), so this walks over them, and a new field of
the spec touches the contract and that file alone. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from pydantic import BaseModel, ValidationError

from engine.errors import Violation
from gateway.adapter_codec import name_violations, refuse
from lora_gateway.v1 import training_pb2 as pb
from trainer.spec import Backend, DataSpec, JobSpec, PublishSpec

M = TypeVar("M", bound=BaseModel)
P = TypeVar("P", bound=Message)

SECONDS = "_s"
"""Ends the name of a field that is a Duration in the contract."""


def decode_spec(message: pb.JobSpec, wrong: Iterable[Violation] = ()) -> JobSpec:
    """What a job is asked to do. Raises InvalidRequest with every violation, `wrong` first."""
    found = [*wrong, *name_violations(message.adapter, "spec.adapter")]
    found += name_violations(message.dataset, "spec.dataset")
    if message.data.eval_dataset:
        found += name_violations(message.data.eval_dataset, "spec.data.eval_dataset")
    match message.init_from.WhichOneof("source"):
        case "adapter_version":
            version = message.init_from.adapter_version
            found += name_violations(version.adapter, "spec.init_from.adapter_version.adapter")
        case "checkpoint":
            job = message.init_from.checkpoint.job
            found += name_violations(job, "spec.init_from.checkpoint.job")
    # A name that is missing was told above, in better words than "field required".
    return _decode(message, JobSpec, "spec", found, dataset="", adapter="")


def decode_data(message: pb.DataSpec, wrong: Iterable[Violation] = ()) -> DataSpec:
    """How a dataset becomes rows. Raises InvalidRequest with every violation, `wrong` first."""
    return _decode(message, DataSpec, "data", wrong)


def decode_publish(message: pb.PublishSpec, wrong: Iterable[Violation] = ()) -> PublishSpec:
    """What becomes of an adapter. Raises InvalidRequest with every violation, `wrong` first."""
    return _decode(message, PublishSpec, "publish", wrong)


def encode_spec(spec: Mapping[str, Any]) -> pb.JobSpec:
    """A spec as the store keeps it."""
    return encode(JobSpec.model_validate(spec), pb.JobSpec())


def encode_backend(backend: Backend) -> pb.Backend.ValueType:
    """What trains."""
    return pb.Backend.Value(f"BACKEND_{backend.name}")


def encode(fields: BaseModel, message: P) -> P:
    """Fill `message` with the fields of its names; None is left unset."""
    for name, value in fields:
        if value is None:
            continue
        field = message.DESCRIPTOR.fields_by_name[name.removesuffix(SECONDS)]
        if name.endswith(SECONDS):
            getattr(message, field.name).FromNanoseconds(round(value * 1e9))
        elif isinstance(value, BaseModel):
            part = getattr(message, field.name)
            part.SetInParent()  # an empty part is not the same as none
            encode(value, part)
        elif isinstance(value, Enum):
            kind = field.enum_type
            assert kind is not None
            setattr(message, field.name, kind.values_by_name[_prefix(kind) + value.name].number)
        elif isinstance(value, tuple):
            getattr(message, field.name).extend(value)
        else:
            setattr(message, field.name, value)
    return message


def _decode(
    message: Message, kind: type[M], path: str, found: Iterable[Violation], **unset: Any
) -> M:
    wrong = list(found)
    fields = {**unset, **_fields(message, path, wrong)}
    decoded: M | None = None
    try:
        decoded = kind.model_validate(fields)
    except ValidationError as error:
        wrong += [
            Violation(
                ".".join((path, *(str(part) for part in finding["loc"]))).removesuffix(SECONDS),
                finding["msg"].replace("Input should be", "must be"),
            )
            for finding in error.errors()
        ]
    refuse(wrong)
    assert decoded is not None
    return decoded


def _fields(message: Message, path: str, wrong: list[Violation]) -> dict[str, Any]:
    """The fields that are set, by the names and with the values of the spec."""
    fields = dict[str, Any]()
    for field, value in message.ListFields():
        if isinstance(value, Duration):
            fields[field.name + SECONDS] = value.ToNanoseconds() / 1e9
        elif (kind := field.enum_type) is not None:
            known = kind.values_by_number.get(value)
            if known is None:
                wrong.append(Violation(f"{path}.{field.name}", f"has no value {value}"))
            else:
                fields[field.name] = known.name.removeprefix(_prefix(kind)).lower()
        elif isinstance(value, Message):
            fields[field.name] = _fields(value, f"{path}.{field.name}", wrong)
        else:
            fields[field.name] = tuple(value) if field.is_repeated else value
    return fields


def _prefix(kind: Any) -> str:
    """What the names of an enum's values begin with; its descriptors are two kinds to mypy."""
    return str(kind.values_by_number[0].name).removesuffix("UNSPECIFIED")
