"""What the Inference service does, on the real engine."""

from __future__ import annotations

import json
import re

import grpc

from lora_gateway.v1 import inference_pb2 as pb
from lora_gateway.v1.inference_pb2_grpc import InferenceStub
from tests.e2e.gateway_process import GatewayProcess

STORY = "Once upon a time"


def greedy(max_tokens: int = 16) -> pb.SamplingParams:
    return pb.SamplingParams(max_tokens=max_tokens, temperature=0)


async def generate(channel: grpc.aio.Channel, request: pb.GenerateRequest) -> pb.GenerateResponse:
    return await InferenceStub(channel).Generate(request, timeout=60)


async def test_text_and_its_token_ids_get_the_same_answer(channel: grpc.aio.Channel) -> None:
    tokens = await InferenceStub(channel).Tokenize(
        pb.TokenizeRequest(text=STORY, return_tokens=True)
    )
    assert "".join(tokens.tokens) == STORY and tokens.max_model_len == 2048
    by_text = await generate(channel, pb.GenerateRequest(text=STORY, sampling=greedy()))
    ids = pb.TokenIds(ids=tokens.token_ids)
    by_ids = await generate(channel, pb.GenerateRequest(token_ids=ids, sampling=greedy()))
    assert by_text.completions[0].text == by_ids.completions[0].text
    assert by_text.usage.prompt_tokens == len(tokens.token_ids)
    assert by_text.request_id != by_ids.request_id


async def test_chat_is_rendered_by_the_models_template(channel: grpc.aio.Channel) -> None:
    chat = pb.Chat(
        messages=[
            pb.ChatMessage(role="system", content="Be brief."),
            pb.ChatMessage(role="user", content="Hi"),
        ]
    )
    tokens = await InferenceStub(channel).Tokenize(
        pb.TokenizeRequest(chat=chat, return_tokens=True)
    )
    rendered = "".join(tokens.tokens)
    assert rendered.index("Be brief.") < rendered.index("Hi") < rendered.index("assistant")
    by_chat = await generate(channel, pb.GenerateRequest(chat=chat, sampling=greedy()))
    ids = pb.TokenIds(ids=tokens.token_ids)
    by_ids = await generate(channel, pb.GenerateRequest(token_ids=ids, sampling=greedy()))
    assert by_chat.completions[0].text == by_ids.completions[0].text


async def test_a_version_can_be_named_and_is_told(channel: grpc.aio.Channel) -> None:
    answer = await generate(
        channel, pb.GenerateRequest(text=STORY, adapter="pirate", version=1, sampling=greedy(2))
    )
    served = answer.served_by
    assert (served.adapter, served.version, served.shard) == ("pirate", 1, "shard-0")


async def test_several_completions_stream_beside_each_other(channel: grpc.aio.Channel) -> None:
    request = pb.GenerateRequest(
        text=STORY,
        sampling=pb.SamplingParams(n=3, max_tokens=8, temperature=1, seed=7, ignore_eos=True),
        return_token_ids=True,
    )
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    async for event in InferenceStub(channel).GenerateStream(request):
        tokens[event.delta.index].extend(event.delta.token_ids)
    assert [end.index for end in event.finished.completions] == [0, 1, 2]
    assert event.finished.usage.completion_tokens == 24
    assert all(len(ids) == 8 for ids in tokens.values())
    unary = await generate(channel, request)
    assert [list(c.token_ids) for c in unary.completions] == list(tokens.values()), "seeded"


