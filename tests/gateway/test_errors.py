"""Every exception has the code, the reason and the details that errors.proto documents."""

from __future__ import annotations

import asyncio
import base64
import inspect
from types import ModuleType
from urllib.parse import quote

import grpc
import pytest
from google.rpc import code_pb2, status_pb2

import engine.errors
import gateway.admission
import gateway.exceptions
import store.job_records
import store.records
import store.sources
import store.upload
import store.upload_folder
import store.uploads
import trainer.errors
from engine.errors import (
    AdapterInvalid,
    AdapterNotFound,
    AdapterQuarantined,
    InvalidRequest,
    PromptTooLong,
    ShardUnavailable,
    VersionNotFound,
)
from gateway.admission import RETRY_DELAY_S, Draining, Overloaded
from gateway.answers import INTERNAL_MESSAGE
from gateway.call import Call
from gateway.errors import status_of
from gateway.exceptions import (
    ControlPlaneUnavailable,
    DefaultDeadlineExceeded,
    Relayed,
    RequestNotFound,
    ShardUnknown,
)
from lora_gateway.v1 import inference_pb2 as pb
from lora_gateway.v1.errors_pb2 import ErrorReason
from store.records import (
    AdapterUnknown,
    RequestIdReused,
    VersionUnknown,
)
from store.sources import SourceNotAllowed
from store.uploads import (
    UploadIdReused,
    UploadUnknown,
)
from tests.details import DETAILS_KEY, bad_fields, error_info
from tests.gateway.conftest import FakeGateway
from tests.gateway.error_samples import BAD, LONG, SAMPLES, SECRET
from tests.gateway.promises import ONLY_OF_JOBS, PREFIX, PROMISED, details_of, reason_kept
from trainer.events import FailureReason

TOKENS_EMITTED = 7
CASES = [
    pytest.param(reason, error, id=f"{type(error).__name__}-{index}")
    for reason, errors in SAMPLES.items()
    for index, error in enumerate(errors)
]


@pytest.fixture
async def call() -> Call:
    call = Call("GenerateStream")
    call.completion_tokens = TOKENS_EMITTED
    return call


def exceptions_of(module: ModuleType) -> set[type]:
    return {
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, Exception)
        and member.__module__ == module.__name__
        and not member.__name__.startswith("_")
    }


@pytest.mark.parametrize(
    "module",
    [
        *(engine.errors, gateway.admission, gateway.exceptions),
        *(store.records, store.sources, store.upload, store.upload_folder, store.uploads),
        *(store.job_records, trainer.errors),
    ],
    ids=lambda m: m.__name__,
)
def test_every_exception_class_is_tried_here(module: ModuleType) -> None:
    tried = {type(error) for errors in SAMPLES.values() for error in errors} | {Relayed}
    assert exceptions_of(module)
    assert exceptions_of(module) <= tried


def test_every_reason_is_documented_and_comes_from_some_exception() -> None:
    reasons = {name.removeprefix(PREFIX) for name in ErrorReason.DESCRIPTOR.values_by_name}
    reasons -= {"UNSPECIFIED"}
    assert PROMISED.keys() | ONLY_OF_JOBS == reasons
    assert SAMPLES.keys() == reasons - ONLY_OF_JOBS
    assert {reason.value for reason in FailureReason} >= ONLY_OF_JOBS


@pytest.mark.parametrize(("reason", "error"), CASES)
async def test_an_exception_gets_the_code_and_details_that_its_reason_documents(
    reason: str, error: Exception, call: Call
) -> None:
    assert reason_kept(status_of(error, call)) == reason


@pytest.mark.parametrize("reason", SAMPLES)
async def test_all_documented_metadata_is_sent(reason: str, call: Call) -> None:
    """Some of it only where it is known, so by one of the samples at least."""
    sent = [details_of(status_of(error, call))["ErrorInfo"] for error in SAMPLES[reason]]
    assert any(info.metadata.keys() == PROMISED[reason].metadata for info in sent)


@pytest.mark.parametrize(
    ("reason", "error"),
    [case for case in CASES if case.values[0] not in ("INTERNAL", "ADAPTER_INVALID")],
)
async def test_the_message_is_the_exceptions_own(reason: str, error: Exception, call: Call) -> None:
    assert status_of(error, call).message == str(error) != ""


@pytest.mark.parametrize("error", [*SAMPLES["INTERNAL"], asyncio.CancelledError(SECRET)])
async def test_an_internal_error_tells_its_id_and_never_its_text(
    error: BaseException, call: Call
) -> None:
    error.__cause__ = ValueError(SECRET)
    status = status_of(error, call)
    assert status.message == INTERNAL_MESSAGE
    details = details_of(status)
    assert details["RequestInfo"].request_id == call.request_id
    assert details["ErrorInfo"].metadata["request_id"] == call.request_id
    assert SECRET.encode() not in status.SerializeToString()


async def test_all_violations_are_listed_and_the_first_names_the_field(call: Call) -> None:
    details = details_of(status_of(InvalidRequest(BAD, LONG), call))
    listed = [(v.field, v.description) for v in details["BadRequest"].field_violations]
    assert listed == [(BAD.field, BAD.description), (LONG.field, LONG.description)]
    assert details["ErrorInfo"].metadata["field"] == BAD.field


async def test_a_status_of_another_process_passes_unchanged(call: Call) -> None:
    status = status_pb2.Status(code=code_pb2.ABORTED, message="as the host said it")
    assert status_of(Relayed(status), call) is status


