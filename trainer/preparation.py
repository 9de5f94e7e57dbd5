"""Prepared rows for whoever asks, read by a process of their own.

The same question is answered from a folder; asked by several at once it is worked on once; and
when none of them waits any more, the process that works on it is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import logging
import os
import subprocess
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from store.job_records import DatasetRecord
from store.upload_folder import StorageFull
from trainer.child import child_process, exit_code
from trainer.environment import OFFLINE, QUIET, without_secrets
from trainer.errors import DatasetInvalid, TrainingUnavailable
from trainer.prepare_plan import EXIT_STORAGE_FULL, PreparePlan
from trainer.prepared_folders import PreparedFolders, dataset_of
from trainer.preview import Previewer, TokenPreview
from trainer.report import DatasetReport
from trainer.served import ServedModel
from trainer.sources import with_our_sources
from trainer.spec import DataSpec, OverlengthPolicy
from trainer.to_the_end import to_the_end

logger = logging.getLogger(__name__)

REVISION = 1
"""Of what makes rows of lines. Raise it with every change that makes other rows or reports."""
MAX_PROCESSES = 2
MAX_PREVIEWS = 2
MAX_COMPLAINT_CHARACTERS = 300
COMPLAINT_BYTES = 8192
"""Of the end of the log, which are searched for what a process last said."""
LOG_FILE = "log.txt"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A dataset that was read."""

    folder: Path
    """Has the rows if it is valid; see `trainer/rows.py`."""
    report: DatasetReport
    dataset: str
    """Its name."""

    def require_valid(self) -> None:
        """Raise DatasetInvalid unless there are rows to train on."""
        if not self.report.valid:
            raise DatasetInvalid(self.dataset, self.report)


@dataclass(slots=True)
class _Making:
    """Work on one folder, and how many wait for it."""

    task: asyncio.Task[DatasetReport]
    waiting: int = 0


