"""A catalog with everything under it on one folder, and no engine: what one host would own.

The registry, the files and the checks are real, and so is the residency. The core is the one of
`tests/engine/crowd.py`, and the probe says what the test tells it to.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import torch

from engine.base_model import ModelFingerprints
from engine.catalog import AdapterCatalog
from engine.fake import FakeShard
from engine.generation import ServedVersion, VersionKey
from engine.intake import Intake
from engine.ledger import Ledger
from engine.pool import ServedAdapter, ShardPool
from engine.probe import Probe
from engine.residency import Residency
from engine.shard import Shard
from store.artifacts import CONFIG_FILE, WEIGHTS_FILE, ArtifactStore
from store.records import NewVersion, VersionRecord, VersionState
from store.sources import AllowedSources
from store.sqlite_registry import SqliteRegistry
from store.uploads import UploadPlan, UploadStore
from tests.engine.crowd import SHARD, Core, Crowd
from tests.engine.drafts import MAX_LORA_RANK, Q_PROJ, Draft, Spoil, a, base_shapes

TENANT = "acme"
ME = "somebody"
PRINTS = ModelFingerprints("c" * 64, "d" * 64, "e" * 64, "f" * 64)
OWN_SCHEME = "train:"
PLACES = 2
SOON_S = 30.0


class ScriptedProbe(Probe):
    """Finds what it is told to, when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.probed: list[ServedVersion] = []
        self.says: dict[VersionKey, list[str] | Exception] = {}
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def findings(self, version: ServedVersion, shard: Shard) -> list[str]:
        self.probed.append(version)
        await self.may_answer.wait()
        said = self.says.get(version.key, [])
        if isinstance(said, Exception):
            raise said
        return said


class ScriptedTrial:
    """Finds what it is told to in versions that we made ourselves; a `Trial`."""

    def __init__(self) -> None:
        self.tried: list[tuple[VersionRecord, ServedVersion, str]] = []
        self.says: dict[VersionKey, list[str] | Exception] = {}

    async def findings(
        self, record: VersionRecord, version: ServedVersion, shard: Shard
    ) -> Sequence[str]:
        self.tried.append((record, version, shard.name))
        said = self.says.get(version.key, [])
        if isinstance(said, Exception):
            raise said
        return said


