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
    "Backend",
    "Chat",
    "ChatMessage",
    "ChatTurn",
    "Checkpoint",
    "Choice",
    "CompareVersionsResponse",
    "Completion",
    "CompletionEnd",
    "Conflict",
    "DataSpec",
    "Dataset",
    "DatasetFormat",
    "DatasetReport",
    "DeadlineExceeded",
    "ErrorReason",
    "Estimate",
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
    "GateReport",
    "GateSpec",
    "GatewayClient",
    "GatewayError",
    "GenerateResponse",
    "GenerationDelta",
    "GenerationEvent",
    "GenerationFinished",
    "GenerationStarted",
    "GenerationStream",
    "GetCapabilitiesResponse",
    "GradientCheckpointing",
    "Hyperparameters",
    "IncompleteStream",
    "Internal",
    "InvalidRequest",
    "Job",
    "JobError",
    "JobEvent",
    "JobKeywords",
    "JobLogs",
    "JobSpec",
    "JobState",
    "JobWatch",
    "LearningRateSchedule",
    "LengthBucket",
    "LineIssue",
    "LineIssueCode",
    "Logprobs",
    "LoraSpec",
    "LossMask",
    "Manifest",
    "Model",
    "ModelDefaults",
    "ModelFingerprints",
    "ModelLimits",
    "NotFound",
    "Notice",
    "Optimizer",
    "OverlengthPolicy",
    "Overloaded",
    "PermissionDenied",
    "PositionLogprobs",
    "Precision",
    "PreviewToken",
    "PreviewTokensResponse",
    "Progress",
    "Prompt",
    "Publication",
    "PublicationState",
    "PublishSpec",
    "Quantiles",
    "Quantization",
    "RecordFeedbackResponse",
    "RepetitionDetection",
    "Residency",
    "SamplingKeywords",
    "SamplingParams",
    "Score",
    "ScoreDifference",
    "Scorer",
    "ServedBy",
    "StateChanged",
    "StructuredOutputs",
    "Timings",
    "TokenLogprob",
    "TokenStatistics",
    "TokenizeResponse",
    "TrafficGuard",
    "TrafficSplit",
    "TrainingClient",
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
