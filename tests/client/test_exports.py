"""The public surface, name by name: whoever changes it changes this list."""

from __future__ import annotations

import types
from pathlib import Path

import lora_gateway

GOLDEN = [
    "ChatMessage",
    "ChatTurn",
    "Choice",
    "Completion",
    "CompletionEnd",
    "DeadlineExceeded",
    "ErrorReason",
    "FailedPrecondition",
    "FinishReason",
    "GatewayClient",
    "GatewayError",
    "GenerateResponse",
    "GenerationDelta",
    "GenerationEvent",
    "GenerationFinished",
    "GenerationStarted",
    "GenerationStream",
    "IncompleteStream",
    "Internal",
    "InvalidRequest",
    "Logprobs",
    "Model",
    "ModelDefaults",
    "ModelFingerprints",
    "ModelLimits",
    "NotFound",
    "Overloaded",
    "PositionLogprobs",
    "Prompt",
    "RepetitionDetection",
    "SamplingKeywords",
    "SamplingParams",
    "ServedBy",
    "StructuredOutputs",
    "Timings",
    "TokenLogprob",
    "TokenizeResponse",
    "Unavailable",
    "Usage",
    "Violation",
]


def test_the_public_names_are_the_golden_ones() -> None:
    assert lora_gateway.__all__ == GOLDEN


def test_nothing_else_shows() -> None:
    shown = {
        name
        for name, value in vars(lora_gateway).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert shown == set(GOLDEN)


def test_the_package_is_marked_as_typed() -> None:
    assert (Path(*lora_gateway.__path__) / "py.typed").is_file()
