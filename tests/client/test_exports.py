"""The public surface, name by name: whoever changes it changes this list."""

from __future__ import annotations

import types
from pathlib import Path

import lora_gateway

GOLDEN = [
    "Adapter",
    "AdapterEvent",
    "AdapterFacts",
    "AdapterVersion",
    "AdapterWatch",
    "AdaptersClient",
    "ArmDifference",
    "ArmReport",
    "Chat",
    "ChatMessage",
    "ChatTurn",
    "Choice",
    "CompareVersionsResponse",
    "Completion",
    "CompletionEnd",
    "Conflict",
    "DeadlineExceeded",
    "ErrorReason",
    "Evaluation",
    "EvaluationEvent",
    "EvaluationExample",
    "EvaluationProgress",
    "EvaluationResult",
    "EvaluationSummary",
    "EventKind",
    "FailedPrecondition",
    "FeedbackReport",
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
    "PermissionDenied",
    "PositionLogprobs",
    "Prompt",
    "Quantiles",
    "RecordFeedbackResponse",
    "RepetitionDetection",
    "Residency",
    "SamplingKeywords",
    "SamplingParams",
    "Score",
    "ScoreDifference",
    "Scorer",
    "ServedBy",
    "StructuredOutputs",
    "Timings",
    "TokenLogprob",
    "TokenizeResponse",
    "TrafficGuard",
    "TrafficSplit",
    "Unavailable",
    "UploadProgress",
    "Usage",
    "ValidateAdapterResponse",
    "VersionScore",
    "VersionState",
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
