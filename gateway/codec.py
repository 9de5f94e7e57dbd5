"""Protobuf to the engine's types and back. Pure; the only place that does it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from engine.errors import InvalidRequest, PromptMissing, Violation
from engine.generation import (
    Chat,
    ChatMessage,
    Delta,
    FinishReason,
    PositionLogprobs,
    Prompt,
    TokenLogprob,
)
from engine.sampling import MAX_ENTRIES, violations
from lora_gateway.v1 import inference_pb2 as pb
from store.records import NAME

ROLES = ("system", "user", "assistant", "tool")
MAX_CHAT_MESSAGES = 4096
MAX_SESSION_ID_BYTES = 128
MAX_TOKENS_PER_CHUNK = 1024
MAX_SCHEMA_BYTES = 64 * 1024
MAX_REGEX_BYTES = 4 * 1024
MAX_CHOICES = 1024

_FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.REPETITION: pb.FINISH_REASON_REPETITION,
}
_CONSTRAINT_BYTES = {
    "json": MAX_SCHEMA_BYTES,
    "regex": MAX_REGEX_BYTES,
    "grammar": MAX_SCHEMA_BYTES,
    "structural_tag": MAX_SCHEMA_BYTES,
}


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What an unset field becomes, where vLLM's own default is not ours."""

    max_tokens: int
    temperature: float


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """A GenerateRequest, decoded and checked."""

    adapter: str
    version: int | None
    prompt: Prompt
    sampling: dict[str, Any]
    """Keyword arguments of `vllm.SamplingParams`."""
    return_token_ids: bool
    tokens_per_delta: int
    session_id: str


def decode_generate(
    request: pb.GenerateRequest,
    *,
    defaults: SamplingDefaults,
    vocab_size: int,
    max_model_len: int,
) -> GenerateCall:
    """The request as the engine wants it.

    Raises InvalidRequest with every violation, or PromptMissing if the prompt is the only one.
    """
    sampling = _sampling(request.sampling)
    sampling.setdefault("max_tokens", max(defaults.max_tokens, sampling.get("min_tokens", 0)))
    sampling.setdefault("temperature", defaults.temperature)
    missing = list(_prompt_missing(request))
    wrong = [
        *_target_violations(request),
        *_chat_violations(request.chat),
        *violations(sampling, vocab_size=vocab_size, prefix="sampling"),
        *_structured_output_violations(request.sampling),
    ]
    if wrong:
        raise InvalidRequest(*missing, *wrong)
    if missing:
        raise PromptMissing(*missing)
    return GenerateCall(
        adapter=request.adapter,
        version=request.version if request.HasField("version") else None,
        prompt=_prompt(request, max_model_len),
        sampling=sampling,
        return_token_ids=request.return_token_ids,
        tokens_per_delta=max(1, request.max_tokens_per_chunk),
        session_id=request.session_id,
    )


def decode_tokenize(request: pb.TokenizeRequest, *, max_model_len: int) -> Prompt:
    """The prompt to tokenize. Raises InvalidRequest or PromptMissing."""
    wrong = list(_chat_violations(request.chat))
    if wrong:
        raise InvalidRequest(*wrong)
    missing = list(_prompt_missing(request))
    if missing:
        raise PromptMissing(*missing)
    return _prompt(request, max_model_len)


def _prompt(request: pb.GenerateRequest | pb.TokenizeRequest, max_model_len: int) -> Prompt:
    if request.HasField("chat"):
        return Chat([ChatMessage(m.role, m.content) for m in request.chat.messages])
    if isinstance(request, pb.GenerateRequest) and request.HasField("token_ids"):
        return list(request.token_ids.ids[: max_model_len + 1])  # one too many is enough to refuse
    return request.text


def _prompt_missing(request: pb.GenerateRequest | pb.TokenizeRequest) -> Iterable[Violation]:
    match request.WhichOneof("prompt"):
        case None:
            options = [field.name for field in request.DESCRIPTOR.oneofs_by_name["prompt"].fields]
            yield Violation("prompt", f"is required; set one of {', '.join(options)}")
        case "text" if not request.text:
            yield Violation("text", "must not be empty")
        case "chat" if not request.chat.messages:
            yield Violation("chat.messages", "must not be empty; add a user message")
        case "token_ids" if not request.token_ids.ids:  # type: ignore[union-attr]
            yield Violation("token_ids.ids", "must not be empty")


def _target_violations(request: pb.GenerateRequest) -> Iterable[Violation]:
    if request.adapter and not NAME.fullmatch(request.adapter):
        yield Violation("adapter", f"must match {NAME.pattern}")
    if request.HasField("version") and not request.adapter:
        yield Violation("version", "needs an adapter; the base model has no versions")
    if len(request.session_id.encode()) > MAX_SESSION_ID_BYTES:
        yield Violation("session_id", f"may have {MAX_SESSION_ID_BYTES} bytes")
    if request.max_tokens_per_chunk > MAX_TOKENS_PER_CHUNK:
        yield Violation("max_tokens_per_chunk", f"must be at most {MAX_TOKENS_PER_CHUNK}")


def _chat_violations(chat: pb.Chat) -> Iterable[Violation]:
    if len(chat.messages) > MAX_CHAT_MESSAGES:
        yield Violation("chat.messages", f"may have {MAX_CHAT_MESSAGES} entries")
        return
    for index, message in enumerate(chat.messages):
        if message.role not in ROLES:
            yield Violation(
                f"chat.messages[{index}].role",
                f"{message.role[:12]!r} is unknown; use one of {', '.join(ROLES)}",
            )


