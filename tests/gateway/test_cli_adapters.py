"""`gateway adapters` as a process of its own, against a real gRPC server in this one."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from gateway.cli_traffic import ScorerName
from lora_gateway import Scorer
from lora_gateway.v1 import adapters_pb2 as pb
from tests.client.fake_adapters import UNAVAILABLE, FakeAdapters, refusal, served
from tests.gateway.adapters_command import ROOT, SOON_S, Result, answered, ended, run, started


@pytest.fixture
def adapters() -> FakeAdapters:
    return FakeAdapters()


@pytest.fixture
async def target(adapters: FakeAdapters) -> AsyncIterator[str]:
    async with served(adapters) as target:
        yield target


def rows(table: str) -> dict[str, str]:
    """Name to value, of a table of fields."""
    return {
        name: value.strip()
        for name, _, value in (line.strip().partition(" ") for line in table.splitlines())
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_bytes(b"{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    return tmp_path


# --- taking in


async def test_create_waits_and_shows_the_version(target: str, adapters: FakeAdapters) -> None:
    output = await answered(
        *("create", "pirate", "/adapters/pirate", "--sha256", "a" * 64, "--request-id", "mine"),
        *("--label", "team=search", "--label", "note=a=b", "--no-traffic"),
        target=target,
    )
    shown = rows(output)
    assert shown["version"] == "pirate@1"
    assert shown["state"] == "READY"
    assert shown["size"] == "3.0 MiB"
    assert adapters.requests == [
        pb.CreateAdapterVersionRequest(
            request_id="mine",
            adapter="pirate",
            source_uri="/adapters/pirate",
            expected_sha256="a" * 64,
            labels={"team": "search", "note": "a=b"},
            wait=True,
            no_traffic=True,
        )
    ]


async def test_create_makes_a_path_absolute_and_leaves_a_url(
    target: str, adapters: FakeAdapters
) -> None:
    await answered("create", "pirate", "some/folder", "--no-wait", target=target)
    await answered("create", "pirate", "s3://bucket/pirate", "--json", target=target)
    sources = [getattr(request, "source_uri", "") for request in adapters.requests]
    assert sources == [str(ROOT / "some" / "folder"), "s3://bucket/pirate"]
    assert [getattr(request, "wait", None) for request in adapters.requests] == [False, True]


async def test_validate_shows_facts_or_findings_and_says_so_by_its_code(target: str) -> None:
    good = await run("validate", "/pirate", target=target)
    assert (good.code, rows(good.output)["rank"]) == (0, "8")

    bad = await run("validate", "/broken", target=target)
    assert bad == Result(1, "rank 512 is above 64; train with less\n", "")

    document = await run("validate", "/broken", "--json", target=target)
    assert document.code == 1
    assert json.loads(document.output)["valid"] is False


async def test_upload_sends_the_folder(target: str, adapters: FakeAdapters, folder: Path) -> None:
    output = await answered("upload", "pirate", str(folder), "--json", target=target)
    version = json.loads(output)
    assert (version["adapter"], version["version"]) == ("pirate", 1)
    header = adapters.requests[-1]
    assert isinstance(header, pb.UploadHeader)
    assert header.wait


async def test_upload_of_no_adapter_is_one_line(target: str, folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    result = await run("upload", "pirate", str(folder), target=target)
    assert (result.code, result.output) == (1, "")
    assert result.errors.startswith("error: ")
    assert "save_pretrained" in result.errors


async def test_a_progress_bar_is_for_terminals_and_goes_to_standard_error(
    target: str, folder: Path
) -> None:
    ours, theirs = pty.openpty()
    process = await started("upload", "pirate", str(folder), target=target, stderr=theirs)
    os.close(theirs)
    result = await ended(process)
    shown = os.read(ours, 65536).decode()
    os.close(ours)

    assert result.code == 0
    assert rows(result.output)["version"] == "pirate@1"
    assert "uploading pirate" in shown


# --- looking


async def test_list_show_and_versions_are_tables_or_json(
    target: str, adapters: FakeAdapters
) -> None:
    for name in ("pirate", "pirate", "support"):
        await adapters.add(name)
    adapters.versions["pirate", 2].source_uri = "/x\x1b[31m"

    header, *lines = (await answered("list", target=target)).splitlines()
    assert header.split()[:3] == ["adapter", "traffic", "latest"]
    assert [line.split()[:3] for line in lines] == [["pirate", "1=1", "2"], ["support", "1=1", "1"]]
    document = json.loads(await answered("list", "--prefix", "s", "--json", target=target))
    assert [adapter["adapter"] for adapter in document["adapters"]] == ["support"]

    assert rows(await answered("show", "pirate", target=target))["traffic"] == "1=1"
    assert json.loads(await answered("show", "pirate", "--json", target=target))["etag"] == "t1"
    shown = await answered("show", "pirate", "--version", "2", target=target)
    assert rows(shown)["source"] == "/x\N{REPLACEMENT CHARACTER}[31m"

    _, *lines = (await answered("versions", "pirate", target=target)).splitlines()
    assert [line.split()[:2] for line in lines] == [["2", "READY"], ["1", "READY"]]


async def test_load_unload_and_delete_show_what_became_of_the_version(
    target: str, adapters: FakeAdapters
) -> None:
    for _ in range(2):
        await adapters.add("pirate")
    loaded = rows(await answered("load", "pirate", "2", target=target))
    assert loaded["resident"] == "shard-0 (12 ms)"
    unloaded = rows(await answered("unload", "pirate", "2", target=target))
    assert unloaded["resident"] == "nowhere"
    deleted = json.loads(await answered("delete", "pirate", "2", "--json", target=target))
    assert deleted["state"] == "VERSION_STATE_DELETED"


# --- traffic


async def test_traffic_is_set_and_shown(target: str, adapters: FakeAdapters) -> None:
    for _ in range(2):
        await adapters.add("pirate")
    output = await answered(
        *("traffic", "pirate", "1=90", "2=10", "--etag", "t1"),
        *("--guard-version", "2", "--max-error-ratio", "0", "--max-ttft-p95-ms", "300"),
        *("--max-total-p95-ms", "900", "--min-requests", "5"),
        target=target,
    )
    assert rows(output)["traffic"] == "1=90 2=10"
    assert adapters.requests == [
        pb.SetTrafficRequest(
            adapter="pirate",
            splits=[pb.TrafficSplit(version=1, weight=90), pb.TrafficSplit(version=2, weight=10)],
            etag="t1",
            guard=pb.TrafficGuard(
                version=2,
                max_error_ratio=0,
                max_ttft_p95_ms=300,
                max_total_p95_ms=900,
                min_requests=5,
            ),
        )
    ]
    shown = rows(await answered("traffic", "pirate", target=target))
    assert shown["guard"].startswith("version 2, max_error_ratio 0, max_ttft_p95_ms 300")

    promoted = rows(await answered("promote", "pirate", "2", "--etag", "t2", target=target))
    assert promoted["traffic"] == "2=1"
    assert rows(await answered("rollback", "pirate", target=target))["traffic"] == "1=90 2=10"
    nobody = rows(await answered("traffic", "pirate", "--none", target=target))
    assert nobody["traffic"] == "none"


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        (["1:90"], "VERSION=WEIGHT"),
        (["1=90", "1=10"], "named twice"),
        (["1=90", "--max-error-ratio", "0"], "--guard-version says"),
        (["--etag", "t1"], "say which versions"),
        (["1=90", "--none"], "without weights"),
    ],
)
async def test_traffic_that_makes_no_sense_is_refused_unsent(
    target: str, adapters: FakeAdapters, arguments: list[str], cure: str
) -> None:
    result = await run("traffic", "pirate", *arguments, target=target)
    assert result.code == 2
    assert cure in result.errors
    assert not adapters.requests


# --- errors


async def test_a_refusal_lists_what_to_fix(target: str, adapters: FakeAdapters) -> None:
    adapters.failures.append(
        refusal(grpc.StatusCode.PERMISSION_DENIED, "SOURCE_NOT_ALLOWED", "upload it")
    )
    result = await run("create", "pirate", "/pirate", target=target)
    assert result == Result(1, "", "error: PERMISSION_DENIED SOURCE_NOT_ALLOWED: upload it\n")


async def test_nobody_listening_gives_the_cure() -> None:
    # Port 1 of the loopback: nothing listens there.
    result = await run("list", target="127.0.0.1:1")
    assert result.code == 1
    assert "is the gateway running at 127.0.0.1:1?" in result.errors


async def test_a_label_without_value_is_refused(target: str) -> None:
    result = await run("create", "pirate", "/pirate", "--label", "team", target=target)
    assert result.code == 2
    assert "KEY=VALUE" in result.errors


# --- watch


async def test_watch_prints_a_line_for_each_change_until_ctrl_c(
    target: str, adapters: FakeAdapters
) -> None:
    await adapters.add("pirate")
    await adapters.add("support")
    adapters.events[0].time.FromJsonString("2026-01-02T03:04:05Z")
    adapters.events[0].reason = "on two\nlines"
    adapters.watch_cuts.append((1, UNAVAILABLE))
    process = await started("watch", "--after", "0", target=target)
    assert process.stdout is not None

    async def line() -> str:
        assert process.stdout is not None
        return (await asyncio.wait_for(process.stdout.readline(), SOON_S)).decode()

    first = "1 2026-01-02T03:04:05Z pirate@1 version_ready by gateway (on two lines)\n"
    assert await line() == first
    assert (await line()).startswith("2 ")
    await adapters.add("pirate")
    assert "pirate@2" in await line()
    process.send_signal(signal.SIGINT)
    assert await ended(process) == Result(0, "", "")


async def test_watch_prints_json_a_line(target: str, adapters: FakeAdapters) -> None:
    for name in ("pirate", "support"):
        await adapters.add(name)
    arguments = ("watch", "--after", "0", "--adapter", "support", "--json")
    process = await started(*arguments, target=target)
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), SOON_S)
    event = json.loads(line)
    assert (event["adapter"], event["sequence"]) == ("support", "2")
    process.send_signal(signal.SIGINT)
    assert (await ended(process)).code == 0


def test_each_scorer_of_the_contract_can_be_named() -> None:
    named = {name.message for name in ScorerName}
    assert named == set(Scorer.values()) - {Scorer.SCORER_UNSPECIFIED}
