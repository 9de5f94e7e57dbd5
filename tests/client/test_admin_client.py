"""The client of Admin: what it asks, what it gives back, and what it raises."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from lora_gateway import FailedPrecondition, GatewayClient, NotFound, PermissionDenied
from lora_gateway.v1 import admin_pb2 as pb
from tests.client.fake_adapters import UNAVAILABLE
from tests.client.fake_admin import (
    LAST_OPEN_SHARD,
    LOOPBACK_ONLY,
    SHARD_NOT_FOUND,
    FakeAdmin,
    served_admin,
)


@pytest.fixture
def admin() -> FakeAdmin:
    return FakeAdmin()


@pytest_asyncio.fixture
async def client(admin: FakeAdmin) -> AsyncIterator[GatewayClient]:
    async with served_admin(admin) as target, GatewayClient(target) as client:
        yield client


async def test_each_call_asks_for_what_its_arguments_say(
    client: GatewayClient, admin: FakeAdmin
) -> None:
    assert [shard.shard for shard in await client.admin.list_shards()] == ["shard-0", "shard-1"]
    drained = await client.admin.drain_shard("shard-0", wait=True)
    assert drained.shard.drain.phase == pb.DRAIN_PHASE_DRAINED and len(drained.moved) == 2
    assert not (await client.admin.resume_shard("shard-0")).HasField("drain")
    route = await client.admin.explain_route("sql", version=3, session_id="s")
    assert route.shard == "shard-0"
    await client.admin.explain_route()
    assert await client.admin.list_quarantine() == admin.quarantine
    assert await client.admin.lift_quarantine("fedcba9876543210") is True
    version = pb.VersionName(adapter="sql", version=3)
    assert await client.admin.lift_quarantine(version) is False
    assert admin.asked == [
        pb.ListShardsRequest(),
        pb.DrainShardRequest(shard="shard-0", wait=True),
        pb.ResumeShardRequest(shard="shard-0"),
        pb.ExplainRouteRequest(adapter="sql", version=3, session_id="s"),
        pb.ExplainRouteRequest(),
        pb.ListQuarantineRequest(),
        pb.LiftQuarantineRequest(fingerprint="fedcba9876543210"),
        pb.LiftQuarantineRequest(version=version),
    ]


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (SHARD_NOT_FOUND, NotFound),
        (LAST_OPEN_SHARD, FailedPrecondition),
        (LOOPBACK_ONLY, PermissionDenied),
    ],
)
async def test_refusals_are_typed(
    client: GatewayClient, admin: FakeAdmin, refusal: object, kind: type[Exception]
) -> None:
    admin.refusals.append(refusal)
    with pytest.raises(kind):
        await client.admin.drain_shard("shard-1")


async def test_a_drain_that_was_not_answered_is_asked_again(
    client: GatewayClient, admin: FakeAdmin
) -> None:
    admin.refusals.append(UNAVAILABLE)
    await client.admin.drain_shard("shard-0")
    assert len(admin.asked) == 2
