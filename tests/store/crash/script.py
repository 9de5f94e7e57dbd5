"""What a host does while it is crashed: each method that writes, adapter files, and restarts.

Each operation is acknowledged when it returned, and is one transaction at most, so a crash may
take the one that runs and nothing else. There are several short scripts, because each crash
runs one from its beginning.
"""

from __future__ import annotations

import contextlib
import enum
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path

from store.artifacts import ArtifactStore
from store.records import Arm, Content, Guard, NewVersion
from tests.store.crash.host import ONE, TWO, Host, Operation
from tests.store.crash.job_script import JOBS

REQUESTS = (("acme", "first"), ("acme", "refused"), ("acme", "second"), ("zeta", "first"))
"""Tenants and request ids that the scripts use."""

_SCHEMA_1 = """
CREATE TABLE lora_int_id (last INTEGER NOT NULL) STRICT;
CREATE TABLE adapter (
    tenant TEXT NOT NULL, adapter TEXT NOT NULL, last_version INTEGER NOT NULL,
    PRIMARY KEY (tenant, adapter)
) STRICT, WITHOUT ROWID;
CREATE TABLE adapter_version (
    tenant TEXT NOT NULL, adapter TEXT NOT NULL, version INTEGER NOT NULL,
    digest TEXT NOT NULL, lora_int_id INTEGER NOT NULL UNIQUE, create_time_ns INTEGER NOT NULL,
    PRIMARY KEY (tenant, adapter, version),
    UNIQUE (tenant, adapter, digest),
    FOREIGN KEY (tenant, adapter) REFERENCES adapter
) STRICT, WITHOUT ROWID;
PRAGMA user_version = 1;
INSERT INTO lora_int_id VALUES (7);
INSERT INTO adapter VALUES ('acme', 'pirate', 2);
"""


class Script(enum.Enum):
    """What is run. The values name it to the child."""

    CREATION = "creation"
    """From nothing to two READY versions."""
    TRAFFIC = "traffic"
    """From there: splits, scores, and the ways back."""
    DELETION = "deletion"
    """From there: another tenant, then versions and files go."""
    JOBS = "jobs"
    """From nothing to a job that ran, and is deleted."""
    UPGRADE = "upgrade"
    """From the folder that a release with schema 1 left."""

    async def prepare(self, watched: Path, sources: Path) -> None:
        """Make what lies there before, and is synced."""
        if self is Script.UPGRADE:
            _leave_schema_1(Host(watched, sources))
        for earlier in _EARLIER.get(self, ()):
            host = Host(watched, sources)
            for operation in earlier.operations:
                await operation.run(host)

    @property
    def operations(self) -> tuple[Operation, ...]:
        """In order."""
        return _OPERATIONS[self]


async def run_script(
    script: Script, host: Host, acknowledge: Callable[[int, object], Awaitable[None]]
) -> None:
    """Run all, and acknowledge each by its index with its result."""
    for index, operation in enumerate(script.operations):
        await acknowledge(index, await operation.run(host))


