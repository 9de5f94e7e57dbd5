"""The trial: what a version has to pass in an engine before it is READY.

load -> probe -> what versions of its kind of source have to pass besides
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from engine.errors import (
    AdapterLoadFailed,
    AdapterNotChecked,
    AdapterQuarantined,
    GenerationFailed,
    PoisonRequest,
    ProbeFailed,
    TrialFailed,
)
from engine.generation import ServedVersion, VersionKey
from engine.pool import ShardPool
from engine.probe import Probe
from engine.served import key_of
from engine.shard import Shard
from store.records import VersionRecord


class Trial(Protocol):
    """What versions of one kind of source have to pass besides the probe."""

    async def findings(
        self, record: VersionRecord, version: ServedVersion, shard: Shard
    ) -> Sequence[str]:
        """What is wrong with a version that is loaded; empty if nothing is.

        Raises AdapterNotChecked, GenerationFailed or ShardUnavailable if that cannot be told.
        """


class TryOut:
    """Loads versions that are not READY yet, and tries them."""

    def __init__(
        self,
        load: Callable[[VersionKey, str], Awaitable[None]],
        pool: ShardPool,
        probe: Probe,
        trials: Mapping[str, Trial],
    ) -> None:
        """`load` loads a version on the shard of that name. `trials` by what the URI of the
        source begins with, for example `train:`."""
        self._load = load
        self._pool = pool
        self._probe = probe
        self._trials = trials

    async def run(self, record: VersionRecord) -> None:
        """Returns if the version may serve.

        Raises ProbeFailed or TrialFailed with all findings, AdapterNotChecked if there are none
        because it could not be tried, and ShardUnavailable.
        """
        key = key_of(record)
        try:
            route = self._pool.homes(key)[0]  # one is enough to know
            await self._load(key, route.shard.name)
            async with route.lease() as version:
                assert version is not None
                if findings := await self._probe.findings(version, route.shard):
                    raise ProbeFailed(key.adapter, findings, key.version)
                for trial in self._asked_of(record.source_uri):
                    if found := await trial.findings(record, version, route.shard):
                        raise TrialFailed(key.adapter, found, key.version)
        except AdapterLoadFailed as error:
            raise AdapterNotChecked(key.adapter, [error.reason], key.version) from error
        except (PoisonRequest, AdapterQuarantined) as error:
            raise AdapterNotChecked(key.adapter, [str(error)], key.version) from error
        except GenerationFailed as error:
            reason = f"the engine cannot answer with it: {error}"
            raise AdapterNotChecked(key.adapter, [reason], key.version) from error

    def _asked_of(self, source_uri: str) -> list[Trial]:
        return [trial for scheme, trial in self._trials.items() if source_uri.startswith(scheme)]
