"""Whatever message comes, it is decoded or refused; the code has no third way out."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import InvalidRequest
from gateway.codec import SamplingDefaults, decode_generate, decode_tokenize
from lora_gateway.v1 import inference_pb2 as pb

DEFAULTS = SamplingDefaults(max_tokens=64, temperature=0.5)
VOCAB_SIZE = 1000
MAX_MODEL_LEN = 512

_NUMBERS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_UINT32: st.integers(0, 2**32 - 1) | st.integers(0, 130),
    FieldDescriptor.TYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_FLOAT: st.floats(width=32) | st.sampled_from([0.0, 1.0, 2.0]),
    FieldDescriptor.TYPE_STRING: st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
    | st.sampled_from(["user", "alpha", "x" * 1100]),
}


def messages(descriptor: Descriptor) -> st.SearchStrategy[dict[str, Any]]:
    """Any message of this type, as the arguments of its class."""
    fields: dict[str, st.SearchStrategy[Any]] = {}
    for field in descriptor.fields:
        kind = field.message_type
        if kind is not None and kind.GetOptions().map_entry:
            key, value = (_NUMBERS[kind.fields_by_name[name].type] for name in ("key", "value"))
            fields[field.name] = st.dictionaries(key, value, max_size=40)
            continue
        one = _NUMBERS[field.type] if kind is None else messages(kind)
        fields[field.name] = st.lists(one, max_size=40) if field.is_repeated else one
    exclusive = [
        [field.name for field in group.fields]
        for group in descriptor.oneofs
        if len(group.fields) > 1
    ]
    optional = st.fixed_dictionaries({}, optional=fields)
    return optional.map(lambda chosen: _first_of_each(chosen, exclusive))


def _first_of_each(chosen: dict[str, Any], groups: list[list[str]]) -> dict[str, Any]:
    """Of fields that exclude each other, one."""
    dropped = {name for group in groups for name in [n for n in group if n in chosen][1:]}
    return {name: value for name, value in chosen.items() if name not in dropped}


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(messages(pb.GenerateRequest.DESCRIPTOR), st.booleans())
def test_any_request_is_decoded_or_refused_and_nothing_else(
    fields: dict[str, Any], good_prompt: bool
) -> None:
    request = pb.GenerateRequest(**fields)
    if good_prompt:
        request.text = "hello"
    try:
        call = decode_generate(
            pb.GenerateRequest.FromString(request.SerializeToString()),
            defaults=DEFAULTS,
            vocab_size=VOCAB_SIZE,
            max_model_len=MAX_MODEL_LEN,
        )
    except InvalidRequest as error:
        assert error.violations
        assert all(violation.field and violation.description for violation in error.violations)
        assert str(error)
    else:
        assert call.prompt
        assert call.sampling.keys() >= {"max_tokens", "temperature"}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(messages(pb.TokenizeRequest.DESCRIPTOR))
def test_any_prompt_to_tokenize_is_decoded_or_refused_and_nothing_else(
    fields: dict[str, Any],
) -> None:
    try:
        assert decode_tokenize(pb.TokenizeRequest(**fields), max_model_len=MAX_MODEL_LEN)
    except InvalidRequest as error:
        assert error.violations