def _leave_schema_1(host: Host) -> None:
    host.state_path.mkdir(parents=True)
    host.artifacts = ArtifactStore(host.state_path)
    with contextlib.closing(sqlite3.connect(host.database)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(_SCHEMA_1)
        with connection:
            connection.execute(
                "INSERT INTO adapter_version VALUES ('acme', 'pirate', 2, ?, 6, 1000)",
                (host.keep(ONE).digest,),
            )


async def _checkpoint(host: Host) -> None:
    """As a backup does beside the gateway: the log is written from its beginning again."""
    with contextlib.closing(sqlite3.connect(host.database)) as connection:
        (busy, *_) = connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
        assert not busy


async def _keep(host: Host, source: str) -> object:
    return host.keep(source).digest


async def _remove(host: Host, source: str) -> object:
    digest = host.kept[source].digest
    assert not await host.registry.digest_in_use(digest)
    host.artifacts.remove(digest)
    return digest


async def _complete(host: Host, tenant: str, version: int, source: str) -> object:
    kept = host.kept[source]
    content = Content(kept.digest, kept.weights_sha256, kept.size_bytes, 8, ("q_proj", "v_proj"))
    return await host.registry.complete_version(tenant, "pirate", version, content, actor="import")


async def _begin(host: Host, tenant: str, request_id: str, take_traffic: bool = True) -> object:
    source = f"file:///adapters/{request_id}"
    new = NewVersion(tenant, "pirate", source, labels={"of": "sea"}, take_traffic=take_traffic)
    return await host.registry.begin_version(new, request_id=request_id, actor="cli")


async def _split(host: Host) -> object:
    return await host.registry.set_traffic(
        "acme",
        "pirate",
        [Arm(1, 90), Arm(3, 10)],
        guard=Guard(3, 20, max_error_ratio=0.05),
        actor="cli",
        reason="canary",
    )


async def _fail(host: Host) -> object:
    findings = ["rank 512 is over 64", "alpha is 0"]
    return await host.registry.fail_version("acme", "pirate", 2, findings, actor="import")


async def _roll_back(host: Host) -> object:
    return await host.registry.roll_back("acme", "pirate", actor="guard", reason="errors")


async def _promote(host: Host) -> object:
    return await host.registry.promote("acme", "pirate", 3, actor="cli")


async def _mint(host: Host) -> object:
    return await host.registry.mint_lora_int_id("acme", "pirate", 3)


async def _score(host: Host, tenant: str, version: int, request_id: str, score: float) -> None:
    await host.registry.record_feedback(tenant, "pirate", version, request_id, score)


async def _drain(host: Host, tenant: str) -> object:
    return await host.registry.drain_version(tenant, "pirate", 1, actor="cli")


async def _delete(host: Host, tenant: str, version: int) -> object:
    return await host.registry.delete_version(tenant, "pirate", version, actor="cli")


_CREATION = (
    Operation("open", Host.open),
    Operation("begin version 1", lambda host: _begin(host, "acme", "first")),
    Operation("keep its files", lambda host: _keep(host, ONE)),
    Operation("complete version 1", lambda host: _complete(host, "acme", 1, ONE)),
    Operation("begin version 2", lambda host: _begin(host, "acme", "refused")),
    Operation("fail version 2", _fail),
    Operation("repeat the request of version 2", lambda host: _begin(host, "acme", "refused")),
    Operation("delete version 2", lambda host: _delete(host, "acme", 2)),
    Operation("begin version 3", lambda host: _begin(host, "acme", "second")),
    Operation("give version 3 another id", _mint),
    Operation("keep the files of version 3", lambda host: _keep(host, TWO)),
    Operation("complete version 3", lambda host: _complete(host, "acme", 3, TWO)),
    Operation("end", Host.close),
)

_TRAFFIC = (
    Operation("open", Host.open),
    Operation("split the traffic", _split),
    Operation("score an answer", lambda host: _score(host, "acme", 3, "request-1", 0.25)),
    Operation("score it again", lambda host: _score(host, "acme", 3, "request-1", 1.0)),
    Operation("promote version 3", _promote),
    Operation("checkpoint", _checkpoint),
    Operation("roll back", _roll_back),
    Operation("roll back once more", _roll_back),
    Operation("promote version 3 again", _promote),
    Operation("end", Host.close),
)

_DELETION = (
    Operation("open", Host.open),
    Operation("begin for another tenant", lambda host: _begin(host, "zeta", "first", False)),
    Operation("keep files that are there", lambda host: _keep(host, ONE)),
    Operation("complete for another tenant", lambda host: _complete(host, "zeta", 1, ONE)),
    Operation("score its answer", lambda host: _score(host, "zeta", 1, "request-1", 0.5)),
    Operation("drain version 1", lambda host: _drain(host, "acme")),
    Operation("delete version 1", lambda host: _delete(host, "acme", 1)),
    Operation("drain the other tenant's", lambda host: _drain(host, "zeta")),
    Operation("delete the other tenant's", lambda host: _delete(host, "zeta", 1)),
    Operation("remove files that nobody uses", lambda host: _remove(host, ONE)),
    Operation("end", Host.close),
)

_UPGRADE = (
    Operation("open", Host.open),
    Operation("begin version 3", lambda host: _begin(host, "acme", "first")),
    Operation("end", Host.close),
)

_OPERATIONS = {
    Script.CREATION: _CREATION,
    Script.TRAFFIC: _TRAFFIC,
    Script.DELETION: _DELETION,
    Script.JOBS: JOBS,
    Script.UPGRADE: _UPGRADE,
}
_EARLIER = {
    Script.TRAFFIC: (Script.CREATION,),
    Script.DELETION: (Script.CREATION, Script.TRAFFIC),
}
