"""The gateway's greedy answers are those of transformers and PEFT, token for token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest

from lora_gateway.v1 import inference_pb2 as pb
from lora_gateway.v1.inference_pb2_grpc import InferenceStub
from tests.e2e.gateway_process import GatewayProcess, gateway_process

PROMPTS = ("Once upon a time", "The river runs to the sea and", "def main():")
MAX_TOKENS = 48


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(1, id="one worker", marks=pytest.mark.slow),
        pytest.param(2, id="two workers"),
    ],
)
def served(
    request: pytest.FixtureRequest,
    adapters: Mapping[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[GatewayProcess]:
    """A gateway of one worker of its own, or the shared one of two."""
    if request.param == 2:
        yield request.getfixturevalue("gateway")
    else:
        folder = tmp_path_factory.mktemp("one-worker")
        with gateway_process(folder, workers=1, adapters=adapters) as process:
            yield process


@pytest.fixture(scope="module")
def reference(tiny_model: Path, adapters: Mapping[str, Path]) -> dict[tuple[str, str], list[int]]:
    """Greedy tokens of transformers + PEFT, by adapter ("" is the base model) and prompt."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    answers = {}
    for adapter in ("", *adapters):
        model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        if adapter:
            model = PeftModel.from_pretrained(model, adapters[adapter])
        model.eval()
        for prompt in PROMPTS:
            inputs = tokenizer(prompt, return_tensors="pt")
            with torch.inference_mode():
                output = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
            answers[adapter, prompt] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return answers


async def test_greedy_tokens_equal_transformers_and_peft(
    served: GatewayProcess, reference: dict[tuple[str, str], list[int]]
) -> None:
    async with grpc.aio.insecure_channel(served.address) as channel:
        stub = InferenceStub(channel)
        for (adapter, prompt), expected in reference.items():
            request = pb.GenerateRequest(
                adapter=adapter,
                text=prompt,
                sampling=pb.SamplingParams(max_tokens=MAX_TOKENS, temperature=0),
                return_token_ids=True,
            )
            answer = await stub.Generate(request)
            assert list(answer.completions[0].token_ids) == expected, (adapter, prompt)
            streamed: list[int] = []
            async for event in stub.GenerateStream(request):
                streamed.extend(event.delta.token_ids)
            assert streamed == expected, (adapter, prompt)


def test_adapters_change_the_answers(reference: dict[tuple[str, str], list[int]]) -> None:
    """Else the comparison above would prove nothing about adapters."""
    for prompt in PROMPTS:
        answers = [tuple(reference[adapter, prompt]) for adapter in ("", "alpha", "beta", "pirate")]
        assert len(set(answers)) == len(answers)
