"""Requests as the engine gets them: nothing is lost, renamed or invented."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor

from engine.errors import InvalidRequest, PromptMissing
from engine.generation import Chat, ChatMessage, Prompt
from engine.sampling import MAX_ENTRIES
from gateway.codec import GenerateCall, SamplingDefaults, decode_generate, decode_tokenize
from lora_gateway.v1 import inference_pb2 as pb

DEFAULTS = SamplingDefaults(max_tokens=64, temperature=0.5)
VOCAB_SIZE = 1000
MAX_MODEL_LEN = 512
OURS = {"max_tokens": 64, "temperature": 0.5}
"""What is in force when nothing is set."""

SET: dict[str, Any] = {
    "n": 2,
    "max_tokens": 7,
    "min_tokens": 3,
    "temperature": 0.25,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.125,
    "seed": -7,
    "presence_penalty": -1.5,
    "frequency_penalty": 1.5,
    "repetition_penalty": 1.25,
    "stop": ["a", "b"],
    "stop_token_ids": [4, 5],
    "include_stop_str_in_output": True,
    "ignore_eos": True,
    "logprobs": 3,
    "prompt_logprobs": 2,
    "logprob_token_ids": [7, 8, 9],
    "detokenize": False,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "logit_bias": {3: -2.5, 4: 50.0},
    "allowed_token_ids": [10, 11],
    "bad_words": ["x", "y"],
    "structured_outputs": {"regex": "[ab]+"},
    "repetition_detection": {"max_pattern_size": 8, "min_pattern_size": 2, "min_count": 3},
}
"""A value for each field, none of which is a default."""
ZERO_IS_REFUSED = {"n", "max_tokens", "top_p", "repetition_penalty"}
ZEROES = {
    name: type(value)()
    for name, value in SET.items()
    if isinstance(value, int | float) and name not in ZERO_IS_REFUSED
}
"""Fields whose zero means something else than leaving them out."""
WHITESPACE = {"disable_any_whitespace": False, "disable_additional_properties": False}


def decoded(request: pb.GenerateRequest) -> GenerateCall:
    return decode_generate(
        request, defaults=DEFAULTS, vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN
    )


def asking(**sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="hello", sampling=pb.SamplingParams(**sampling))


def violated(request: pb.GenerateRequest) -> set[str]:
    with pytest.raises(InvalidRequest) as caught:
        decoded(request)
    return {violation.field for violation in caught.value.violations}


# --- sampling ----------------------------------------------------------------


def test_every_sampling_field_is_tried_here() -> None:
    assert SET.keys() == set(pb.SamplingParams.DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize("name", SET)
def test_a_field_that_is_set_arrives_under_its_own_name_and_alone(name: str) -> None:
    expected = SET[name] | WHITESPACE if name == "structured_outputs" else SET[name]
    sampling = decoded(asking(**{name: SET[name]})).sampling
    assert sampling == OURS | {name: expected}
    assert type(sampling[name]) is type(expected), "no container of protobuf's reaches the engine"


@pytest.mark.parametrize("name", ZEROES)
def test_a_zero_that_is_set_is_not_unset(name: str) -> None:
    assert decoded(asking(**{name: ZEROES[name]})).sampling == OURS | {name: ZEROES[name]}


def test_what_is_unset_is_left_to_vllm_except_our_two_defaults() -> None:
    assert decoded(pb.GenerateRequest(text="hello")).sampling == OURS
    assert decoded(asking()).sampling == OURS


@pytest.mark.parametrize(("asked", "room"), [(10, 64), (64, 64), (65, 65), (200, 200)])
def test_the_default_of_max_tokens_leaves_room_for_min_tokens(asked: int, room: int) -> None:
    assert decoded(asking(min_tokens=asked)).sampling["max_tokens"] == room


@pytest.mark.parametrize("name", MAX_ENTRIES)
def test_of_a_list_that_is_too_long_no_more_is_copied_than_shows_it(name: str) -> None:
    most = MAX_ENTRIES[name]
    field = pb.SamplingParams.DESCRIPTOR.fields_by_name[name]
    entries: Any = ["x"] * (most * 3)
    if field.message_type is not None:
        entries = dict.fromkeys(range(most * 3), 0.0)
    elif field.type != FieldDescriptor.TYPE_STRING:
        entries = [1] * (most * 3)
    assert violated(asking(**{name: entries})) == {f"sampling.{name}"}


def test_the_shortest_pattern_that_repeats_has_a_token_unless_told() -> None:
    detection = {"max_pattern_size": 4, "min_count": 2}
    sampling = decoded(asking(repetition_detection=detection)).sampling
    assert sampling["repetition_detection"] == detection | {"min_pattern_size": 1}


# --- structured outputs ------------------------------------------------------

CONSTRAINTS: dict[str, Any] = {
    "json": '{"type": "object"}',
    "regex": "[a-z]+",
    "choice": ["yes", "no"],
    "grammar": 'root ::= "a"',
    "json_object": True,
    "structural_tag": '{"structures": []}',
}


def constrained(kind: str, value: Any, **switches: bool) -> pb.GenerateRequest:
    constraint = pb.Choice(options=value) if kind == "choice" else value
    wanted: dict[str, Any] = {kind: constraint, **switches}
    return asking(structured_outputs=pb.StructuredOutputs(**wanted))


def test_every_constraint_is_tried_here() -> None:
    constraint = pb.StructuredOutputs.DESCRIPTOR.oneofs_by_name["constraint"]
    assert CONSTRAINTS.keys() == {field.name for field in constraint.fields}


@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_a_constraint_arrives_under_its_own_name_and_alone(kind: str) -> None:
    sampling = decoded(constrained(kind, CONSTRAINTS[kind])).sampling
    assert sampling["structured_outputs"] == WHITESPACE | {kind: CONSTRAINTS[kind]}


@pytest.mark.parametrize("switch", WHITESPACE)
def test_a_switch_of_a_constraint_arrives(switch: str) -> None:
    sampling = decoded(constrained("json", "{}", **{switch: True})).sampling
    assert sampling["structured_outputs"] == WHITESPACE | {"json": "{}", switch: True}


def test_structured_outputs_without_a_constraint_are_refused() -> None:
    request = asking(structured_outputs=pb.StructuredOutputs(disable_any_whitespace=True))
    assert violated(request) == {"sampling.structured_outputs"}


@pytest.mark.parametrize(
    ("kind", "largest"),
    [("json", 65536), ("regex", 4096), ("grammar", 65536), ("structural_tag", 65536)],
)
def test_the_text_of_a_constraint_is_bounded_and_not_empty(kind: str, largest: int) -> None:
    decoded(constrained(kind, "x" * largest))
    for text in ("", "x" * (largest + 1), "é" * (largest // 2 + 1)):
        assert violated(constrained(kind, text)) == {f"sampling.structured_outputs.{kind}"}


@pytest.mark.parametrize(
    "options",
    [[], ["a", "a"], ["a", ""], [str(k) for k in range(1025)], ["x" * 40_000, "y" * 40_000]],
    ids=["none", "equal ones", "an empty one", "too many", "too large"],
)
def test_choices_are_distinct_filled_and_bounded(options: list[str]) -> None:
    path = "sampling.structured_outputs.choice.options"
    assert violated(constrained("choice", options)) == {path}


def test_any_json_object_is_asked_for_or_left_out() -> None:
    assert violated(constrained("json_object", False)) == {
        "sampling.structured_outputs.json_object"
    }


# --- prompts and targets -----------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ({"text": "hello"}, "hello"),
        ({"token_ids": pb.TokenIds(ids=[3, 0, 4])}, [3, 0, 4]),
        (
            {"chat": pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])},
            Chat([ChatMessage("user", "hi")]),
        ),
        (
            {"chat": pb.Chat(messages=[pb.ChatMessage(role="system")])},
            Chat([ChatMessage("system", "")]),
        ),
    ],
    ids=["text", "token ids", "chat", "a message without content"],
)
def test_a_prompt_of_each_kind_arrives(prompt: dict[str, Any], expected: Prompt) -> None:
    assert decoded(pb.GenerateRequest(**prompt)).prompt == expected
    if "token_ids" not in prompt:
        request = pb.TokenizeRequest(**prompt)
        assert decode_tokenize(request, max_model_len=MAX_MODEL_LEN) == expected


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ({}, "prompt"),
        ({"text": ""}, "text"),
        ({"token_ids": pb.TokenIds()}, "token_ids.ids"),
        ({"chat": pb.Chat()}, "chat.messages"),
    ],
    ids=["none", "text", "token ids", "chat"],
)
def test_a_prompt_that_holds_nothing_is_missing(prompt: dict[str, Any], field: str) -> None:
    with pytest.raises(PromptMissing) as caught:
        decoded(pb.GenerateRequest(**prompt))
    assert [violation.field for violation in caught.value.violations] == [field]
    if "token_ids" not in prompt:
        with pytest.raises(PromptMissing):
            decode_tokenize(pb.TokenizeRequest(**prompt), max_model_len=MAX_MODEL_LEN)


def test_each_method_names_the_prompts_that_it_takes() -> None:
    with pytest.raises(PromptMissing, match="set one of text, token_ids, chat"):
        decoded(pb.GenerateRequest())
    with pytest.raises(PromptMissing, match="set one of text, chat"):
        decode_tokenize(pb.TokenizeRequest(), max_model_len=MAX_MODEL_LEN)


def test_a_missing_prompt_is_one_violation_among_others() -> None:
    with pytest.raises(InvalidRequest) as caught:
        decoded(pb.GenerateRequest(sampling=pb.SamplingParams(top_p=0)))
    assert not isinstance(caught.value, PromptMissing)
    assert [v.field for v in caught.value.violations] == ["prompt", "sampling.top_p"]


def test_of_too_many_token_ids_no_more_are_copied_than_show_it() -> None:
    prompt = decoded(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 100_000))).prompt
    assert not isinstance(prompt, (str, Chat))
    assert len(prompt) == MAX_MODEL_LEN + 1


def test_roles_are_checked_in_every_message() -> None:
    roles = ["system", "user", "assistant", "tool", "", "User", "wizard"]
    chat = pb.Chat(messages=[pb.ChatMessage(role=role, content="x") for role in roles])
    wrong = {f"chat.messages[{index}].role" for index in (4, 5, 6)}
    assert violated(pb.GenerateRequest(chat=chat)) == wrong
    with pytest.raises(InvalidRequest, match="use one of system, user, assistant, tool"):
        decode_tokenize(pb.TokenizeRequest(chat=chat), max_model_len=MAX_MODEL_LEN)


@pytest.mark.parametrize("character", ["w", "é", "\U0001f3f4", "\x01", "\U000e0001"], ids=ascii)
def test_a_role_of_any_length_leaves_room_for_the_cure(character: str) -> None:
    message = pb.ChatMessage(role=character * 10_000)
    with pytest.raises(InvalidRequest, match="one of system, user, assistant, tool"):
        decoded(pb.GenerateRequest(chat=pb.Chat(messages=[message])))


def test_a_chat_may_have_so_many_messages() -> None:
    messages = [pb.ChatMessage(role="user")] * 4096
    decoded(pb.GenerateRequest(chat=pb.Chat(messages=messages)))
    longer = pb.Chat(messages=[*messages, messages[0]])
    assert violated(pb.GenerateRequest(chat=longer)) == {"chat.messages"}


def test_an_adapter_and_its_version_arrive() -> None:
    call = decoded(pb.GenerateRequest(text="x", adapter="a.b-c_9", version=0))
    assert (call.adapter, call.version) == ("a.b-c_9", 0)
    assert decoded(pb.GenerateRequest(text="x", adapter="a")).version is None
    assert decoded(pb.GenerateRequest(text="x")).adapter == ""


@pytest.mark.parametrize(
    ("target", "fields"),
    [
        ({"adapter": "Alpha"}, {"adapter"}),
        ({"adapter": "a" * 64}, {"adapter"}),
        ({"adapter": "a\n"}, {"adapter"}),
        ({"version": 1}, {"version"}),
        ({"session_id": "s" * 129}, {"session_id"}),
        ({"session_id": "é" * 65}, {"session_id"}),
        ({"max_tokens_per_chunk": 1025}, {"max_tokens_per_chunk"}),
        ({"adapter": "../a", "session_id": "s" * 200}, {"adapter", "session_id"}),
    ],
)
def test_what_names_no_target_is_refused(target: dict[str, Any], fields: set[str]) -> None:
    assert violated(pb.GenerateRequest(text="x", **target)) == fields


def test_targets_at_their_limits_are_allowed() -> None:
    limits: dict[str, Any] = {"session_id": "s" * 128, "max_tokens_per_chunk": 1024}
    assert decoded(pb.GenerateRequest(text="x", adapter="a" * 63, **limits)).adapter == "a" * 63


@pytest.mark.parametrize(("asked", "expected"), [(0, 1), (1, 1), (2, 2), (1024, 1024)])
def test_a_chunk_has_a_token_at_least(asked: int, expected: int) -> None:
    request = pb.GenerateRequest(text="x", max_tokens_per_chunk=asked, return_token_ids=True)
    assert decoded(request).tokens_per_delta == expected
    assert decoded(request).return_token_ids