@pytest.mark.parametrize(
    "error", [Overloaded(7), Draining(), ShardUnavailable("shard-0"), ControlPlaneUnavailable()]
)
async def test_what_may_pass_tells_when_to_try_again(error: Exception, call: Call) -> None:
    retry = details_of(status_of(error, call))["RetryInfo"]
    assert retry.retry_delay.ToMilliseconds() == RETRY_DELAY_S * 1000


async def test_a_version_in_quarantine_tells_when_it_is_released(call: Call) -> None:
    details = details_of(status_of(AdapterQuarantined("alpha", 2, 1_800_000_000.5, 90.5), call))
    assert details["RetryInfo"].retry_delay.ToMilliseconds() == 90_500
    assert details["ErrorInfo"].metadata["until"] == "2027-01-15T08:00:00Z"


@pytest.mark.parametrize(
    "error", [Draining(), ShardUnavailable("shard-0"), DefaultDeadlineExceeded(1.0)]
)
async def test_what_cuts_a_stream_tells_the_tokens_that_were_sent(
    error: Exception, call: Call
) -> None:
    info = details_of(status_of(error, call))["ErrorInfo"]
    assert info.metadata["tokens_emitted"] == str(TOKENS_EMITTED)


@pytest.mark.parametrize(
    ("error", "kind", "name"),
    [
        (AdapterNotFound("alpa", []), "adapter", "alpa"),
        (VersionNotFound("alpha", 9, [1]), "adapter version", "alpha@9"),
        (AdapterUnknown("alpa"), "adapter", "alpa"),
        (VersionUnknown("alpha", 9), "adapter version", "alpha@9"),
        (RequestIdReused("nightly"), "request", "nightly"),
        (UploadIdReused("night-1"), "request", "night-1"),
        (UploadUnknown("night-1"), "upload", "night-1"),
        (RequestNotFound("r-1"), "request", "r-1"),
        (ShardUnknown("shard-9", ["shard-0"]), "shard", "shard-9"),
    ],
)
async def test_what_was_not_found_is_named(
    error: Exception, kind: str, name: str, call: Call
) -> None:
    resource = details_of(status_of(error, call))["ResourceInfo"]
    assert (resource.resource_type, resource.resource_name) == (kind, name)


async def test_a_refused_adapter_is_told_by_its_first_finding_and_lists_all(call: Call) -> None:
    status = status_of(AdapterInvalid("alpha", ["no weights", "rank 512", "NaNs"]), call)
    assert status.message == "adapter 'alpha' cannot be served: no weights (and 2 more)"
    listed = [v.description for v in details_of(status)["BadRequest"].field_violations]
    assert listed == ["no weights", "rank 512", "NaNs"]


async def test_a_subclass_of_an_error_answers_as_its_base(call: Call) -> None:
    class Special(PromptTooLong):
        pass

    info = details_of(status_of(Special(LONG), call))["ErrorInfo"]
    assert info.reason == "PROMPT_TOO_LONG"


LARGE: dict[str, pb.GenerateRequest] = {
    "4096 wrong roles": pb.GenerateRequest(
        chat=pb.Chat(messages=[pb.ChatMessage(role="wizard")] * 4096)
    ),
    "long roles": pb.GenerateRequest(
        chat=pb.Chat(messages=[pb.ChatMessage(role="r" * 100_000)] * 20)
    ),
    "long roles of four bytes a character": pb.GenerateRequest(
        chat=pb.Chat(messages=[pb.ChatMessage(role="\U0001f3f4" * 100)] * 4096)
    ),
    "1024 wrong biases": pb.GenerateRequest(
        text="x", sampling=pb.SamplingParams(logit_bias=dict.fromkeys(range(1024), 1e9))
    ),
    "100000 empty stops": pb.GenerateRequest(
        text="x", sampling=pb.SamplingParams(stop=[""] * 100_000)
    ),
    "a long adapter": pb.GenerateRequest(text="x", adapter="a" * 1_000_000),
}


@pytest.mark.parametrize("name", LARGE)
async def test_an_error_is_small_enough_to_arrive_however_much_is_wrong(
    name: str, fake: FakeGateway
) -> None:
    """A client's gRPC turns trailers of over 8 KiB into RESOURCE_EXHAUSTED without details."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await fake.stub.Generate(LARGE[name])
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error_info(caught.value).reason == "INVALID_FIELD"
    assert 1 <= len(bad_fields(caught.value)) <= 16
    assert trailer_bytes(caught.value) < 8192


@pytest.mark.parametrize(
    "error",
    [
        AdapterInvalid("a" * 63, [f"{number}: " + "\U0001f3f4" * 1000 for number in range(64)], 9),
        SourceNotAllowed("/" + "\U0001f3f4" * 511),
        RequestNotFound("\U0001f3f4" * 100_000),
        RequestIdReused("\U0001f3f4" * 32),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_callers_text_in_an_error_leaves_room_for_the_rest(
    error: Exception, call: Call
) -> None:
    status = status_of(error, call)
    encoded = len(base64.b64encode(status.SerializeToString())) + len(quote(status.message))
    assert encoded < 8000


def trailer_bytes(error: grpc.aio.AioRpcError) -> int:
    """Size as a client in another language counts it; two of C++ leave the base64 out."""
    details = dict(error.trailing_metadata() or ())[DETAILS_KEY]
    assert isinstance(details, bytes)
    return len(base64.b64encode(details)) + len(quote(error.details() or ""))