class Library(Crowd):
    """One start of the host on a state folder; also the audience of its ledger."""

    def __init__(self, root: Path, registry: SqliteRegistry) -> None:
        self.root = root
        self.registry = registry
        self.core = Core(PLACES)
        super().__init__(self.core)
        self.sources = root / "sources"
        self.sources.mkdir(parents=True, exist_ok=True)
        self.store = ArtifactStore(root / "state")
        self.uploads = UploadStore(root / "state")
        self.ledger = Ledger(registry, self)
        self.probe = ScriptedProbe()
        self.trial = ScriptedTrial()
        self.own_folder: Callable[[str], Path] = self.sources.joinpath
        """Where what we made ourselves lies."""
        self.intake = make_intake(
            self.store, self.uploads, self.sources, {OWN_SCHEME: lambda rest: self.own_folder(rest)}
        )
        self.catalog = AdapterCatalog(self.ledger, registry, self.store, self.uploads, self.intake)
        residency = Residency(self.core, PLACES, self.catalog, self)
        self.serve(residency)
        self.residents = self.processes[0].residents
        self.pool = ShardPool([FakeShard()], {SHARD: self.residents}, self.ledger.view)
        self.catalog.serve_on({SHARD: residency}, self.pool, self.probe, {OWN_SCHEME: self.trial})
        self.runs = asyncio.create_task(residency.run())

    def show(self, tenant: str, adapter: str, served: ServedAdapter) -> Awaitable[None]:
        """Everybody follows at once."""
        return asyncio.sleep(0)

    def source(self, name: str, spoil: Spoil = lambda draft: None) -> str:
        """An adapter that lies where callers may name it. Equal names have other bytes than
        others; the same name twice is the same folder."""
        folder = self.sources / name
        if not folder.exists():
            folder.mkdir()
            draft = Draft()
            # The name decides the bytes, so that no two sources are equal by accident.
            number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:2], "big")
            draft.tensors[a(Q_PROJ)] += torch.tensor(1e-3 * (1 + number))
            spoil(draft)
            draft.write(folder)
        return str(folder)

    def own(self, name: str, spoil: Spoil = lambda draft: None) -> str:
        """The same as one that we made ourselves; returns the URI of its version."""
        self.source(name, spoil)
        return OWN_SCHEME + name

    def upload(self, upload_id: str) -> str:
        """The same as an upload that is complete; returns the URI of its version."""
        folder = Path(self.source(upload_id))
        weights = (folder / WEIGHTS_FILE).read_bytes()
        plan = UploadPlan(
            upload_id,
            "sql",
            (folder / CONFIG_FILE).read_bytes(),
            len(weights),
            hashlib.sha256(weights).hexdigest(),
        )
        with self.uploads.open(TENANT, plan) as upload:
            upload.write(0, weights)
            upload.finish()
        return f"upload:{upload_id}"

    async def create(self, source_uri: str, request_id: str = "") -> VersionRecord:
        """Ask for a version of `sql`."""
        new = NewVersion(TENANT, "sql", source_uri)
        return await self.catalog.create(new, request_id=request_id, actor=ME)

    async def make_ready(self, source_uri: str) -> VersionRecord:
        """A READY version of `sql`."""
        return await self.catalog.settled(await self.create(source_uri))

    async def state(self, version: int) -> VersionState:
        """Of a version of `sql`."""
        return (await self.registry.version(*key(version))).state

    async def until(self, version: int, state: VersionState) -> VersionRecord:
        """Wait until a version of `sql` is in that state; the timeout ends what never is."""
        while (record := await self.registry.version(*key(version))).state is not state:
            await asyncio.sleep(0.001)
        return record

    async def delete(self, version: int) -> VersionRecord:
        """Delete a version of `sql`."""
        return await self.catalog.delete(key(version), actor=ME)

    async def take_traffic_away(self) -> None:
        """No version of `sql` answers unasked."""
        await self.ledger.set_traffic(TENANT, "sql", [], guard=None, etag="", actor=ME)

    @property
    def digests(self) -> set[str]:
        """What is in the store."""
        return {folder.name for folder in (self.root / "state" / "adapters").iterdir()}

    @property
    def staged(self) -> list[Path]:
        """Copies that were not kept or dropped yet."""
        return list((self.root / "state" / "staging").iterdir())


def key(version: int) -> VersionKey:
    """A version of `sql`."""
    return VersionKey(TENANT, "sql", version)


def make_intake(
    store: ArtifactStore,
    uploads: UploadStore,
    allowed: Path,
    folders: Mapping[str, Callable[[str], Path]] = {},
    served: ModelFingerprints = PRINTS,
) -> Intake:
    """For the tiny Llama, and sources below one folder."""
    return Intake(
        store,
        uploads,
        AllowedSources([str(allowed)]),
        base_shapes(),
        served,
        max_lora_rank=MAX_LORA_RANK,
        dtype="bfloat16",
        folders=folders,
    )


@asynccontextmanager
async def library(root: Path) -> AsyncIterator[Library]:
    """From the start of a host to its orderly end."""
    async with SqliteRegistry(root / "registry.sqlite") as registry:
        at = Library(root, registry)
        await at.ledger.open()
        try:
            async with asyncio.timeout(SOON_S):
                yield at
        finally:
            at.runs.cancel()
            with suppress(asyncio.CancelledError):
                await at.runs
            await at.catalog.close()
            await at.ledger.close()
            await at.residents.close()


async def happens(condition: Callable[[], object]) -> None:
    """Wait until it does; the library's timeout ends what does not."""
    while not condition():
        await asyncio.sleep(0.001)
