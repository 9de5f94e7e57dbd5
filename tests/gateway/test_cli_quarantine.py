"""`gateway quarantine` as a process of its own, against a real gRPC server in this one."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from google.protobuf.json_format import ParseDict
from google.protobuf.timestamp_pb2 import Timestamp

from lora_gateway.v1 import admin_pb2 as pb
from tests.client.fake_admin import LOOPBACK_ONLY, FakeAdmin, served_admin
from tests.gateway.adapters_command import Result, ended, started

UNTIL = Timestamp(seconds=1_700_000_000)
FINGERPRINT = "fedcba9876543210"


@pytest.fixture
def admin() -> FakeAdmin:
    admin = FakeAdmin()
    admin.quarantine.requests[0].until_time.CopyFrom(UNTIL)
    held = pb.QuarantinedVersion(tenant="default", adapter="alpha", version=3, until_time=UNTIL)
    admin.quarantine.versions.append(held)
    return admin


@pytest_asyncio.fixture
async def target(admin: FakeAdmin) -> AsyncIterator[str]:
    async with served_admin(admin) as target:
        yield target


async def run(*args: str, target: str) -> Result:
    return await ended(await started(*args, target=target, command=("quarantine",)))


async def test_list_shows_what_is_refused_a_row_each(target: str, admin: FakeAdmin) -> None:
    hostile = pb.QuarantinedVersion(tenant="[red]t", adapter="a\x1b[1m", version=1)
    admin.quarantine.versions.append(hostile)
    result = await run("list", target=target)
    assert (result.code, result.errors) == (0, "")
    header, request, version, strange, suspects = result.output.splitlines()
    assert header.split() == ["subject", "kind", "until"]
    assert request.split() == [FINGERPRINT, "request", "2023-11-14T22:13:20Z"]
    assert version.split() == ["default/alpha@3", "adapter", "version", "2023-11-14T22:13:20Z"]
    assert strange.startswith("[red]t/a\N{REPLACEMENT CHARACTER}[1m@1")
    assert suspects == "3 requests suspected after one crash, and served"


async def test_an_empty_quarantine_is_told_so(target: str, admin: FakeAdmin) -> None:
    admin.quarantine = pb.ListQuarantineResponse()
    result = await run("list", target=target)
    assert (result.code, result.output) == (0, "nothing is in quarantine\n")


@pytest.mark.parametrize(
    ("subject", "asked"),
    [
        (FINGERPRINT, pb.LiftQuarantineRequest(fingerprint=FINGERPRINT)),
        (
            "alpha@3",
            pb.LiftQuarantineRequest(version=pb.VersionName(adapter="alpha", version=3)),
        ),
        (
            "default/alpha@3",
            pb.LiftQuarantineRequest(
                version=pb.VersionName(tenant="default", adapter="alpha", version=3)
            ),
        ),
    ],
    ids=["request", "version", "as listed"],
)
async def test_lift_releases_what_the_list_names(
    subject: str, asked: pb.LiftQuarantineRequest, target: str, admin: FakeAdmin
) -> None:
    result = await run("lift", subject, target=target)
    assert (result.code, result.output, result.errors) == (0, f"{subject} is released\n", "")
    assert admin.asked == [asked]


async def test_what_was_not_there_is_exit_code_1(target: str) -> None:
    result = await run("lift", "alpha@4", target=target)
    assert (result.code, result.output) == (1, "")
    assert result.errors == "error: alpha@4 is not in quarantine\n"


async def test_what_is_no_subject_is_not_sent(target: str, admin: FakeAdmin) -> None:
    result = await run("lift", "alpha@x", target=target)
    assert result.code == 2 and "ADAPTER@VERSION" in result.errors
    assert not admin.asked


async def test_json_has_the_names_of_the_contract(target: str, admin: FakeAdmin) -> None:
    listed = await run("list", "--json", target=target)
    assert ParseDict(json.loads(listed.output), pb.ListQuarantineResponse()) == admin.quarantine
    lifted = await run("lift", FINGERPRINT, "--json", target=target)
    assert (lifted.code, json.loads(lifted.output)) == (0, {"lifted": True})
    missed = await run("lift", "alpha@4", "--json", target=target)
    assert (missed.code, json.loads(missed.output)) == (1, {"lifted": False})


async def test_a_refusal_is_one_line_and_exit_code_1(target: str, admin: FakeAdmin) -> None:
    admin.refusals.append(LOOPBACK_ONLY)
    result = await run("list", target=target)
    assert (result.code, result.output) == (1, "")
    assert result.errors.startswith("error: ")
