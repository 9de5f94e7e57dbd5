"""The training half of the control plane: datasets, jobs, and the gate into the catalog.

    Training -> datasets -> files
            '-> jobs -> training process
                    '-> publisher -> catalog -> gate -> a new version

Owned by the control plane, which opens, runs and closes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from engine.base_model import ModuleShapes
from engine.catalog import AdapterCatalog
from engine.shard import Shard
from engine.trial import Trial
from gateway import metrics
from gateway.admission import Admission, Slots
from gateway.catalog_library import CatalogLibrary
from gateway.checkpoint_sources import TRAIN_SCHEME, CheckpointSources
from gateway.gating import CheckpointGate
from gateway.preview import Previews
from gateway.publishing import CatalogPublisher
from gateway.settings import PRICE, Settings
from gateway.training import Training
from store.datasets import DatasetFiles
from store.job_records import JobRecord
from store.jobs import JobStore
from store.registry import Registry
from store.uploads import DATASET_UPLOADS, UploadStore
from trainer.datasets import Datasets
from trainer.devices import Device
from trainer.estimate import Price
from trainer.jobs import JOBS_FOLDER, Jobs
from trainer.lender import Lender
from trainer.preparation import Preparations
from trainer.prepared_folders import PreparedFolders
from trainer.pulse import Pulse, take_pulse
from trainer.reclaim import reclaim
from trainer.served import ServedModel


class TrainingPlane:
    """Everything about training in one gateway."""

    def __init__(
        self, settings: Settings, state_dir: Path, store: JobStore, environment: Mapping[str, str]
    ) -> None:
        """`environment` is what training processes inherit."""
        self._settings = settings
        self._environment = environment
        self._state_dir = state_dir
        self.store = store
        self._files = DatasetFiles(state_dir)
        self._datasets = Datasets(
            store,
            self._files,
            UploadStore(state_dir, folder=DATASET_UPLOADS),
            PreparedFolders(state_dir),
        )
        self.sources = CheckpointSources(state_dir / JOBS_FOLDER)
        """Checkpoints as sources of adapters."""
        self._preparations: Preparations | None = None
        self._jobs: Jobs | None = None

    async def open(self) -> None:
        """Sweep what a crash left over, and take back what was lent: engines start next."""
        await self._datasets.open()
        await reclaim(self.store, self._state_dir / JOBS_FOLDER)

    def serve(
        self,
        served: ServedModel,
        shapes: ModuleShapes,
        find_shard: Callable[[], Shard],
        catalog: AdapterCatalog,
        registry: Registry,
        admission: Admission,
        watches: Slots,
        lender: Lender,
    ) -> Training:
        """The servicer, which renders where `find_shard` says and publishes into `catalog`.
        `shapes` are the base model's linear layers, and `lender` is of devices that serve, too."""
        settings, environment = self._settings, self._environment
        python = settings.python_that_trains
        self._preparations = preparations = Preparations(
            self._state_dir,
            served,
            environment,
            python=python,
            digests=self.store.dataset_digests,
        )
        self._jobs = jobs = Jobs(
            self.store,
            self._files,
            preparations,
            CatalogPublisher(catalog, registry, self.sources, served, shapes),
            served,
            [Device(name) for name in settings.devices_that_train],
            self._state_dir,
            library=CatalogLibrary(catalog, registry, shapes),
            python=python,
            environment=environment,
            price=_price(settings.training_price),
            stall_timeout_s=settings.training_stall_timeout_s,
            observe_wait=metrics.observe_training_wait,
            lender=lender,
        )
        return Training(
            self.store,
            self._datasets,
            preparations,
            Previews(preparations, find_shard),
            jobs,
            served,
            admission,
            watches,
        )

    def trials(self, served: ServedModel) -> dict[str, Trial]:
        """What a trained adapter has to pass before it is READY, by scheme of its source."""
        return {TRAIN_SCHEME: CheckpointGate(self.sources, served)}

    async def run(self) -> None:
        """Run jobs, until cancelled."""
        assert self._jobs is not None
        await self._jobs.run()

    async def pulse(self) -> Pulse:
        """How many jobs there are, and how their processes do."""
        return await take_pulse(self.store, self._state_dir / JOBS_FOLDER)

    def queue_position(self, job: JobRecord) -> int:
        """From 1 for the job that is next; 0 for one that is not QUEUED."""
        return 0 if self._jobs is None else self._jobs.queue_position(job)

    async def sweep_uploads(self) -> None:
        """Drop uploads that nobody went on with."""
        await self._datasets.sweep_uploads()

    async def close(self) -> None:
        """Training processes go on, and are found again at the next start."""
        if self._jobs is not None:
            await self._jobs.close()
        if self._preparations is not None:
            await self._preparations.close()


def _price(text: str | None) -> Price | None:
    found = PRICE.fullmatch(text or "")
    return None if found is None else Price(float(found[1]), found[2])
