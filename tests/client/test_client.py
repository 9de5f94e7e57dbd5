"""The client against a real gRPC server on the loopback."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc
import pytest

from lora_gateway import (
    ChatMessage,
    DeadlineExceeded,
    FinishReason,
    GatewayClient,
    GenerationDelta,
    GenerationFinished,
    GenerationStarted,
    IncompleteStream,
    SamplingKeywords,
    SamplingParams,
    Unavailable,
)
from lora_gateway.v1 import inference_pb2 as pb
from tests.client.fake_inference import REQUEST_ID, UNAVAILABLE, FakeInference, served

SOON_S = 5.0
"""For what happens at once; a test that needs it all has failed."""


@pytest.fixture
def inference() -> FakeInference:
    return FakeInference()


@pytest.fixture
async def client(inference: FakeInference) -> AsyncIterator[GatewayClient]:
    async with served(inference) as target, GatewayClient(target) as client:
        yield client


# --- answers


async def test_generate_returns_the_answer_of_the_adapter_asked_for(
    client: GatewayClient, inference: FakeInference
) -> None:
    answer = await client.generate(
        "ahoy there", adapter="pirate", version=3, session_id="s", return_token_ids=True
    )

    assert answer.completions[0].text == "ahoy there"
    assert answer.completions[0].finish_reason == FinishReason.FINISH_REASON_STOP
    assert (answer.served_by.adapter, answer.served_by.version) == ("pirate", 3)
    assert inference.requests == [
        pb.GenerateRequest(
            text="ahoy there", adapter="pirate", version=3, session_id="s", return_token_ids=True
        )
    ]


async def test_a_stream_yields_typed_events_and_keeps_the_first_and_the_last(
    client: GatewayClient,
) -> None:
    async with client.stream("one two") as stream:
        events = [event async for event in stream]

    assert [type(event) for event in events] == [
        GenerationStarted,
        GenerationDelta,
        GenerationDelta,
        GenerationFinished,
    ]
    assert stream.started == events[0]
    assert stream.finished == events[-1]
    assert stream.finished.usage.completion_tokens == 2


async def test_the_text_of_a_stream_comes_piece_by_piece(client: GatewayClient) -> None:
    async with client.stream("one two") as stream:
        assert [text async for text in stream.text()] == ["one", " two"]
    assert stream.finished.completions[0].finish_reason == FinishReason.FINISH_REASON_STOP


async def test_what_a_stream_has_not_read_yet_it_does_not_make_up(client: GatewayClient) -> None:
    async with client.stream("one two") as stream:
        with pytest.raises(RuntimeError, match="nothing of the stream"):
            _ = stream.started
        await anext(stream)
        assert stream.started.request_id == REQUEST_ID
        with pytest.raises(RuntimeError, match="not been read to its end"):
            _ = stream.finished


async def test_a_prompt_is_text_or_token_ids_or_chat_turns(
    client: GatewayClient, inference: FakeInference
) -> None:
    await client.generate("hi")
    await client.generate([1, 2])
    await client.generate([ChatMessage(role="user", content="hi")])
    await client.generate([{"role": "user", "content": "hi"}])

    chat = pb.Chat(messages=[ChatMessage(role="user", content="hi")])
    assert inference.requests == [
        pb.GenerateRequest(text="hi"),
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2])),
        pb.GenerateRequest(chat=chat),
        pb.GenerateRequest(chat=chat),
    ]


@pytest.mark.parametrize("prompt", [b"hi", [1.5], ["hi"], [{"role": "user"}, 1]])
async def test_what_is_no_prompt_raises_before_anything_is_sent(
    client: GatewayClient, inference: FakeInference, prompt: list[int]
) -> None:
    with pytest.raises(TypeError):
        await client.generate(prompt)
    assert not inference.requests


async def test_tokenize_returns_ids_and_on_request_their_texts(client: GatewayClient) -> None:
    assert not (await client.tokenize("a b")).tokens
    assert (await client.tokenize("a b", return_tokens=True)).tokens == ["a", "b"]
    chat = await client.tokenize([{"role": "user", "content": "a b c"}])
    assert chat.token_ids == [0, 1, 2]


async def test_get_model_returns_the_model(client: GatewayClient) -> None:
    model = await client.get_model()
    assert model.base_model == "tiny"
    assert model.limits.max_model_len == 2048


# --- sampling


async def test_sampling_is_given_as_keywords_or_as_a_message(
    client: GatewayClient, inference: FakeInference
) -> None:
    await client.generate("hi", temperature=0, max_tokens=None, stop="END")
    await client.generate("hi", sampling=SamplingParams(temperature=0, stop=["END"]))

    keywords, message = (request.sampling for request in inference.requests)
    assert keywords == message
    assert keywords.HasField("temperature")
    assert not keywords.HasField("max_tokens")


async def test_sampling_given_both_ways_is_refused(client: GatewayClient) -> None:
    with pytest.raises(TypeError, match="top_p as keywords, but not both"):
        await client.generate("hi", sampling=SamplingParams(n=2), top_p=0.5)


async def test_a_misspelt_sampling_keyword_is_refused(client: GatewayClient) -> None:
    with pytest.raises(TypeError, match="temprature"):
        await client.generate("hi", temprature=0)  # type: ignore[call-arg]


def test_sampling_keywords_are_the_fields_of_the_message() -> None:
    assert list(SamplingKeywords.__annotations__) == list(SamplingParams.DESCRIPTOR.fields_by_name)


# --- retries


async def test_calls_that_fail_before_a_token_are_tried_again(
    client: GatewayClient, inference: FakeInference
) -> None:
    inference.failures.extend([UNAVAILABLE, UNAVAILABLE])
    assert (await client.generate("hi")).completions[0].text == "hi"
    assert len(inference.requests) == 3

    inference.failures.append(UNAVAILABLE)
    async with client.stream("hi") as stream:
        assert [text async for text in stream.text()] == ["hi"]
    assert len(inference.requests) == 5


async def test_four_failed_attempts_are_the_last(
    client: GatewayClient, inference: FakeInference
) -> None:
    inference.failures.extend([UNAVAILABLE] * 5)
    with pytest.raises(Unavailable, match="not now"):
        await client.generate("hi")
    assert len(inference.requests) == 4


async def test_a_prompt_of_a_megabyte_is_tried_again_too(
    client: GatewayClient, inference: FakeInference
) -> None:
    inference.failures.append(UNAVAILABLE)
    await client.generate("x" * 2**20)
    assert len(inference.requests) == 2


async def test_a_stream_that_fails_after_a_token_is_not_tried_again(
    client: GatewayClient, inference: FakeInference
) -> None:
    inference.cuts.append(UNAVAILABLE)
    texts = []
    with pytest.raises(Unavailable):
        async for text in client.stream("one two").text():
            texts.append(text)
    assert texts == ["one"]
    assert len(inference.requests) == 1


# --- ends


async def test_a_stream_that_ends_without_finished_raises(
    client: GatewayClient, inference: FakeInference
) -> None:
    inference.cuts.append(None)
    with pytest.raises(IncompleteStream) as raised:
        async for _ in client.stream("one two"):
            pass
    assert raised.value.code is grpc.StatusCode.DATA_LOSS
    assert raised.value.request_id == REQUEST_ID


async def test_leaving_the_block_of_a_stream_cancels_it_at_the_server(
    client: GatewayClient, inference: FakeInference
) -> None:
    inference.hangs = True
    async with client.stream("one two") as stream:
        async for text in stream.text():
            assert text == "one"
            break
    await asyncio.wait_for(inference.cancelled.wait(), SOON_S)
    assert [event async for event in stream] == []


async def test_aclosing_a_stream_cancels_it_at_the_server(
    client: GatewayClient, inference: FakeInference
) -> None:
    inference.hangs = True
    async with aclosing(client.stream("one two")) as stream:
        await anext(stream)
    await asyncio.wait_for(inference.cancelled.wait(), SOON_S)


async def test_breaking_out_of_a_bare_loop_cancels_the_stream_at_the_server(
    client: GatewayClient, inference: FakeInference
) -> None:
    inference.hangs = True
    gc.disable()  # dropping the last reference must be enough
    try:
        async for event in client.stream("one two"):
            if isinstance(event, GenerationDelta):
                break
        await asyncio.wait_for(inference.cancelled.wait(), SOON_S)
    finally:
        gc.enable()


async def test_breaking_out_of_a_bare_loop_over_text_cancels_the_stream_at_the_server(
    client: GatewayClient, inference: FakeInference
) -> None:
    inference.hangs = True
    async for _ in client.stream("one two").text():
        break
    await asyncio.wait_for(inference.cancelled.wait(), SOON_S)


async def test_cancelling_the_reading_task_cancels_the_stream_at_the_server(
    client: GatewayClient, inference: FakeInference
) -> None:
    inference.hangs = True
    first_token = asyncio.Event()

    async def read() -> None:
        async for _ in client.stream("one two").text():
            first_token.set()

    reading = asyncio.create_task(read())
    await asyncio.wait_for(first_token.wait(), SOON_S)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await asyncio.wait_for(inference.cancelled.wait(), SOON_S)


async def test_closing_the_client_ends_its_streams_at_the_server(
    inference: FakeInference,
) -> None:
    inference.hangs = True
    async with served(inference) as target:
        client = GatewayClient(target)
        stream = client.stream("one two")
        await anext(stream)
        await client.close()
        await client.close()
        await asyncio.wait_for(inference.cancelled.wait(), SOON_S)


# --- deadlines, metadata, connection


async def test_every_call_has_a_deadline(client: GatewayClient, inference: FakeInference) -> None:
    await client.generate("hi")
    assert inference.time_remaining_s == pytest.approx(30, abs=SOON_S)
    async with client.stream("hi") as stream:
        await anext(stream)
    assert inference.time_remaining_s == pytest.approx(300, abs=SOON_S)
    await client.generate("hi", timeout_s=90)
    assert inference.time_remaining_s == pytest.approx(90, abs=SOON_S)


async def test_a_timeout_raises_and_cancels_at_the_server(
    client: GatewayClient, inference: FakeInference
) -> None:
    inference.hangs = True
    with pytest.raises(DeadlineExceeded) as raised:
        async for _ in client.stream("one two", timeout_s=0.2):
            pass
    assert raised.value.reason is None
    await asyncio.wait_for(inference.cancelled.wait(), SOON_S)


async def test_metadata_of_the_client_and_of_the_call_are_sent(inference: FakeInference) -> None:
    async with (
        served(inference) as target,
        GatewayClient(target, metadata={"x-team": "search", "traceparent": "old"}) as client,
    ):
        await client.generate("hi", metadata={"traceparent": "new"})
    assert inference.metadata["x-team"] == "search"
    assert inference.metadata["traceparent"] == "new"


async def test_nobody_listening_is_unavailable(inference: FakeInference) -> None:
    async with served(inference) as target:
        pass
    async with GatewayClient(target) as client:
        with pytest.raises(Unavailable) as raised:
            await client.get_model(timeout_s=SOON_S)
    assert raised.value.reason is None


def test_a_client_outside_of_an_event_loop_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        GatewayClient("127.0.0.1:50051")
