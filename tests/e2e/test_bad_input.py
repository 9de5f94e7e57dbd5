"""Every kind of bad input has its code, its reason and a cure; the engine serves on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import grpc
import pytest
import pytest_asyncio

from lora_gateway.v1 import inference_pb2 as pb
from lora_gateway.v1.inference_pb2_grpc import InferenceStub
from tests.details import bad_fields, error_info
from tests.e2e.gateway_process import GatewayProcess

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
NAN = float("nan")
STRUCTURED = "sampling.structured_outputs"


@dataclass(frozen=True)
class Case:
    """One bad request and the answer that it must get."""

    request: pb.GenerateRequest
    code: grpc.StatusCode
    reason: str
    says: str
    """Part of the message that tells what to do."""
    fields: set[str] = field(default_factory=set)


def sampling(**parameters: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="hello", sampling=pb.SamplingParams(**parameters))  # type: ignore[arg-type]


def structured(**constraint: object) -> pb.GenerateRequest:
    return sampling(structured_outputs=pb.StructuredOutputs(**constraint), max_tokens=4)  # type: ignore[arg-type]


def chat(*turns: tuple[str, str]) -> pb.GenerateRequest:
    messages = [pb.ChatMessage(role=role, content=content) for role, content in turns]
    return pb.GenerateRequest(chat=pb.Chat(messages=messages))


CASES = {
    "missing prompt": Case(
        pb.GenerateRequest(),
        INVALID,
        "PROMPT_MISSING",
        "set one of text, token_ids, chat",
        {"prompt"},
    ),
    "empty text": Case(
        pb.GenerateRequest(text=""), INVALID, "PROMPT_MISSING", "must not be empty", {"text"}
    ),
    "no token ids": Case(
        pb.GenerateRequest(token_ids=pb.TokenIds()), INVALID, "PROMPT_MISSING", "must not be empty"
    ),
    "no messages": Case(chat(), INVALID, "PROMPT_MISSING", "add a user message"),
    "unknown adapter": Case(
        pb.GenerateRequest(text="hello", adapter="delta"),
        *(NOT_FOUND, "ADAPTER_NOT_FOUND", "served here: alpha, beta, pirate"),
    ),
    "unknown version": Case(
        pb.GenerateRequest(text="hello", adapter="alpha", version=99),
        *(NOT_FOUND, "VERSION_NOT_FOUND", "READY here: 1"),
    ),
    "version without adapter": Case(
        pb.GenerateRequest(text="hello", version=1),
        *(INVALID, "INVALID_FIELD", "needs an adapter", {"version"}),
    ),
    "adapter name of another alphabet": Case(
        pb.GenerateRequest(text="hello", adapter="../etc"),
        *(INVALID, "INVALID_FIELD", "must match", {"adapter"}),
    ),
    "prompt longer than the context": Case(
        pb.GenerateRequest(text="hello world " * 2000), INVALID, "PROMPT_TOO_LONG", "shorten it"
    ),
    "prompt that fills the context": Case(
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 2048)),
        *(INVALID, "PROMPT_TOO_LONG", "must also hold the answer"),
    ),
    "5 MiB of text": Case(
        pb.GenerateRequest(text="a" * (5 << 20)), INVALID, "PROMPT_TOO_LONG", "shorten it"
    ),
    "5 MiB of chat": Case(
        chat(("user", "a" * (5 << 20))), INVALID, "PROMPT_TOO_LONG", "shorten it"
    ),
    "token id outside the vocabulary": Case(
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 4_000_000_000])),
        *(INVALID, "INVALID_FIELD", "must be below", {"token_ids"}),
    ),
    "NaN temperature": Case(
        sampling(temperature=NAN), INVALID, "INVALID_FIELD", "[0, 2]", {"sampling.temperature"}
    ),
    "many at once": Case(
        sampling(temperature=3, top_p=0, min_p=2, presence_penalty=-3, repetition_penalty=0, n=65),
        *(INVALID, "INVALID_FIELD", "must be in"),
        {
            *("sampling.temperature", "sampling.top_p", "sampling.min_p", "sampling.n"),
            *("sampling.presence_penalty", "sampling.repetition_penalty"),
        },
    ),
    "NaN logit bias": Case(sampling(logit_bias={5: NAN}), INVALID, "INVALID_FIELD", "[-100, 100]"),
    "infinite penalty": Case(
        sampling(repetition_penalty=float("inf")), INVALID, "INVALID_FIELD", "finite"
    ),
    "no tokens": Case(sampling(max_tokens=0), INVALID, "INVALID_FIELD", "[1,"),
    "more minimum than maximum": Case(
        sampling(max_tokens=4, min_tokens=5), INVALID, "INVALID_FIELD", "must not exceed max_tokens"
    ),
    "greedy and several": Case(
        sampling(n=2, temperature=0), INVALID, "INVALID_FIELD", "needs temperature above 0"
    ),
    "too many log probabilities": Case(
        sampling(logprobs=21), INVALID, "INVALID_FIELD", "[0, 20]", {"sampling.logprobs"}
    ),
    "empty stop string": Case(
        sampling(stop=[""]), INVALID, "INVALID_FIELD", "1 to 1024 bytes", {"sampling.stop[0]"}
    ),
    "biased id outside the vocabulary": Case(
        sampling(logit_bias={9_999_999: 1.0}), INVALID, "INVALID_FIELD", "must be below"
    ),
    "allowed id outside the vocabulary": Case(
        sampling(allowed_token_ids=[9_999_999]), INVALID, "INVALID_FIELD", "must be below"
    ),
    "constraint missing": Case(
        structured(), INVALID, "INVALID_FIELD", "needs a constraint", {STRUCTURED}
    ),
    "schema that is no JSON": Case(
        structured(json="{not json"), INVALID, "INVALID_STRUCTURED_OUTPUT", "cannot be used"
    ),
    "schema that is no schema": Case(
        structured(json='{"type": 5}'), INVALID, "INVALID_STRUCTURED_OUTPUT", "type"
    ),
    "schema nested too deep": Case(
        structured(json='{"items":' * 5000 + "{}" + "}" * 5000),
        *(INVALID, "INVALID_STRUCTURED_OUTPUT", "nested"),
    ),
    "broken regular expression": Case(
        structured(regex="("), INVALID, "INVALID_STRUCTURED_OUTPUT", "regex", {STRUCTURED}
    ),
    "regex over its size": Case(
        structured(regex="a" * 5000),
        INVALID,
        "INVALID_FIELD",
        "4096 bytes",
        {f"{STRUCTURED}.regex"},
    ),
    "broken grammar": Case(
        structured(grammar="root ::= ("), INVALID, "INVALID_STRUCTURED_OUTPUT", "grammar"
    ),
    "choice of nothing": Case(
        structured(choice=pb.Choice()), INVALID, "INVALID_FIELD", "must be 1 to 1024"
    ),
    "unknown role": Case(
        chat(("user", "hi"), ("wizard", "abracadabra")),
        *(INVALID, "INVALID_FIELD", "use one of system, user", {"chat.messages[1].role"}),
    ),
    "session id over its size": Case(
        pb.GenerateRequest(text="hello", session_id="s" * 129),
        INVALID,
        "INVALID_FIELD",
        "128 bytes",
    ),
}

RAW = {
    "random bytes": bytes(range(255, 0, -1)),
    "invalid UTF-8 in the prompt": b"\x1a\x02\xc3\x28",
    "a truncated message": pb.GenerateRequest(text="hello world").SerializeToString()[:-3],
}


@pytest_asyncio.fixture(autouse=True)
async def engine_serves_on(channel: grpc.aio.Channel) -> AsyncIterator[None]:
    """After every case the same engine answers a good request."""
    yield
    answer = await InferenceStub(channel).Generate(
        pb.GenerateRequest(
            text="still there?", adapter="alpha", sampling=pb.SamplingParams(max_tokens=2)
        ),
        timeout=20,
    )
    assert answer.usage.completion_tokens == 2


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_bad_request(channel: grpc.aio.Channel, name: str, method: str) -> None:
    case = CASES[name]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if method == "Generate":
            await InferenceStub(channel).Generate(case.request, timeout=20)
        else:
            async for _ in InferenceStub(channel).GenerateStream(case.request, timeout=20):
                pytest.fail("nothing is streamed before the error")
    assert caught.value.code() is case.code
    assert error_info(caught.value).reason == case.reason
    assert case.says in (caught.value.details() or "")
    assert "Traceback" not in (caught.value.details() or "")
    if case.fields:
        assert bad_fields(caught.value) == case.fields


@pytest.mark.parametrize("name", RAW)
async def test_bytes_that_are_no_message(channel: grpc.aio.Channel, name: str) -> None:
    call: Any = channel.unary_unary("/lora_gateway.v1.Inference/Generate")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(RAW[name], timeout=20)
    assert caught.value.code() is INVALID
    assert error_info(caught.value).reason == "MALFORMED_MESSAGE"


async def test_a_message_over_the_limit_is_refused_by_grpc(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await InferenceStub(channel).Generate(pb.GenerateRequest(text="a" * (9 << 20)), timeout=20)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


REGEX_BOMBS = (
    "(a|b)*a" + "(a|b)" * 60,
    "((((a+)+)+)+)+b",
    "(.{1,5000}){1,5000}",
    "((([a-z]{1,900}){1,900}){1,900}){1,900}",
    "(x+x+)+y",
    "^(([a-z])+.)+[A-Z]([a-z])+$" * 40,
)


@pytest.mark.parametrize("bomb", REGEX_BOMBS, ids=range(len(REGEX_BOMBS)))
async def test_a_regex_bomb_hurts_nobody_else(channel: grpc.aio.Channel, bomb: str) -> None:
    """It is answered or refused in time; a stream beside it keeps its pace."""
    stub = InferenceStub(channel)
    loop = asyncio.get_running_loop()
    seen_s: list[float] = []
    streaming = asyncio.Event()

    async def neighbour() -> None:
        request = pb.GenerateRequest(
            text="Once", sampling=pb.SamplingParams(max_tokens=1000, ignore_eos=True, temperature=1)
        )
        async for _ in stub.GenerateStream(request):
            seen_s.append(loop.time())
            streaming.set()

    beside = asyncio.create_task(neighbour())
    await streaming.wait()
    del seen_s[:-1]  # the first token may take its time
    try:
        await stub.Generate(structured(regex=bomb), timeout=20)
    except grpc.aio.AioRpcError as error:
        assert error.code() is INVALID
        assert error_info(error).reason == "INVALID_STRUCTURED_OUTPUT"
    if not beside.done():
        seen_s.append(loop.time())
    beside.cancel()
    await asyncio.gather(beside, return_exceptions=True)
    assert all(after_s - before_s < 2.0 for before_s, after_s in pairwise(seen_s))


async def test_the_gateway_is_the_same_as_before(gateway: GatewayProcess) -> None:
    """No worker died and no core was replaced by all of the above."""
    assert sum(gateway.metrics("gateway_worker_deaths_total")) == len(
        [line for line in gateway.log.splitlines() if " died while " in line]
    )
    assert gateway.process.poll() is None
