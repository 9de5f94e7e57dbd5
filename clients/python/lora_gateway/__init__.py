"""Typed asyncio client of lora-gateway, which serves LoRA adapters on vLLM over gRPC.

Messages are the protobuf messages of `lora_gateway.v1`, re-exported; this package adds the
client, its stream and its errors.
"""

from lora_gateway.client import GatewayClient
from lora_gateway.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    GatewayError,
    IncompleteStream,
    Internal,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
    Violation,
)
from lora_gateway.prompt import ChatTurn, Prompt
from lora_gateway.sampling import SamplingKeywords
from lora_gateway.stream import GenerationEvent, GenerationStream
from lora_gateway.v1.errors_pb2 import ErrorReason
from lora_gateway.v1.inference_pb2 import (
    ChatMessage,
    Choice,
    Completion,
    CompletionEnd,
    FinishReason,
    GenerateResponse,
    GenerationDelta,
    GenerationFinished,
    GenerationStarted,
    Logprobs,
    Model,
    ModelDefaults,
    ModelFingerprints,
    ModelLimits,
    PositionLogprobs,
    RepetitionDetection,
    SamplingParams,
    ServedBy,
    StructuredOutputs,
    Timings,
    TokenizeResponse,
    TokenLogprob,
    Usage,
)

__all__ = [
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