def _structured_output_violations(sampling: pb.SamplingParams) -> Iterable[Violation]:
    if not sampling.HasField("structured_outputs"):
        return
    path = "sampling.structured_outputs"
    wanted = sampling.structured_outputs
    kind = wanted.WhichOneof("constraint")
    if kind is None:
        yield Violation(
            path, "needs a constraint: json, regex, choice, grammar, json_object, or structural_tag"
        )
    elif kind in _CONSTRAINT_BYTES:
        size = len(getattr(wanted, kind).encode())
        if not 1 <= size <= _CONSTRAINT_BYTES[kind]:
            yield Violation(f"{path}.{kind}", f"must be 1 to {_CONSTRAINT_BYTES[kind]} bytes")
    elif kind == "choice":
        options = wanted.choice.options
        if not 1 <= len(options) <= MAX_CHOICES or len(set(options)) != len(options):
            yield Violation(f"{path}.choice.options", f"must be 1 to {MAX_CHOICES}, all different")
        elif sum(len(option.encode()) for option in options) > MAX_SCHEMA_BYTES:
            yield Violation(f"{path}.choice.options", f"may have {MAX_SCHEMA_BYTES} bytes together")
        elif "" in options:
            yield Violation(f"{path}.choice.options", "must not hold an empty string")
    elif not wanted.json_object:
        yield Violation(f"{path}.json_object", "must be true; unset it for free text")


def _sampling(message: pb.SamplingParams) -> dict[str, Any]:
    """Only the set fields, under their own names, which are vLLM's."""
    arguments: dict[str, Any] = {}
    for field, value in message.ListFields():
        if field.name == "structured_outputs":
            arguments[field.name] = _structured_outputs(value)
        elif field.name == "repetition_detection":
            arguments[field.name] = {
                "max_pattern_size": value.max_pattern_size,
                "min_pattern_size": max(1, value.min_pattern_size),
                "min_count": value.min_count,
            }
        elif field.name == "logit_bias":
            arguments[field.name] = dict(islice(value.items(), MAX_ENTRIES[field.name] + 1))
        elif _is_repeated(field):
            # One entry too many is enough to refuse; a message may hold millions.
            arguments[field.name] = list(value[: MAX_ENTRIES[field.name] + 1])
        else:
            arguments[field.name] = value
    return arguments


def _is_repeated(field: FieldDescriptor) -> bool:
    # `label` is deprecated from protobuf 7 on, `is_repeated` does not exist before 6.31.
    return bool(field.is_repeated)


def _structured_outputs(message: pb.StructuredOutputs) -> dict[str, Any]:
    kind = message.WhichOneof("constraint")
    arguments: dict[str, Any] = {
        "disable_any_whitespace": message.disable_any_whitespace,
        "disable_additional_properties": message.disable_additional_properties,
    }
    if kind == "choice":
        arguments["choice"] = list(message.choice.options)
    elif kind is not None:
        arguments[kind] = getattr(message, kind)
    return arguments


def encode_delta(delta: Delta, *, token_ids: bool) -> pb.GenerateStreamResponse | None:
    """The message of one delta; None when it would be empty."""
    if not delta.text and not token_ids and delta.logprobs is None:
        return None
    return pb.GenerateStreamResponse(
        delta=pb.GenerationDelta(
            index=delta.index,
            text=delta.text,
            token_ids=delta.token_ids if token_ids else None,
            logprobs=None if delta.logprobs is None else encode_logprobs(delta.logprobs),
        )
    )


def encode_completion(delta: Delta, *, token_ids: bool) -> pb.Completion:
    """The complete answer of a unary call, from its one delta."""
    completion = pb.Completion(
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids if token_ids else None,
        finish_reason=_FINISH_REASONS[_reason(delta)],
        logprobs=None if delta.logprobs is None else encode_logprobs(delta.logprobs),
    )
    _set_stop(completion, delta)
    return completion


def encode_end(delta: Delta) -> pb.CompletionEnd:
    """How one completion of a stream ended."""
    end = pb.CompletionEnd(index=delta.index, finish_reason=_FINISH_REASONS[_reason(delta)])
    _set_stop(end, delta)
    return end


def _reason(delta: Delta) -> FinishReason:
    assert delta.finish_reason is not None, "only the last delta of a completion ends it"
    return delta.finish_reason


def _set_stop(message: pb.Completion | pb.CompletionEnd, delta: Delta) -> None:
    if isinstance(delta.stop, str):
        message.stop_text = delta.stop
    elif delta.stop is not None:
        message.stop_token_id = delta.stop


def encode_logprobs(positions: Sequence[PositionLogprobs]) -> pb.Logprobs:
    """Log probabilities of a run of tokens."""
    return pb.Logprobs(positions=encode_positions(positions))


def encode_positions(positions: Sequence[PositionLogprobs]) -> list[pb.PositionLogprobs]:
    """Log probabilities position by position."""
    return [
        pb.PositionLogprobs(
            chosen=None if position.chosen is None else _token_logprob(position.chosen),
            top=[_token_logprob(token) for token in position.top],
        )
        for position in positions
    ]


def _token_logprob(token: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=token.token_id, logprob=token.logprob, rank=token.rank, token=token.token
    )
