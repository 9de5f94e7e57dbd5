"""A version and a job's manifest name the adapter that was trained further."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from gateway.adapter_codec import MAX_LABELS
from gateway.job_codec import encode_job
from store.job_records import JobRecord
from tests.engine.library import key
from tests.gateway.trained import JOB, LOOSE, STEP, job_record, resolved, trained
from trainer.events import Checkpoint, Manifest, PublicationState
from trainer.spec import AdapterVersionSource, CheckpointSource, InitFrom, PublishSpec

VERSION = InitFrom(
    adapter_version=AdapterVersionSource(adapter="sql", version=3), weights_sha256="a" * 64
)
CHECKPOINT = InitFrom(checkpoint=CheckpointSource(job="sql-0", step=40), weights_sha256="b" * 64)


def job(init_from: InitFrom | None, **labels: str) -> JobRecord:
    effective = resolved(init_from=init_from).model_dump(mode="json")
    return dataclasses.replace(job_record(labels), effective_spec=effective)


@pytest.mark.parametrize(
    ("init_from", "text"), [(VERSION, "sql@3"), (CHECKPOINT, "sql-0/40"), (None, None)]
)
async def test_the_version_has_a_label(
    tmp_path: Path, init_from: InitFrom | None, text: str | None
) -> None:
    theirs = {f"l{number:02}": "" for number in range(MAX_LABELS)}
    async with trained(tmp_path) as at:
        publication = await at.publisher.publish(
            job(init_from, **theirs), at.checkpoint(), "sql", PublishSpec(gate=LOOSE)
        )
        assert publication.state is PublicationState.SERVING, publication.reasons
        labels = (await at.library.registry.version(*key(1))).labels
    assert (labels.get("init_from"), labels["job"]) == (text, JOB)
    assert len(labels) == MAX_LABELS


def test_the_manifest_has_it_with_its_digest() -> None:
    for init_from in (VERSION, CHECKPOINT, None):
        told = job(init_from)
        manifest = Manifest(
            dataset_sha256="d" * 64,
            rows_sha256="e" * 64,
            base_model="tiny",
            fingerprints={},
            versions={},
            seed=1,
            device="cpu",
            files={},
            final_loss=1.0,
            effective_spec=told.effective_spec,
            checkpoint=Checkpoint(
                step=STEP, folder="c", size_bytes=1, sha256="f" * 64, create_time_ns=1
            ),
        )
        publication = {"state": "pending", "adapter": "sql"}
        dumped = manifest.model_dump(mode="json")
        message = encode_job(dataclasses.replace(told, manifest=dumped, publication=publication))
        assert message.manifest.HasField("init_from") is (init_from is not None)
        assert message.manifest.init_from == message.effective_spec.init_from
        if init_from is not None:
            assert message.manifest.init_from.weights_sha256 == init_from.weights_sha256