async def test_stop_strings_and_ids_end_a_completion_and_are_told(
    channel: grpc.aio.Channel,
) -> None:
    free = await generate(
        channel, pb.GenerateRequest(text=STORY, sampling=greedy(24), return_token_ids=True)
    )
    text, ids = free.completions[0].text, list(free.completions[0].token_ids)
    stop = text[len(text) // 2 :].strip()[:3]
    sampling = greedy(24)
    sampling.stop.append(stop)
    stopped = await generate(channel, pb.GenerateRequest(text=STORY, sampling=sampling))
    completion = stopped.completions[0]
    assert completion.finish_reason == pb.FINISH_REASON_STOP and completion.stop_text == stop
    assert completion.text == text[: text.index(stop)]
    sampling = greedy(24)
    sampling.stop_token_ids.append(ids[5])
    completion = (
        await generate(channel, pb.GenerateRequest(text=STORY, sampling=sampling))
    ).completions[0]
    assert completion.finish_reason == pb.FINISH_REASON_STOP
    assert completion.stop_token_id == ids[5]


async def test_log_probabilities_of_answer_and_prompt(channel: grpc.aio.Channel) -> None:
    sampling = greedy(4)
    sampling.logprobs = 3
    sampling.prompt_logprobs = 0
    answer = await generate(
        channel, pb.GenerateRequest(text=STORY, sampling=sampling, return_token_ids=True)
    )
    completion = answer.completions[0]
    assert len(completion.logprobs.positions) == 4
    for position, token_id in zip(completion.logprobs.positions, completion.token_ids, strict=True):
        assert position.chosen.token_id == token_id and position.chosen.rank == 1
        assert [token.rank for token in position.top] == [1, 2, 3]
        assert position.top[0].logprob >= position.top[1].logprob >= position.top[2].logprob
    prompt = answer.prompt_logprobs
    assert len(prompt) == answer.usage.prompt_tokens
    assert not prompt[0].HasField("chosen"), "nothing precedes the first token"
    assert all(position.chosen.logprob <= 0 and not position.top for position in prompt[1:])


async def test_certain_tokens_can_be_scored(channel: grpc.aio.Channel) -> None:
    sampling = greedy(1)
    sampling.logprob_token_ids.extend([300, 400])
    answer = await generate(channel, pb.GenerateRequest(text=STORY, sampling=sampling))
    (position,) = answer.completions[0].logprobs.positions
    assert {token.token_id for token in position.top} == {300, 400}


async def test_structured_outputs_constrain_the_answer(channel: grpc.aio.Channel) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    sampling = greedy(64)
    sampling.structured_outputs.json = json.dumps(schema)
    answer = await generate(channel, pb.GenerateRequest(text=STORY, sampling=sampling))
    assert isinstance(json.loads(answer.completions[0].text)["ok"], bool)
    sampling = greedy(16)
    sampling.structured_outputs.regex = "[0-9]{3}-[0-9]{2}"
    answer = await generate(
        channel, pb.GenerateRequest(text=STORY, adapter="alpha", sampling=sampling)
    )
    assert re.fullmatch("[0-9]{3}-[0-9]{2}", answer.completions[0].text)
    sampling = greedy(16)
    sampling.structured_outputs.choice.options.extend(["yes", "no"])
    answer = await generate(channel, pb.GenerateRequest(text=STORY, sampling=sampling))
    assert answer.completions[0].text in ("yes", "no")


async def test_tokens_can_be_forced_and_forbidden(channel: grpc.aio.Channel) -> None:
    sampling = greedy(4)
    sampling.logit_bias[321] = 100
    answer = await generate(
        channel, pb.GenerateRequest(text=STORY, sampling=sampling, return_token_ids=True)
    )
    assert set(answer.completions[0].token_ids) == {321}
    sampling = greedy(4)
    sampling.allowed_token_ids.extend([400, 401])
    answer = await generate(
        channel, pb.GenerateRequest(text=STORY, sampling=sampling, return_token_ids=True)
    )
    assert set(answer.completions[0].token_ids) <= {400, 401}


async def test_larger_chunks_carry_the_same_tokens_in_fewer_messages(
    channel: grpc.aio.Channel,
) -> None:
    async def run(max_tokens_per_chunk: int) -> tuple[list[int], int]:
        request = pb.GenerateRequest(
            text=STORY,
            sampling=greedy(64),
            return_token_ids=True,
            max_tokens_per_chunk=max_tokens_per_chunk,
        )
        events = [event async for event in InferenceStub(channel).GenerateStream(request)]
        return [i for event in events for i in event.delta.token_ids], len(events)

    single, many = await run(1)
    chunked, few = await run(16)
    assert chunked == single and len(single) == 64
    assert few < many / 3


async def test_only_ids_without_text(channel: grpc.aio.Channel) -> None:
    sampling = greedy(4)
    sampling.detokenize = False
    answer = await generate(
        channel, pb.GenerateRequest(text=STORY, sampling=sampling, return_token_ids=True)
    )
    assert not answer.completions[0].text and len(answer.completions[0].token_ids) == 4


async def test_defaults_are_those_that_get_model_tells(channel: grpc.aio.Channel) -> None:
    model = (await InferenceStub(channel).GetModel(pb.GetModelRequest())).model
    assert model.base_model == "tiny" and model.dtype == "float32"
    assert model.limits.max_model_len == 2048 and model.limits.max_lora_rank == 32
    assert model.engine_version.startswith("0.32.0")
    for digest in (model.fingerprints.config_sha256, model.fingerprints.weights_sha256):
        assert re.fullmatch("[0-9a-f]{64}", digest)
    request = pb.GenerateRequest(text=STORY, sampling=pb.SamplingParams(ignore_eos=True))
    answer = await generate(channel, request)
    assert answer.usage.completion_tokens == model.defaults.max_tokens
    assert answer.completions[0].finish_reason == pb.FINISH_REASON_LENGTH


async def test_a_repeated_prompt_is_served_from_the_prefix_cache(
    channel: grpc.aio.Channel,
) -> None:
    request = pb.GenerateRequest(text="word " * 600, sampling=greedy(1))
    first = await generate(channel, request)
    second = await generate(channel, request)
    assert first.usage.cached_tokens == 0 < second.usage.cached_tokens
    adapted = pb.GenerateRequest(text="word " * 600, adapter="beta", sampling=greedy(1))
    assert (await generate(channel, adapted)).usage.cached_tokens == 0, "its keys are its own"


async def test_timings_add_up(channel: grpc.aio.Channel) -> None:
    timings = (await generate(channel, pb.GenerateRequest(text=STORY, sampling=greedy()))).timings
    assert 0 < timings.render_ms < timings.time_to_first_token_ms < timings.total_ms
    assert timings.queue_ms >= 0


async def test_metrics_count_over_all_workers(
    gateway: GatewayProcess, channel: grpc.aio.Channel
) -> None:
    labels = {"adapter": "beta", "method": "Generate", "code": "OK"}
    before = sum(gateway.metrics("llm_adapter_requests_total", **labels))
    tokens = sum(gateway.metrics("llm_adapter_tokens_total", adapter="beta", kind="completion"))
    gaps = sum(gateway.metrics("vllm:inter_token_latency_seconds_count", shard="shard-0"))
    options = [("grpc.use_local_subchannel_pool", 1)]
    for _ in range(8):  # connections of their own, so that both workers get some
        async with grpc.aio.insecure_channel(gateway.address, options=options) as own:
            await generate(own, pb.GenerateRequest(text="hi", adapter="beta", sampling=greedy(3)))
    assert sum(gateway.metrics("llm_adapter_requests_total", **labels)) == before + 8
    after = sum(gateway.metrics("llm_adapter_tokens_total", adapter="beta", kind="completion"))
    assert after == tokens + 24
    after = sum(gateway.metrics("vllm:inter_token_latency_seconds_count", shard="shard-0"))
    assert after == gaps + 16
    assert gateway.metrics("llm_adapter_latency_seconds_count", adapter="beta", stage="ttft")
    assert gateway.metrics("adapters_resident", shard="shard-0") == [3.0]
    assert sum(gateway.metrics("adapter_load_seconds_count", phase="all", result="ok")) >= 3
    for name in ("vllm:num_requests_running", "vllm:kv_cache_usage_perc"):
        assert len(gateway.metrics(name, shard="shard-0")) == 1, "one series per shard"
    assert sum(gateway.metrics("vllm:generation_tokens_total", shard="shard-0")) > 0