class Preparations:
    """Reads datasets for one model. Nobody else may use `root / "prepared"`."""

    def __init__(
        self,
        root: Path,
        served: ServedModel,
        environment: Mapping[str, str],
        *,
        python: str,
        digests: Callable[[], Awaitable[Collection[str]]],
    ) -> None:
        """`python` is the interpreter that reads, in that environment; `digests` tells the
        SHA-256 of all datasets that there are."""
        self._folders = PreparedFolders(root)
        self._digests = digests
        self._served = served
        self._python = python
        self._environment = _environment(environment)
        self._previewer = Previewer(served.path, max_tokens=served.max_model_len)
        self._previews = asyncio.Semaphore(MAX_PREVIEWS)
        self._processes = asyncio.Semaphore(MAX_PROCESSES)
        self._sweeping = asyncio.Lock()
        self._swept = False
        self._making: dict[str, _Making] = {}
        self._tasks = set[asyncio.Task[DatasetReport]]()
        self._closed = False

    async def prepare(self, dataset: DatasetRecord, path: Path, data: DataSpec) -> Prepared:
        """The rows of a dataset, made unless they are there; `data` is resolved.

        Cancelled, it stops the work unless somebody else waits for it, too. Raises StorageFull,
        or TrainingUnavailable if the process that reads cannot do it.
        """
        name = f"{dataset.sha256}-{self._key(data)}"
        making = self._making.get(name)
        if making is None:
            if self._closed:
                raise TrainingUnavailable("the gateway is shutting down: try again later")
            task = asyncio.create_task(self._prepared(name, path, data))
            making = self._making[name] = _Making(task)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(_let_go)
        making.waiting += 1
        try:
            await asyncio.wait({making.task})
        finally:
            making.waiting -= 1
            if not making.waiting:
                if self._making.get(name) is making:
                    del self._making[name]
                making.task.cancel()
                await asyncio.wait({making.task})
        if making.task.cancelled():
            raise TrainingUnavailable("the gateway is shutting down: try again later")
        return Prepared(self._folders.path(name), making.task.result(), dataset.name)

    async def preview(
        self, dataset: DatasetRecord, path: Path, line: int, data: DataSpec
    ) -> TokenPreview:
        """One line, from 1; `data` is resolved. A line that is no row tells why, and no tokens.

        Raises InvalidSpec if there is no such line or it is too long to be shown, and
        TrainingUnavailable if the model cannot be trained.
        """
        async with self._previews:  # until the thread ends: who gives up does not end it
            return await to_the_end(asyncio.to_thread(self._previewer.preview, path, line, data))

    async def close(self) -> None:
        """End all work."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    # --- one folder ---------------------------------------------------------

    def _key(self, data: DataSpec) -> str:
        """Names all that decides what the rows of a file are."""
        drops = data.overlength is OverlengthPolicy.DROP
        unused = {"reserve_tokens"} if drops else {"max_row_tokens"}
        told = {
            "data": data.model_dump(
                mode="json", exclude={"eval_fraction", "eval_dataset", *unused}
            ),
            "fingerprints": [
                self._served.fingerprints.get(name, "")
                for name in ("tokenizer_sha256", "chat_template_sha256")
            ],
            "revision": REVISION,
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]

    async def _prepared(self, name: str, path: Path, data: DataSpec) -> DatasetReport:
        async with self._sweeping:
            if not self._swept:
                await to_the_end(asyncio.to_thread(self._folders.sweep))
                self._swept = True
        report = await asyncio.to_thread(self._folders.find, name)
        if report is None:
            async with self._processes:
                report = await self._make(name, path, data)
        return report

    async def _make(self, name: str, path: Path, data: DataSpec) -> DatasetReport:
        plan = PreparePlan(dataset=str(path), model=str(self._served.path), data=data)
        made = self._folders.partial(name)
        try:
            await to_the_end(asyncio.to_thread(self._folders.begin, made, plan))
            await self._run(made)
            report = await to_the_end(self._finish(made, name))
        finally:
            await to_the_end(asyncio.to_thread(self._folders.drop, made))
        try:
            await asyncio.to_thread(self._folders.prune)
        except OSError as error:  # the rows are there all the same
            logger.warning("prepared rows that are too many cannot be removed: %s", error)
        return report

    async def _finish(self, made: Path, name: str) -> DatasetReport:
        report = await asyncio.to_thread(self._folders.finish, made, name)
        # Asked after it has its name: who deletes a dataset forgets it first, and then removes
        # the folders that have theirs. One of the two finds this one.
        try:
            if dataset_of(name) not in await self._digests():
                await asyncio.to_thread(self._folders.remove, name)
        except Exception:  # the next start removes it
            logger.exception("whether a dataset was deleted cannot be told")
        return report

    async def _run(self, made: Path) -> None:
        """Run the process in its folder. Raises StorageFull and TrainingUnavailable."""
        command = (self._python, "-m", "trainer.prepare", str(made))
        async with contextlib.AsyncExitStack() as owned:
            # To the end: a file that a thread opens for nobody is never closed.
            log = await to_the_end(
                asyncio.to_thread(lambda: owned.enter_context((made / LOG_FILE).open("wb")))
            )
            try:
                child = await owned.enter_async_context(
                    child_process(
                        command,
                        # Never written to: it is closed when we die, and the process ends then.
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        cwd=made,
                        env=self._environment,
                    )
                )
            except OSError as error:
                raise TrainingUnavailable(
                    f"the interpreter for training does not start ({error.strerror}): "
                    f"{self._python}"
                ) from error
            code = await exit_code(child)
        if code:
            raise await asyncio.to_thread(_failure, made / LOG_FILE, code)


def _environment(base: Mapping[str, str]) -> dict[str, str]:
    """What the process gets: no network, no secrets, no GPU."""
    kept = without_secrets(base)
    return with_our_sources(kept) | {"CUDA_VISIBLE_DEVICES": "", **OFFLINE, **QUIET}


def _failure(log: Path, code: int) -> Exception:
    if code == EXIT_STORAGE_FULL:
        full = StorageFull("the gateway's disk is full: have its operator free space")
        full.__cause__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return full
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - COMPLAINT_BYTES))
        said = file.read().decode(errors="replace")
    logger.error("the process that reads a dataset ended with %d: %s", code, said)
    lines = [line for line in said.splitlines() if line.strip()]
    why = lines[-1].strip()[:MAX_COMPLAINT_CHARACTERS] if lines else "it said nothing"
    if code < 0:
        why = f"signal {-code} killed it, as the system does when memory is short"
    return TrainingUnavailable(f"the dataset could not be read: {why}; tell the operator")


def _let_go(task: asyncio.Task[DatasetReport]) -> None:
    """Those who waited have heard of its error; nobody may have waited."""
    if not task.cancelled():
        task.exception()
