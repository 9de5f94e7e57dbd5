"""RPC status to exception, details included."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import grpc
import grpc.aio
import pytest
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import error_details_pb2, status_pb2

from lora_gateway import (
    DeadlineExceeded,
    ErrorReason,
    FailedPrecondition,
    GatewayClient,
    GatewayError,
    Internal,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
    Violation,
)
from tests.client.fake_inference import FakeInference, served

CLIENT = Path(__file__).parents[2] / "clients" / "python"


def status(code: grpc.StatusCode, text: str, *details: message.Message) -> status_pb2.Status:
    packed = [any_pb2.Any() for _ in details]
    for target, detail in zip(packed, details, strict=True):
        target.Pack(detail)
    return status_pb2.Status(code=code.value[0], message=text, details=packed)


def error_info(
    reason: str, domain: str = "lora-gateway", **metadata: str
) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain=domain, metadata=metadata)


async def raised_by(answer: status_pb2.Status) -> GatewayError:
    """What the client raises when a server really answers this."""
    inference = FakeInference()
    inference.failures.append(answer)
    async with served(inference) as target, GatewayClient(target) as client:
        with pytest.raises(GatewayError) as raised:
            await client.generate("hi")
    return raised.value


def error_for(
    code: grpc.StatusCode, details: str = "", trailing: bytes | None = None
) -> GatewayError:
    metadata = grpc.aio.Metadata()
    if trailing is not None:
        metadata.add("grpc-status-details-bin", trailing)
    return GatewayError.from_rpc_error(
        grpc.aio.AioRpcError(code, grpc.aio.Metadata(), metadata, details)
    )


async def test_every_detail_of_a_refused_request_arrives() -> None:
    error = await raised_by(
        status(
            grpc.StatusCode.INVALID_ARGUMENT,
            "sampling.top_p: must be in (0, 1]; sampling.n: must be at least 1",
            error_info("INVALID_FIELD", field="sampling.top_p"),
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field="sampling.top_p", description="must be in (0, 1]"
                    ),
                    error_details_pb2.BadRequest.FieldViolation(
                        field="sampling.n", description="must be at least 1"
                    ),
                ]
            ),
        )
    )

    assert type(error) is InvalidRequest
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.reason == ErrorReason.ERROR_REASON_INVALID_FIELD
    assert error.metadata == {"field": "sampling.top_p"}
    assert error.violations == (
        Violation("sampling.top_p", "must be in (0, 1]"),
        Violation("sampling.n", "must be at least 1"),
    )
    assert error.retry_delay_s is None
    assert error.request_id == ""
    assert str(error) == (
        "INVALID_ARGUMENT INVALID_FIELD: "
        "sampling.top_p: must be in (0, 1]; sampling.n: must be at least 1"
    )


async def test_an_overload_tells_when_to_come_back() -> None:
    error = await raised_by(
        status(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "256 requests are in flight",
            error_info("OVERLOADED", limit="256"),
            error_details_pb2.RetryInfo(
                retry_delay=duration_pb2.Duration(seconds=1, nanos=250_000_000)
            ),
        )
    )
    assert type(error) is Overloaded
    assert error.reason == ErrorReason.ERROR_REASON_OVERLOADED
    assert error.retry_delay_s == 1.25


async def test_an_internal_error_carries_the_request_id() -> None:
    error = await raised_by(
        status(
            grpc.StatusCode.INTERNAL,
            "internal error",
            error_details_pb2.RequestInfo(request_id="r-7"),
            error_info("INTERNAL", request_id="r-7"),
        )
    )
    assert type(error) is Internal
    assert error.request_id == "r-7"


def test_the_request_id_is_found_in_the_metadata_alone_too() -> None:
    answer = status(grpc.StatusCode.INTERNAL, "", error_info("INTERNAL", request_id="r-7"))
    error = error_for(grpc.StatusCode.INTERNAL, "", answer.SerializeToString())
    assert error.request_id == "r-7"


async def test_a_reason_newer_than_the_client_is_tolerated() -> None:
    error = await raised_by(
        status(grpc.StatusCode.NOT_FOUND, "no such moon", error_info("MOON_NOT_FOUND", moon="Io"))
    )
    assert type(error) is NotFound
    assert error.reason is None
    assert error.reason_name == "MOON_NOT_FOUND"
    assert error.metadata == {"moon": "Io"}


async def test_a_reason_of_another_domain_is_not_ours() -> None:
    error = await raised_by(
        status(grpc.StatusCode.NOT_FOUND, "", error_info("ADAPTER_NOT_FOUND", "some-proxy"))
    )
    assert type(error) is NotFound
    assert error.reason is None
    assert error.reason_name == ""


async def test_details_of_an_unknown_type_are_skipped() -> None:
    error = await raised_by(
        status(
            grpc.StatusCode.NOT_FOUND,
            "",
            error_details_pb2.ResourceInfo(resource_type="adapter", resource_name="suport"),
            error_info("ADAPTER_NOT_FOUND", adapter="suport"),
        )
    )
    assert error.reason == ErrorReason.ERROR_REASON_ADAPTER_NOT_FOUND


def test_details_that_cannot_be_read_do_not_hide_the_error() -> None:
    error = error_for(grpc.StatusCode.NOT_FOUND, "gone", b"\xff\xff\xff")
    assert type(error) is NotFound
    assert error.message == "gone"
    assert error.reason is None


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequest),
        (grpc.StatusCode.NOT_FOUND, NotFound),
        (grpc.StatusCode.FAILED_PRECONDITION, FailedPrecondition),
        (grpc.StatusCode.UNAVAILABLE, Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded),
        (grpc.StatusCode.INTERNAL, Internal),
        (grpc.StatusCode.UNKNOWN, Internal),
        (grpc.StatusCode.DATA_LOSS, Internal),
        (grpc.StatusCode.UNIMPLEMENTED, GatewayError),
        (grpc.StatusCode.CANCELLED, GatewayError),
    ],
)
def test_the_code_decides_the_class(code: grpc.StatusCode, kind: type[GatewayError]) -> None:
    error = error_for(code, "text")
    assert type(error) is kind
    assert error.code is code


def test_a_message_over_the_size_limit_is_no_overload() -> None:
    error = error_for(grpc.StatusCode.RESOURCE_EXHAUSTED, "CLIENT: Sent message larger than max")
    assert type(error) is GatewayError


def test_every_reason_of_the_contract_is_recognized() -> None:
    for name, number in ErrorReason.items():
        error = GatewayError("", reason_name=name.removeprefix("ERROR_REASON_"))
        assert error.reason == number


def test_an_error_survives_the_way_to_another_process() -> None:
    error = Overloaded("busy", code=grpc.StatusCode.RESOURCE_EXHAUSTED, retry_delay_s=1.5)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is Overloaded
    assert vars(copy) == vars(error)


@pytest.mark.parametrize("first", ["lora_gateway", "google.rpc.error_details_pb2"])
def test_the_decoder_lives_beside_googleapis_common_protos(first: str) -> None:
    # In the default descriptor pool the second one to come would raise.
    program = f"import {first}, google.rpc.status_pb2, google.rpc.error_details_pb2, lora_gateway"
    subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        check=True,
        env={"PYTHONPATH": str(CLIENT)},
    )
