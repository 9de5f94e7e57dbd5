"""Publishing: from a checkpoint to a version that serves, through the catalog and its gate.

    verify -> note the limits -> create -> (copy, check, load, probe, gate) -> READY -> traffic

All of it can be done again: the request id is made of the job's uid and the checkpoint's digest, so
the second time finds the version, and traffic that a version has is left as it is. What was
measured of a version holds; the limits are those of each time.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from engine.base_model import ModuleShapes
from engine.catalog import AdapterCatalog
from engine.errors import (
    AdapterInvalid,
    AdapterLoadFailed,
    AdapterNotChecked,
    ProbeFailed,
    ShardUnavailable,
    TrialFailed,
)
from engine.gate import Reason
from engine.generation import VersionKey
from engine.servability import servability_findings
from engine.shelf import finished
from gateway import metrics
from gateway.adapter_codec import MAX_ARMS, MAX_LABELS, MAX_WEIGHT
from gateway.checkpoint_sources import TRAIN_SCHEME, CheckpointSources
from gateway.gating import applied, refusals
from gateway.publication_note import PublicationNote, read_note, write_note
from gateway.verified_checkpoint import CheckpointUnusable, VerifiedCheckpoint, open_checkpoint
from store.job_records import JobRecord
from store.records import (
    AdapterRecord,
    Arm,
    EtagMismatch,
    NewVersion,
    RegistryError,
    VersionRecord,
    VersionState,
)
from store.registry import Registry
from store.upload_folder import StorageFull
from trainer.events import GateReport, Publication, PublicationState
from trainer.publisher import Finding
from trainer.served import ServedModel
from trainer.spec import GateSpec, JobSpec, LoraSpec, PublishSpec

logger = logging.getLogger(__name__)

T = TypeVar("T")

TRAINER = "trainer"
"""Actor of what publications change."""
TRAFFIC_TRIES = 16
"""How often a split is read again that others change meanwhile."""

_FIELDS = {
    "r": "spec.lora.r",
    "lora_alpha": "spec.lora.alpha",
    "use_rslora": "spec.lora.use_rslora",
    "target_modules": "spec.lora.target_modules",
    "bias": "spec.lora.bias",
}
"""Fields of `adapter_config.json`, as the contract has them."""


class CatalogPublisher:
    """A `Publisher` into the catalog of this gateway."""

    def __init__(
        self,
        catalog: AdapterCatalog,
        registry: Registry,
        sources: CheckpointSources,
        served: ServedModel,
        shapes: ModuleShapes,
    ) -> None:
        """`shapes` are the base model's linear layers. The catalog has to know checkpoints as a
        source, and to ask `CheckpointGate` about their versions."""
        self._catalog = catalog
        self._registry = registry
        self._sources = sources
        self._served = served
        self._shapes = shapes
        self._turns: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        """Of checkpoint and adapter: one publication at a time."""

    def findings(self, spec: JobSpec) -> Sequence[Finding]:
        """See `Publisher.findings`."""
        config = _adapter_config(spec.lora)
        found = servability_findings(config, self._shapes, self._served.max_lora_rank)
        findings = [Finding(_FIELDS.get(field, "spec.lora"), text) for field, text in found]
        tokens, served_tokens = spec.data.max_sequence_tokens, self._served.max_model_len
        if tokens is not None and tokens > served_tokens:
            findings.append(
                Finding(
                    "spec.data.max_sequence_tokens",
                    f"is {tokens}, and the server's context has {served_tokens} tokens: train on "
                    "shorter rows, or start the gateway with a higher --max-model-len",
                )
            )
        return findings

    async def publish(
        self, job: JobRecord, checkpoint: Path, adapter: str, publish: PublishSpec
    ) -> Publication:
        """See `Publisher.publish`."""
        turn = self._turns.setdefault((str(checkpoint), adapter), asyncio.Lock())
        async with turn:
            try:
                return await self._publish(job, checkpoint, adapter, publish)
            except CheckpointUnusable as error:
                return _failed(adapter, 0, str(error))
            except OSError as error:
                logger.error("job %s cannot be published: %s", job.name, error)
                reason = (
                    f"the gateway could not store it ({error.strerror}): publish it again later"
                )
                return _failed(adapter, 0, reason)
            except (RegistryError, ShardUnavailable, StorageFull) as error:
                return _failed(adapter, 0, str(error))
            except Exception:
                logger.exception("job %s cannot be published", job.name)
                return _failed(
                    adapter,
                    0,
                    "the gateway failed to publish it, and logged why: tell the operator, and "
                    "publish the checkpoint again",
                )

    async def _publish(
        self, job: JobRecord, checkpoint: Path, adapter: str, publish: PublishSpec
    ) -> Publication:
        limits = _resolved(publish.gate, job, self._served)
        verified = await asyncio.to_thread(open_checkpoint, checkpoint)
        record, note = await self._begin(job, verified, adapter, limits)
        if record.state is VersionState.FAILED:
            return await self._rejected(record, checkpoint, note.refusal)
        try:
            record = await self._catalog.settled(record)
        except AdapterNotChecked as error:
            return _failed(adapter, record.version, *error.findings)
        except AdapterInvalid as error:
            _count(error)
            return await self._refuse(record, checkpoint, error.findings)
        if record.state is not VersionState.READY:
            reason = f"version {record.version} is {record.state.name}: publish it again"
            return _failed(adapter, record.version, reason)
        report = await self._report(record, checkpoint, limits)
        if report is not None and (reasons := refusals(report, limits)):
            return Publication(
                state=PublicationState.REJECTED,
                adapter=adapter,
                version=record.version,
                reasons=tuple(reasons),
                gate=report,
            )
        return await self._serve(record, report, publish.traffic_percent)

    async def _report(
        self, record: VersionRecord, checkpoint: Path, limits: GateSpec
    ) -> GateReport | None:
        """What the gate measured of a version that is READY, with these limits: they may be
        others than those that it was measured for. None: nothing is noted of it."""
        note = await asyncio.to_thread(read_note, checkpoint, record.adapter)
        if note is None or note.report is None:
            return None
        return note.report.model_copy(update={"limits": applied(limits)})

    # --- from a checkpoint to a version -------------------------------------

    async def _begin(
        self, job: JobRecord, checkpoint: VerifiedCheckpoint, adapter: str, limits: GateSpec
    ) -> tuple[VersionRecord, PublicationNote]:
        """The version of the last try, or of a new one if that cannot go on.

        One that was refused is FAILED, and tried again only within other limits.
        """
        note = await asyncio.to_thread(read_note, checkpoint.path, adapter)
        if note is None:
            note = await _note(checkpoint, adapter, PublicationNote(number=1, limits=limits))
        new = await asyncio.to_thread(self._new_version, job, checkpoint, adapter)
        while True:
            record = await self._catalog.create(
                new,
                request_id=_request_id(job, checkpoint, adapter, note.number),
                actor=TRAINER,
            )
            if record.state in (VersionState.VALIDATING, VersionState.READY):
                return record, note
            if record.state is VersionState.FAILED and note.refusal and note.limits == limits:
                return record, note
            again = PublicationNote(number=note.number + 1, limits=limits)
            note = await _note(checkpoint, adapter, again)

    def _new_version(
        self, job: JobRecord, checkpoint: VerifiedCheckpoint, adapter: str
    ) -> NewVersion:
        """Blocks on the disk."""
        return NewVersion(
            tenant=job.tenant,
            adapter=adapter,
            source_uri=self._sources.uri(checkpoint.path),
            expected_sha256=checkpoint.weights_sha256,
            fingerprints=checkpoint.fingerprints,
            labels=_labels(job),
            take_traffic=False,
        )

    async def _refuse(
        self, record: VersionRecord, checkpoint: Path, findings: Sequence[str]
    ) -> Publication:
        """Remember that it was refused, and why."""

        def remember() -> None:
            note = read_note(checkpoint, record.adapter)
            if note is not None:
                refused = note.model_copy(update={"refusal": tuple(findings)})
                write_note(checkpoint, record.adapter, refused)

        await asyncio.to_thread(remember)
        return await self._rejected(record, checkpoint, findings)

    async def _rejected(
        self, record: VersionRecord, checkpoint: Path, reasons: Sequence[str]
    ) -> Publication:
        note = await asyncio.to_thread(read_note, checkpoint, record.adapter)
        return Publication(
            state=PublicationState.REJECTED,
            adapter=record.adapter,
            version=record.version,
            reasons=tuple(reasons),
            gate=note.report if note is not None else None,
        )

    # --- from a version to traffic ------------------------------------------

    async def _serve(
        self, record: VersionRecord, report: GateReport | None, percent: int
    ) -> Publication:
        try:
            given = await self._give_traffic(
                VersionKey(record.tenant, record.adapter, record.version), percent
            )
        except AdapterLoadFailed as error:
            return _failed(record.adapter, record.version, error.reason)
        except (RegistryError, ShardUnavailable) as error:
            return _failed(record.adapter, record.version, str(error))
        # Nothing is awaited from here on: who was given traffic is told of.
        return Publication(
            state=PublicationState.SERVING,
            adapter=record.adapter,
            version=record.version,
            gate=report,
            traffic_percent=given,
        )

    async def _give_traffic(self, key: VersionKey, percent: int) -> int:
        """The share that the version has then, in percent. One that has a share keeps it.

        Raises what the catalog's `set_traffic` does; then the split is as it was.
        """
        for tries_left in reversed(range(TRAFFIC_TRIES)):
            seen = await self._registry.adapter(key.tenant, key.adapter)
            if not percent or any(arm.version == key.version for arm in seen.arms):
                return _percent(seen.arms, key.version)
            arms = shared(seen.arms, key.version, percent)
            if len(arms) > MAX_ARMS:
                raise TooManyArms(key.adapter)
            await self._catalog.load(key)  # takes a while, and may be cancelled
            try:
                after = await _told(self._split(key, arms, seen))
                return _percent(after.arms, key.version)
            except EtagMismatch:
                if not tries_left:
                    raise
        raise AssertionError("the last try returns or raises")

    async def _split(
        self, key: VersionKey, arms: Sequence[Arm], seen: AdapterRecord
    ) -> AdapterRecord:
        if len(arms) == 1:
            return await self._catalog.promote(key, etag=seen.etag, actor=TRAINER)
        return await self._catalog.set_traffic(
            key.tenant, key.adapter, arms, guard=seen.guard, etag=seen.etag, actor=TRAINER
        )


async def _told(change: Coroutine[Any, Any, T]) -> T:
    """What a change made, also if we are cancelled meanwhile: it was made nevertheless, and a
    caller who heard of a cancellation alone would take it for one that was not."""
    made: list[T] = []

    async def make() -> None:
        made.append(await change)

    try:
        await finished(make())
    except asyncio.CancelledError:
        if not made:
            raise
    return made[0]


class TooManyArms(RegistryError):
    """A split has no room for another version."""

    def __init__(self, adapter: str) -> None:
        super().__init__(
            f"adapter {adapter!r} splits its traffic over {MAX_ARMS} versions, which is the limit; "
            "take some out with SetTraffic, and publish the checkpoint again"
        )


def shared(arms: Sequence[Arm], version: int, percent: int) -> list[Arm]:
    """A split in which a new version has that share, and the others what is left, in the
    proportions that they had. Nobody to share with, or 100: the version has all.
    """
    if not arms or percent >= 100:
        return [Arm(version, 100)]
    weights = [arm.weight * (100 - percent) for arm in arms]
    weights.append(percent * sum(arm.weight for arm in arms))
    divisor = math.gcd(*weights)
    # Exact, unless that takes larger numbers than a caller could set again.
    scale = min(1.0, MAX_WEIGHT * divisor / max(weights))
    whole = [max(1, round(weight // divisor * scale)) for weight in weights]
    versions = [*(arm.version for arm in arms), version]
    return [Arm(each, weight) for each, weight in zip(versions, whole, strict=True)]


def _percent(arms: Sequence[Arm], version: int) -> int:
    total = sum(arm.weight for arm in arms)
    mine = sum(arm.weight for arm in arms if arm.version == version)
    return round(100 * mine / total) if total else 0


def _labels(job: JobRecord) -> dict[str, str]:
    """The caller's and ours; ours win, and as many of the caller's as a version can have."""
    ours = {"job": job.name, "dataset": job.dataset}
    if (init_from := JobSpec.model_validate(job.effective_spec).init_from) is not None:
        ours["init_from"] = init_from.text
    theirs = [item for item in sorted(job.labels.items()) if item[0] not in ours]
    return {**dict(theirs[: MAX_LABELS - len(ours)]), **ours}


def _request_id(job: JobRecord, checkpoint: VerifiedCheckpoint, adapter: str, number: int) -> str:
    """No caller can use such a one."""
    return f"{TRAIN_SCHEME}{job.uid}:{checkpoint.sha256}:{adapter}:{number}"


async def _note(
    checkpoint: VerifiedCheckpoint, adapter: str, note: PublicationNote
) -> PublicationNote:
    await asyncio.to_thread(write_note, checkpoint.path, adapter, note)
    return note


def _failed(adapter: str, version: int, *reasons: str) -> Publication:
    return Publication(
        state=PublicationState.FAILED, adapter=adapter, version=version, reasons=reasons
    )


def _count(error: AdapterInvalid) -> None:
    if isinstance(error, TrialFailed):
        return  # the gate counted it, and knows more
    reason = Reason.EFFECT if isinstance(error, ProbeFailed) else Reason.SHAPE
    metrics.observe_gate_rejection(reason)


def _resolved(gate: GateSpec, job: JobRecord, served: ServedModel) -> GateSpec:
    """Limits as `JobSpec.resolved` fills them in; some come with a request, not with the job."""
    hyperparameters = JobSpec.model_validate(job.effective_spec).hyperparameters
    return gate.resolved(hyperparameters, served.dtype)


def _adapter_config(lora: LoraSpec) -> Mapping[str, object]:
    """What PEFT would save of an adapter of that shape."""
    return {
        "peft_type": "LORA",
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "target_modules": list(lora.target_modules),
        "bias": lora.bias,
    }
