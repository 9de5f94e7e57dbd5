"""The real control plane over fake shards, with a worker before it: all but model and checks.

    client -> edge and relay -> Unix socket -> Adapters -> catalog -> registry (SQLite)

Registry, artifacts, uploads, ledger, residency and probe are the real ones. An adapter here is a
pair of small files; what its config says under `findings` is what a check of it finds.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import pytest

import engine.intake
import engine.processors
from engine.adapter_loader import LoadTimes
from engine.adapters import AdapterFacts
from engine.base_model import BaseModules, ModelFingerprints
from engine.core_death import CoreDeath
from engine.errors import AdapterInvalid, GenerationFailed
from engine.fake import FakeShard, Script
from engine.generation import (
    GenerationRequest,
    Load,
    Output,
    PositionLogprobs,
    ServedVersion,
    TokenLogprob,
    VersionKey,
)
from engine.rendering import RenderedPrompt
from gateway.control import ControlPlane
from gateway.keeper import Death
from gateway.keeper_state import KeeperState
from gateway.settings import Settings
from gateway.worker_process import WorkerProcess
from gateway.workers import WorkerFleet
from lora_gateway.v1 import adapters_pb2 as pb
from lora_gateway.v1.adapters_pb2_grpc import AdaptersStub
from store.artifacts import CONFIG_FILE, WEIGHTS_FILE
from store.sqlite_jobs import SqliteJobs
from store.sqlite_registry import SqliteRegistry
from tests.gateway.conftest import FakeGateway, start_fake_gateway

TENANT = "default"
SERVED = ModelFingerprints("c" * 64, "w" * 64, "t" * 64, "")
WEIGHTS = bytes(range(256)) * 64
"""Of an adapter: 16 KiB."""
KILLED = CoreDeath("killed by SIGKILL")
TIMEOUT_S = 10.0

Stub: TypeAlias = Any
"""The client's stub; the generated types of its calls are private."""


class LoadableShard(FakeShard):
    """A fake shard that loads adapters, and scores tokens differently with each."""

    def __init__(self, name: str = "shard-0") -> None:
        super().__init__(name)
        self.loaded: list[VersionKey] = []
        """What is loaded now, in order."""
        self.refuses: dict[VersionKey, Exception] = {}
        """What loads of these raise."""
        self.ignores: set[str] = set()
        """Adapters whose answers are the base model's."""
        self.may_load = asyncio.Event()
        """Loads wait for it."""
        self.may_load.set()
        self.loading = asyncio.Event()
        """Set once a load began."""
        self.load_now = Load(0, 0, 0, 0.0)
        """Requests that run and wait in the engine."""

    async def load(self, version: ServedVersion) -> LoadTimes:
        self.loading.set()
        await self.may_load.wait()
        if (error := self.refuses.get(version.key)) is not None:
            raise error
        if not (Path(version.path) / WEIGHTS_FILE).is_file():
            raise GenerationFailed("the files are gone")
        self.loaded.append(version.key)
        return {}

    async def unload(self, version: ServedVersion) -> None:
        if version.key in self.loaded:
            self.loaded.remove(version.key)

    async def requests_of(self, lora_int_id: int) -> int:
        return 0

    async def core_load(self) -> Load:
        return self.load_now

    async def generate(
        self, request: GenerationRequest, prompt: RenderedPrompt, version: ServedVersion | None
    ) -> AsyncGenerator[Output, None]:
        assert version is None or version.key in self.loaded, "it runs on what is not loaded"
        logprob = -1.0
        if version is not None and version.adapter not in self.ignores:
            logprob -= version.version
        async with contextlib.aclosing(super().generate(request, prompt, version)) as outputs:
            async for output in outputs:
                if "prompt_logprobs" in request.sampling:
                    output.prompt_logprobs = [
                        PositionLogprobs(TokenLogprob(token_id, logprob, 1, ""), ())
                        for token_id in prompt.token_ids
                    ]
                yield output


