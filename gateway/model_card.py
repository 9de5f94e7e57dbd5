"""The answer to GetModel, put together once per worker."""

from __future__ import annotations

from importlib.metadata import version

from engine.base_model import ModelFingerprints
from engine.model_info import ModelInfo
from engine.sampling import MAX_LOGPROBS, MAX_N
from gateway.server import MAX_MESSAGE_BYTES
from gateway.settings import Settings
from lora_gateway.v1 import inference_pb2 as pb


def model_card(
    settings: Settings, info: ModelInfo, fingerprints: ModelFingerprints, max_requests: int
) -> pb.Model:
    """Base model, limits and defaults in force, fingerprints."""
    return pb.Model(
        base_model=settings.model,
        dtype=info.dtype,
        quantization=info.quantization,
        architecture=info.architecture,
        vocab_size=info.vocab_size,
        has_chat_template=bool(info.chat_template),
        limits=pb.ModelLimits(
            max_model_len=info.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            max_loras=settings.max_loras,
            max_cpu_loras=settings.max_cpu_loras,
            max_lora_rank=int(settings.max_lora_rank),
            max_message_bytes=MAX_MESSAGE_BYTES,
            max_n=MAX_N,
            max_logprobs=MAX_LOGPROBS,
            max_concurrent_requests=max_requests,
        ),
        defaults=pb.ModelDefaults(
            max_tokens=settings.default_max_tokens,
            temperature=settings.default_temperature,
            unary_deadline_s=settings.default_unary_deadline_s,
            stream_deadline_s=settings.default_stream_deadline_s,
        ),
        fingerprints=pb.ModelFingerprints(
            config_sha256=fingerprints.config_sha256,
            weights_sha256=fingerprints.weights_sha256,
            tokenizer_sha256=fingerprints.tokenizer_sha256,
            chat_template_sha256=fingerprints.chat_template_sha256,
        ),
        server_version=version("lora-gateway"),
        engine_version=info.engine_version,
    )
