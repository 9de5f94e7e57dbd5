"""Fingerprints, and the ids that carry them through vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from engine.fingerprint import fingerprint, tag, untag

TENANT, NAME, TOKENS = "acme", "acme/alpha@3", (1, 2, 3)
SAMPLING = {"max_tokens": 5, "logit_bias": {7: 1.0, 8: -1.0}, "stop": ["a", "b"]}


def test_it_is_the_same_for_the_same_request_in_every_process() -> None:
    one = fingerprint(TENANT, NAME, TOKENS, SAMPLING)
    other = fingerprint(
        TENANT,
        NAME,
        list(TOKENS),
        {"stop": ["a", "b"], "logit_bias": {8: -1.0, 7: 1.0}, "max_tokens": 5},
    )
    assert one == other == 2842155100973564414


@pytest.mark.parametrize(
    "other",
    [
        ("other", NAME, TOKENS, SAMPLING),
        (TENANT, "acme/alpha@4", TOKENS, SAMPLING),
        (TENANT, "", TOKENS, SAMPLING),
        (TENANT, NAME, (1, 2), SAMPLING),
        (TENANT, NAME, (1, 3, 2), SAMPLING),
        (TENANT, NAME, TOKENS, {**SAMPLING, "max_tokens": 6}),
        (TENANT, NAME, TOKENS, {**SAMPLING, "logit_bias": {7: 1.0, 8: -2.0}}),
        (TENANT, NAME, TOKENS, {**SAMPLING, "structured_outputs": {"json": "{}"}}),
    ],
    ids=["tenant", "version", "base", "shorter", "order", "sampling", "bias", "structure"],
)
def test_what_an_engine_is_asked_for_is_part_of_it(other: Any) -> None:
    assert fingerprint(*other) != fingerprint(TENANT, NAME, TOKENS, SAMPLING)


def test_a_seed_drawn_for_each_try_is_not() -> None:
    seeded = [fingerprint(TENANT, NAME, TOKENS, {**SAMPLING, "seed": seed}) for seed in (1, 2)]
    assert seeded[0] == seeded[1]


def test_vllms_ids_say_what_was_put_into_ours() -> None:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.parallel_sampling import ParentRequest

    request: Any = SimpleNamespace(
        request_id=tag("job-7.a_b", 2**64 - 1), external_req_id=None, params=SamplingParams(n=2)
    )
    InputProcessor.assign_request_id(request)
    assert untag(request.request_id) == ("job-7.a_b", 2**64 - 1)
    child, _ = ParentRequest(request).get_child_info(1)
    assert child.startswith("1_") and untag(child) == ("job-7.a_b", 2**64 - 1)
    assert untag(tag("r", 0)) == ("r", 0)
    assert untag("warm-up-12345678") is None
