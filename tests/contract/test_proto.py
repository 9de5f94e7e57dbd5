"""The contract: documented, in vLLM's words, and compatible with what was released."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from lora_gateway.v1 import errors_pb2, inference_pb2

ROOT = Path(__file__).parents[2]
PROTO = ROOT / "proto"
RELEASED = PROTO / "released.binpb"
BUF = Path(sys.executable).with_name("buf")
BUF_FOUND_SOMETHING = 100
"""Exit status of buf when it works and finds something, for example a breaking change."""

REASONS = [
    name
    for name in errors_pb2.ErrorReason.DESCRIPTOR.values_by_name
    if not name.endswith("_UNSPECIFIED")
]
WITHOUT_METADATA = {
    "ERROR_REASON_CONTROL_PLANE_UNAVAILABLE",
    "ERROR_REASON_STORAGE_FULL",
    "ERROR_REASON_TRAINING_UNAVAILABLE",
}
"""Reasons that are about the gateway, and not about something that the caller named."""


def comment_of(value: str) -> str:
    """The comment above an enum value of errors.proto."""
    text = (PROTO / "lora_gateway" / "v1" / "errors.proto").read_text()
    found = re.search(rf"((?:^ *//.*\n)+) *{value} = \d+;", text, re.MULTILINE)
    assert found, f"{value} has no comment"
    return re.sub(r"\s*//\s?", " ", found[1]).strip()


@pytest.mark.parametrize("reason", REASONS)
def test_each_error_reason_tells_its_cause_its_code_and_its_metadata(reason: str) -> None:
    comment = comment_of(reason)
    assert comment.startswith(f"{reason}: ")
    if "Only in `Job.error`." not in comment:
        code = re.search(r"\bCode ([A-Z_]+)\b", comment)
        assert code
        assert code[1] in grpc.StatusCode.__members__
    if reason not in WITHOUT_METADATA:
        assert re.search(r"\bMetadata: `[a-z0-9_]+`", comment)


@pytest.mark.parametrize(
    ("message", "vllm_class"),
    [
        ("SamplingParams", "SamplingParams"),
        ("StructuredOutputs", "StructuredOutputsParams"),
        ("RepetitionDetection", "RepetitionDetectionParams"),
    ],
)
def test_sampling_fields_have_the_names_that_vllm_gives_them(message: str, vllm_class: str) -> None:
    ours = set(inference_pb2.DESCRIPTOR.message_types_by_name[message].fields_by_name)
    assert ours <= fields_of(vllm_class)


def fields_of(vllm_class: str) -> set[str]:
    """Annotated names of a class in vllm/sampling_params.py: read, for importing takes 15 s."""
    vllm = importlib.util.find_spec("vllm")
    assert vllm is not None and vllm.origin is not None
    tree = ast.parse((Path(vllm.origin).parent / "sampling_params.py").read_bytes())
    body = next(
        node.body
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == vllm_class
    )
    return {
        node.target.id
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def test_pitfalls_a_request_names_one_adapter() -> None:
    fields = inference_pb2.GenerateRequest.DESCRIPTOR.fields
    adapters = [field for field in fields if "adapter" in field.name]
    assert [field.name for field in adapters] == ["adapter"]
    assert not adapters[0].is_repeated and adapters[0].type == adapters[0].TYPE_STRING


def buf_breaking(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BUF, "breaking", "--against", RELEASED], cwd=folder, capture_output=True, text=True
    )


def test_the_contract_does_not_break_the_released_one() -> None:
    breaking = buf_breaking(ROOT)
    assert breaking.returncode == 0, breaking.stdout + breaking.stderr


def test_a_removed_field_would_break_the_released_contract(tmp_path: Path) -> None:
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    shutil.copytree(PROTO, tmp_path / "proto")
    inference = tmp_path / "proto" / "lora_gateway" / "v1" / "inference.proto"
    inference.write_text(inference.read_text().replace("  string session_id = 9;\n", ""))
    breaking = buf_breaking(tmp_path)
    assert breaking.returncode == BUF_FOUND_SOMETHING, breaking.stderr
    assert "session_id" in breaking.stdout