class ScriptedKeeper:
    """Tells of a shard what a test says, and has nothing to keep."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = KeeperState.UP
        self.since_s = 1.5
        self.last_death: Death | None = None
        self.restarts = 0
        self.next_start_s: float | None = None
        self.slots_left = 61
        self.renewed = 0
        """How often it was asked to replace its core."""

    async def renew(self) -> None:
        self.renewed += 1
        self.slots_left = 61


@dataclass
class Plane:
    """A control plane that runs, and what a test wants to look at."""

    control: ControlPlane
    registry: SqliteRegistry
    shard: LoadableShard
    """The first one."""
    shards: dict[str, LoadableShard]
    keepers: dict[str, ScriptedKeeper]
    gateway: FakeGateway
    stub: Stub
    sources: Path
    """The folder below which a source_uri may name."""

    def write_source(self, name: str, **config: Any) -> str:
        """The URI of an adapter of its own."""
        folder = self.sources / name
        folder.mkdir()
        (folder / CONFIG_FILE).write_bytes(config_of(name, **config))
        (folder / WEIGHTS_FILE).write_bytes(WEIGHTS)
        return str(folder)

    async def ready(self, adapter: str = "sql", **fields: Any) -> pb.AdapterVersion:
        """A new version that is READY."""
        known = await self.registry.adapters(TENANT, limit=1000)
        latest = {record.adapter: record.latest_version for record in known}
        uri = self.write_source(f"{adapter}-{latest.get(adapter, 0) + 1}")
        request = pb.CreateAdapterVersionRequest(
            adapter=adapter, source_uri=uri, wait=True, **fields
        )
        answer = await self.stub.CreateAdapterVersion(request, timeout=TIMEOUT_S)
        version: pb.AdapterVersion = answer.adapter_version
        assert version.state == pb.VERSION_STATE_READY
        return version

    async def until(
        self, adapter: str, version: int, state: pb.VersionState.ValueType
    ) -> pb.AdapterVersion:
        """The version once it exists and is in that state."""
        request = pb.GetAdapterVersionRequest(adapter=adapter, version=version)
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    told: pb.AdapterVersion
                    told = (await self.stub.GetAdapterVersion(request)).adapter_version
                    if told.state == state:
                        return told
                await asyncio.sleep(0.01)


def create(uri: str, **fields: Any) -> pb.CreateAdapterVersionRequest:
    """A request for the next version of `sql`, but for `fields`."""
    return pb.CreateAdapterVersionRequest(**{"adapter": "sql", "source_uri": uri, **fields})


def named(request_type: Any, adapter: str = "sql", version: int = 1) -> Any:
    """A request about one version."""
    return request_type(adapter=adapter, version=version)


def config_of(name: str, **config: Any) -> bytes:
    """Content of an `adapter_config.json`, another one for each name."""
    return json.dumps({"name": name, **config}).encode()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def check_by_config(folder: Path, *, adapter: str, **rules: Any) -> AdapterFacts:
    """Stands in for `check_adapter`, which needs torch and vLLM."""
    config = json.loads((folder / CONFIG_FILE).read_bytes())
    if findings := config.get("findings"):
        raise AdapterInvalid(adapter, findings)
    return AdapterFacts(8, ("q_proj", "v_proj"), 2, 4, 1024, "bfloat16")


@contextlib.asynccontextmanager
async def control_plane(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    fleet: WorkerFleet | None = None,
    shard: LoadableShard | None = None,
    model: Path = Path("no-model"),
    modules: BaseModules | None = None,
    shards: int = 1,
    **settings: Any,
) -> AsyncIterator[Plane]:
    """A control plane with its state in `folder`. Opened there again, it goes on.

    Only what reads datasets needs the folder of a `model`, and only jobs its `modules`.
    """
    monkeypatch.setattr(engine.intake, "check_adapter", check_by_config)
    sources, state = folder / "sources", folder / "state"
    for path in (sources, state):
        path.mkdir(exist_ok=True)
    monkeypatch.setattr(engine.processors, "shares", lambda shards: [(0,)] * shards)
    options = Settings(adapter_source_allow=[str(sources)], shards=shards, **settings)
    shard = shard or LoadableShard()
    all_shards = [shard, *map(LoadableShard, options.shard_names[1:])]
    engine_side: Any = all_shards  # for the types VllmShards, of which they have all that is used
    database = state / "registry.sqlite"
    async with SqliteRegistry(database) as registry, SqliteJobs(database) as jobs:
        control = ControlPlane(
            options,
            state,
            folder / "c.sock",
            registry,
            jobs,
            fleet or fleet_without_workers(),
            os.environ,
        )
        await control.open()
        control.check_for(model, modules or BaseModules({}), SERVED, "bfloat16")
        kept: Any = [ScriptedKeeper(shard.name) for shard in all_shards]
        control.serve_on(engine_side, kept)
        running = asyncio.create_task(control.run())
        await control.serve()
        gateway = await start_fake_gateway(Script(), host=control.address)
        try:
            stub: Stub = AdaptersStub(gateway.channel)
            by_name = {shard.name: shard for shard in all_shards}
            keepers = {keeper.name: keeper for keeper in kept}
            yield Plane(control, registry, shard, by_name, keepers, gateway, stub, sources)
        finally:
            await gateway.close()
            await control.close()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


def fleet_without_workers() -> WorkerFleet:
    """Nobody but the host is told and asked."""

    async def nothing(worker: WorkerProcess) -> None:
        return None

    def no_orders() -> Any:
        raise AssertionError("no worker is started")

    return WorkerFleet(0, no_orders, nothing, lambda message: None)
