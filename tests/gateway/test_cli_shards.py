"""`gateway shards` as a process of its own, against a real gRPC server in this one."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.json_format import ParseDict

from lora_gateway.v1 import admin_pb2 as pb
from tests.client.fake_admin import LAST_OPEN_SHARD, FakeAdmin, served_admin
from tests.gateway.adapters_command import Result, ended, started


@pytest.fixture
def admin() -> FakeAdmin:
    return FakeAdmin()


@pytest_asyncio.fixture
async def target(admin: FakeAdmin) -> AsyncIterator[str]:
    async with served_admin(admin) as target:
        yield target


async def run(*args: str, target: str) -> Result:
    return await ended(await started(*args, target=target, command=("shards",)))


async def answered(*args: str, target: str) -> list[str]:
    """The lines of a command that succeeds in silence."""
    result = await run(*args, target=target)
    assert (result.code, result.errors) == (0, "")
    return result.output.splitlines()


async def test_list_shows_a_shard_a_row(target: str, admin: FakeAdmin) -> None:
    admin.shards["shard-0"].drain.by_renewal = True
    admin.shards["shard-0"].drain.phase = pb.DRAIN_PHASE_MOVING
    admin.shards["shard-0"].drain.versions_to_move = 3
    header, up, dead = await answered("list", target=target)
    assert header.split()[:3] == ["shard", "state", "since"]
    assert "UP, draining to be renewed: 0 of 3 moved" in up
    assert up.split()[-10:] == ["5", "3", "2", "25%", "1", "of", "64", "61", "0", "none"]
    assert "DEAD, next try 1970-01-01T00:01:00Z" in dead
    assert dead.endswith("2         killed by SIGKILL, 2023-11-14T22:13:20Z")
    assert dead.count("?") == 3, "its engine tells nothing"


async def test_list_shows_a_shard_that_is_lent_or_about_to_be(
    target: str, admin: FakeAdmin
) -> None:
    for name, state in (("shard-0", pb.SHARD_STATE_UP), ("shard-1", pb.SHARD_STATE_LENT)):
        admin.shards[name].state = state
        admin.shards[name].drain.by_lending = True
        admin.shards[name].drain.phase = pb.DRAIN_PHASE_DRAINED
        admin.shards[name].ClearField("next_start_time")
    _, first, second = await answered("list", target=target)
    assert "UP, drained to be lent" in first
    assert second.split()[:2] == ["shard-1", "LENT"] and "drained" not in second


async def test_drain_shows_what_was_moved_and_the_shard(target: str, admin: FakeAdmin) -> None:
    lines = await answered("drain", "shard-0", "--wait", target=target)
    assert admin.asked == [pb.DrainShardRequest(shard="shard-0", wait=True)]
    assert lines[0].split() == ["moved", "to", "took", "error"]
    assert lines[1].split() == ["sql@3", "shard-0", "12", "ms", "none"]
    assert lines[2].startswith("[red]faq@1") and "\N{REPLACEMENT CHARACTER}[1m disk" in lines[2]
    assert ["state", "UP, drained"] in [line.split(maxsplit=1) for line in lines]


async def test_a_drain_of_nothing_shows_the_shard_alone(target: str, admin: FakeAdmin) -> None:
    admin.moved = []
    lines = await answered("drain", "shard-0", target=target)
    assert admin.asked == [pb.DrainShardRequest(shard="shard-0")]
    assert lines[0].split() == ["shard", "shard-0"]


async def test_resume_shows_the_shard(target: str, admin: FakeAdmin) -> None:
    lines = await answered("resume", "shard-0", target=target)
    assert ["state", "UP"] in [line.split() for line in lines]


async def test_explain_shows_version_shards_and_workers(target: str, admin: FakeAdmin) -> None:
    lines = await answered("explain", "sql", "--session", "s", "--version", "3", target=target)
    assert admin.asked == [pb.ExplainRouteRequest(adapter="sql", version=3, session_id="s")]
    rows = [line.split() for line in lines]
    assert ["why", "split"] in rows and ["splits", "2:", "90,", "3:", "10"] in rows
    assert ["shard-1", "DEAD,", "drained", "no", "0", "taken", "0"] in rows
    assert ["shard-0", "UP", "yes", "4", "free", "7"] in rows
    assert rows[-1] == ["4711", "3", "shard-0", "failover", "shard-0:", "2", "4", "1", "9"]


async def test_explain_of_the_base_model_names_no_adapter(target: str, admin: FakeAdmin) -> None:
    admin.route = pb.ExplainRouteResponse(version_reason=pb.VERSION_REASON_BASE_MODEL)
    lines = await answered("explain", target=target)
    assert admin.asked == [pb.ExplainRouteRequest()]
    assert "the base model" in lines[0] and "the workers differ" in "".join(lines)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("list",), pb.ListShardsResponse),
        (("drain", "shard-0"), pb.DrainShardResponse),
        (("resume", "shard-0"), pb.Shard),
        (("explain", "sql"), pb.ExplainRouteResponse),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
async def test_json_has_the_names_of_the_contract(
    target: str, args: tuple[str, ...], message: type[Any]
) -> None:
    told = json.loads("\n".join(await answered(*args, "--json", target=target)))
    assert told and ParseDict(told, message()) != message()
    assert "shards" in told or "shard" in told


async def test_a_refusal_is_one_line_and_exit_code_1(target: str, admin: FakeAdmin) -> None:
    admin.refusals.append(LAST_OPEN_SHARD)
    result = await run("drain", "shard-1", target=target)
    assert (result.code, result.output) == (1, "")
    assert result.errors.startswith("error: ") and "no shard but this" in result.errors
