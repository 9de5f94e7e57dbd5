"""Whatever comes, it is refused, or it is what vLLM can load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from engine.errors import AdapterInvalid
from tests.engine.drafts import (
    BOMB,
    Q_PROJ,
    V_PROJ,
    Draft,
    a,
    b,
    check,
    good_config,
    good_tensors,
    header,
    load_as_vllm_does,
)

GOOD_WEIGHTS = save(good_tensors())
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([BOMB, "q_proj", "LORA", "none", "pissa", 10**400, "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        *("peft_type", "r", "lora_alpha", "target_modules", "bias", "use_rslora", "use_dora"),
        *("rank_pattern", "alpha_pattern", "modules_to_save", "init_lora_weights", "lora_bias"),
        *("layer_replication", "use_bdlora", "vllm_lora_scaling_factor", "anything"),
    ]
)
fuzz = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def passes_or_is_refused(folder: Path, draft: Draft) -> None:
    draft.write(folder)
    try:
        check(folder)
    except AdapterInvalid as invalid:
        assert invalid.findings
        assert str(invalid).isprintable()
    else:
        load_as_vllm_does(folder)


@fuzz
@given(changes=st.dictionaries(FIELDS, JSON, min_size=1, max_size=4))
def test_any_field_of_the_config_passes_or_is_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    passes_or_is_refused(tmp_path, Draft(config=good_config() | changes))


@fuzz
@given(content=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_config_pass_or_are_refused(tmp_path: Path, content: bytes) -> None:
    passes_or_is_refused(tmp_path, Draft(config_bytes=content or b" "))


@fuzz
@given(content=st.binary(max_size=200), data=st.binary(max_size=64))
def test_any_bytes_as_header_pass_or_are_refused(
    tmp_path: Path, content: bytes, data: bytes
) -> None:
    passes_or_is_refused(tmp_path, Draft(weights_bytes=header(content, data)))


SIZES = st.integers(-1, 40) | st.sampled_from([2**31, 2**63, 2**64 - 1, 2**64])
DESCRIPTION = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "F64", "BF16", "I8", "F4", "F6_E2M3", "U64", "x"]),
        "shape": st.lists(SIZES, max_size=3),
        "data_offsets": st.lists(SIZES, min_size=1, max_size=3),
    }
)


@fuzz
@given(
    described=st.dictionaries(
        st.sampled_from([a(Q_PROJ), b(Q_PROJ), a(V_PROJ), "__metadata__"]) | st.text(max_size=9),
        DESCRIPTION | JSON,
        max_size=4,
    ),
    data=st.binary(max_size=64),
)
def test_any_tensors_described_in_a_header_pass_or_are_refused(
    tmp_path: Path, described: dict[str, Any], data: bytes
) -> None:
    content = header(json.dumps(described).encode(), data)
    passes_or_is_refused(tmp_path, Draft(weights_bytes=content))


@fuzz
@given(
    edits=st.dictionaries(
        st.integers(0, len(GOOD_WEIGHTS) - 1) | st.integers(0, 500), st.integers(0, 255), max_size=4
    ),
    length=st.none() | st.integers(0, len(GOOD_WEIGHTS)),
)
def test_any_damage_to_good_weights_passes_or_is_refused(
    tmp_path: Path, edits: dict[int, int], length: int | None
) -> None:
    content = bytearray(GOOD_WEIGHTS)
    for position, value in edits.items():
        content[position] = value
    passes_or_is_refused(tmp_path, Draft(weights_bytes=bytes(content[:length])))
