"""The Inference service: decode, admit, call, encode."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator

from engine.generation import GenerationRequest, Output, VersionKey
from engine.pool import ShardPool
from engine.ring import AdapterKey
from gateway import codec, metrics
from gateway.adapter_labels import AdapterLabels
from gateway.admission import Admission
from gateway.call import BASE_MODEL_LABEL, Call, current_call
from gateway.dispatch import Dispatch
from gateway.wrap import Context
from lora_gateway.v1 import inference_pb2 as pb
from lora_gateway.v1.inference_pb2_grpc import InferenceServicer


class Inference(InferenceServicer):
    """Answers from the shards of this worker."""

    def __init__(
        self, pool: ShardPool, admission: Admission, model: pb.Model, labels: AdapterLabels
    ) -> None:
        self._pool = pool
        self._labels = labels
        self._dispatch = Dispatch(pool, admission)
        self._admission = admission
        self._model = model
        self._defaults = codec.SamplingDefaults(
            model.defaults.max_tokens, model.defaults.temperature
        )

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        call = current_call()
        with self._admission.slot():
            decoded = self._decode(request)
            key = self._resolve(decoded, call)
            engine_request = _engine_request(decoded, call, stream=False)
            async with contextlib.aclosing(
                self._dispatch.outputs(engine_request, key, call)
            ) as outputs:
                async for output in outputs:  # one, when it is finished
                    _observe(call, output)
        return pb.GenerateResponse(
            request_id=call.request_id,
            completions=[
                codec.encode_completion(delta, token_ids=decoded.return_token_ids)
                for delta in sorted(output.deltas, key=lambda delta: delta.index)
            ],
            usage=_usage(call),
            served_by=_served_by(call),
            timings=_timings(call, output),
            prompt_logprobs=codec.encode_positions(output.prompt_logprobs),
        )

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        call = current_call()
        with self._admission.slot():
            decoded = self._decode(request)
            key = self._resolve(decoded, call)
            engine_request = _engine_request(decoded, call, stream=True)
            ends: dict[int, pb.CompletionEnd] = {}
            async with contextlib.aclosing(
                self._dispatch.outputs(engine_request, key, call)
            ) as outputs:
                async for output in outputs:
                    previous_s = call.last_token_s
                    _observe(call, output)
                    if previous_s is None:
                        yield _started(call, output)
                    else:
                        metrics.observe_itl(call, (call.last_token_s or 0.0) - previous_s)
                    for delta in output.deltas:
                        event = codec.encode_delta(delta, token_ids=decoded.return_token_ids)
                        if event is not None:
                            yield event
                        if delta.finish_reason is not None:
                            ends[delta.index] = codec.encode_end(delta)
        yield pb.GenerateStreamResponse(
            finished=pb.GenerationFinished(
                completions=[ends[index] for index in sorted(ends)],
                usage=_usage(call),
                timings=_timings(call, output),
            )
        )

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        max_model_len = self._model.limits.max_model_len
        with self._admission.slot():
            prompt = codec.decode_tokenize(request, max_model_len=max_model_len)
            shard = self._pool.route_to(None).shard
            rendered = await shard.render(prompt)
            tokens = await shard.decode_each(rendered.token_ids) if request.return_tokens else None
        return pb.TokenizeResponse(
            token_ids=rendered.token_ids,
            tokens=tokens,
            max_model_len=max_model_len,
        )

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        return pb.GetModelResponse(model=self._model)

    def _decode(self, request: pb.GenerateRequest) -> codec.GenerateCall:
        return codec.decode_generate(
            request,
            defaults=self._defaults,
            vocab_size=self._model.vocab_size,
            max_model_len=self._model.limits.max_model_len,
        )

    def _resolve(self, decoded: codec.GenerateCall, call: Call) -> VersionKey | None:
        """The version that will answer, which is noted on the call; None is the base model."""
        key = self._pool.resolve(
            call.principal.tenant,
            decoded.adapter,
            decoded.version,
            decoded.session_id or call.request_id,
        )
        call.adapter = decoded.adapter or BASE_MODEL_LABEL
        call.version = 0 if key is None else key.version
        call.adapter_label = (
            BASE_MODEL_LABEL if key is None else self._labels.of(AdapterKey(*key[:2]))
        )
        return key


def _engine_request(decoded: codec.GenerateCall, call: Call, *, stream: bool) -> GenerationRequest:
    return GenerationRequest(
        request_id=call.request_id,
        prompt=decoded.prompt,
        sampling=decoded.sampling,
        stream=stream,
        tokens_per_delta=decoded.tokens_per_delta,
        cache_salt=call.principal.tenant,
        trace_headers=call.trace_headers,
    )


def _observe(call: Call, output: Output) -> None:
    """Note tokens and times on the call."""
    now_s = time.monotonic()
    if call.first_token_s is None:
        call.first_token_s = now_s - output.decode_s  # a unary call sees its first token late
        call.prompt_tokens = output.prompt_tokens
        call.cached_tokens = output.cached_tokens
        call.scheduled_s = output.scheduled_s
    call.last_token_s = now_s
    for delta in output.deltas:
        call.completion_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            call.finish_reasons += (delta.finish_reason.value,)


def _started(call: Call, output: Output) -> pb.GenerateStreamResponse:
    return pb.GenerateStreamResponse(
        started=pb.GenerationStarted(
            request_id=call.request_id,
            served_by=_served_by(call),
            prompt_logprobs=codec.encode_positions(output.prompt_logprobs),
        )
    )


def _served_by(call: Call) -> pb.ServedBy:
    adapter = call.adapter if call.adapter and call.version else ""
    return pb.ServedBy(adapter=adapter, version=call.version, shard=call.shard)


def _usage(call: Call) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=call.prompt_tokens,
        completion_tokens=call.completion_tokens,
        cached_tokens=call.cached_tokens,
    )


def _timings(call: Call, output: Output) -> pb.Timings:
    first_s, last_s = call.first_token_s, call.last_token_s
    assert first_s is not None and last_s is not None, "timings exist once tokens do"
    return pb.Timings(
        render_ms=call.render_s * 1000,
        queue_ms=output.queue_s * 1000,
        time_to_first_token_ms=(first_s - call.started_s) * 1000,
        total_ms=(last_s - call.started_s) * 1000,
    )
