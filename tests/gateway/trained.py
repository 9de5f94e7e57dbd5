"""Checkpoints as the training process leaves them, and a host that publishes them.

Everything is real but the engine: it is a core in memory, and a shard that scores by a formula.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.pool import ShardPool
from gateway.checkpoint_sources import TRAIN_SCHEME, CheckpointSources
from gateway.gating import CheckpointGate
from gateway.publishing import CatalogPublisher
from store.job_records import Intent, JobRecord, JobState
from tests.engine.crowd import SHARD
from tests.engine.drafts import MAX_LORA_RANK, Q_PROJ, Draft, Spoil, a, base_llama
from tests.engine.library import PRINTS, TENANT, Library, library
from tests.engine.scoring_shard import ScoringShard, logprob
from tests.engine.test_gate import VERSION
from trainer.checkpoint import seal
from trainer.events import Publication
from trainer.reference import Reference, ReferenceRow
from trainer.run_folder import ADAPTER_FOLDER, REFERENCE_FILE, write_whole
from trainer.served import ServedModel
from trainer.spec import (
    Backend,
    GateSpec,
    Hyperparameters,
    JobSpec,
    PublishSpec,
    Quantization,
)

UID = "0" * 31 + "1"
JOB = "sql-1"
STEP = 7
FINGERPRINTS = dataclasses.asdict(PRINTS)
TOKENS = (1, 2, 3, 4)
LOOSE = GateSpec(max_logprob_delta_mean=10.0)


def served_model(folder: Path) -> ServedModel:
    return ServedModel(
        name="tiny",
        path=folder,
        fingerprints=FINGERPRINTS,
        dtype="bfloat16",
        max_model_len=64,
        max_lora_rank=MAX_LORA_RANK,
        target_modules=("q_proj", "v_proj"),
    )


def resolved(**changes: object) -> JobSpec:
    """A spec as a job has it."""
    unquantized = Hyperparameters(quantization=Quantization.NONE)
    spec = JobSpec(dataset="faq", adapter="sql", publish=PublishSpec(), hyperparameters=unquantized)
    return spec.model_copy(update=changes).resolved(
        base_model="tiny",
        max_model_len=64,
        served_dtype="bfloat16",
        backend=Backend.PEFT,
        on_gpu=False,
    )


def job_record(labels: Mapping[str, str] | None = None) -> JobRecord:
    return JobRecord(
        tenant=TENANT,
        name=JOB,
        uid=UID,
        number=1,
        adapter="sql",
        dataset="faq",
        eval_dataset="",
        spec={"dataset": "faq", "adapter": "sql"},
        effective_spec=resolved().model_dump(mode="json"),
        fingerprints={},
        labels=labels or {},
        priority=0,
        state=JobState.FINALIZING,
        intent=Intent.RUN,
        epoch=5,
        attempt=1,
        device="cpu",
        ingested_bytes=0,
        last_sequence=9,
        publication={},
        progress=None,
        manifest=None,
        error=None,
        notices=(),
        recovery={},
        create_time_ns=1,
        queue_time_ns=1,
        device_time_ns=None,
        start_time_ns=2,
        end_time_ns=None,
    )


@dataclass
class Trained:
    """A host and the checkpoints of one job."""

    library: Library
    shard: ScoringShard
    sources: CheckpointSources
    publisher: CatalogPublisher

    def checkpoint(
        self,
        step: int = STEP,
        *,
        off_by: float = 0.0,
        arrives: float | None = 1.0,
        spoil: Spoil = lambda draft: None,
        fingerprints: Mapping[str, str] = FINGERPRINTS,
    ) -> Path:
        """What training left, with a trainer that differs from the engine by so much, and whose
        adapter changes so much more than it does in the engine that this share `arrives`; None:
        the trainer does not tell what it changes."""
        attempt = self.sources.jobs / UID / "attempts" / "1"
        folder = attempt / "checkpoints" / f"checkpoint-{step}"
        adapter = folder / ADAPTER_FOLDER
        adapter.mkdir(parents=True)
        draft = Draft()
        draft.tensors[a(Q_PROJ)] += torch.tensor(1e-3 * step)  # no two checkpoints are equal
        spoil(draft)
        draft.write(adapter)
        places = range(1, len(TOKENS))
        said = tuple(logprob(TOKENS[place], place, VERSION) + off_by for place in places)
        effects = [
            logprob(TOKENS[place], place, VERSION) - logprob(TOKENS[place], place, None)
            for place in places
        ]
        base = None
        if arrives is not None:
            base = tuple(one - effect / arrives for one, effect in zip(said, effects, strict=True))
        row = ReferenceRow(
            token_ids=TOKENS, positions=tuple(places), logprobs=said, base_logprobs=base
        )
        reference = Reference(rows=(row, row), trained_as="nf4/bfloat16", held_out=True)
        write_whole(folder / REFERENCE_FILE, reference)
        write_whole(attempt / "plan.json", {"fingerprints": dict(fingerprints)})
        seal(folder, step, None)
        return folder

    async def publish(
        self,
        checkpoint: Path,
        percent: int = 0,
        *,
        gate: GateSpec | None = None,
        adapter: str = "sql",
        labels: Mapping[str, str] | None = None,
    ) -> Publication:
        spec = PublishSpec(traffic_percent=percent, gate=gate or GateSpec())
        return await self.publisher.publish(job_record(labels), checkpoint, adapter, spec)

    async def weights(self, adapter: str = "sql") -> dict[int, int]:
        """The split."""
        record = await self.library.registry.adapter(TENANT, adapter)
        return {arm.version: arm.weight for arm in record.arms}

    async def versions(self) -> Sequence[int]:
        """All of `sql`, oldest first."""
        found = await self.library.registry.versions(TENANT, "sql", limit=100, deleted=True)
        return sorted(record.version for record in found)


@contextlib.asynccontextmanager
async def trained(root: Path) -> AsyncIterator[Trained]:
    """One start of the host on a state folder."""
    async with library(root) as at:
        shard = ScoringShard()
        served = served_model(root)
        sources = CheckpointSources(root / "state" / "jobs")
        at.own_folder = sources.adapter
        pool = ShardPool([shard], {SHARD: at.residents}, at.ledger.view)
        gate = CheckpointGate(sources, served)
        assert at.residency is not None
        at.catalog.serve_on({SHARD: at.residency}, pool, at.probe, {TRAIN_SCHEME: gate})
        publisher = CatalogPublisher(at.catalog, at.registry, sources, served, base_llama().linear)
        yield Trained(at, shard, sources, publisher)
