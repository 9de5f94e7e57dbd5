"""A dataset is read once for all who ask, by a process that ends when nobody asks any more."""

from __future__ import annotations

import asyncio
import os
import stat
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import IO, Any

import psutil
import pytest

from store.upload_folder import StorageFull
from tests.trainer.prepared import GOOD, data_spec, digests, exchange, record, rows_of, write_lines
from trainer.errors import DatasetInvalid, InvalidSpec, TrainingUnavailable
from trainer.failure import is_storage_full
from trainer.preparation import LOG_FILE, MAX_PREVIEWS, Preparations, Prepared
from trainer.prepare_plan import EXIT_ORPHANED, EXIT_STORAGE_FULL, PLAN_FILE, PreparePlan
from trainer.prepared_folders import PreparedFolders
from trainer.report import DatasetReport
from trainer.rows import REPORT_FILE
from trainer.run_folder import write_whole
from trainer.served import ServedModel
from trainer.spec import LossMask

ROOT = Path(__file__).parents[2]
SOON_S = 60.0
DATA = data_spec()

Open = Callable[..., Preparations]


def served(model: Path, template_sha256: str = "t") -> ServedModel:
    return ServedModel(
        name="tiny",
        path=model,
        fingerprints={"tokenizer_sha256": "k", "chat_template_sha256": template_sha256},
        dtype="float32",
        max_model_len=2048,
        max_lora_rank=16,
        target_modules=("q_proj",),
    )


@pytest.fixture
async def open_on(tiny: Path, tmp_path: Path) -> AsyncIterator[Open]:
    opened = list[Preparations]()

    def open_(*, python: str = sys.executable, template_sha256: str = "t") -> Preparations:
        opened.append(
            Preparations(
                tmp_path,
                served(tiny, template_sha256),
                dict(os.environ),
                python=python,
                digests=digests,
            )
        )
        return opened[-1]

    yield open_
    for one in opened:
        await one.close()
    assert children() == []
    assert partial(tmp_path) == []


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "d", [GOOD, exchange("one", "two")])


def children() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children()
        if "trainer.prepare" in " ".join(child.cmdline())
    ]


def partial(root: Path) -> list[Path]:
    return list((root / "prepared").glob("*.partial-*"))


async def one_child() -> psutil.Process:
    """The process that reads, as soon as it runs."""
    async with asyncio.timeout(SOON_S):
        while not (found := children()):
            await asyncio.sleep(0.02)
    return found[0]


def interpreter(folder: Path, script: str) -> str:
    """A program that takes the place of the interpreter."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


async def test_a_dataset_is_read_by_a_process_once_for_all_who_ask(
    open_on: Open, tmp_path: Path, dataset: Path
) -> None:
    preparations = open_on()
    asked = [
        asyncio.create_task(preparations.prepare(record(name=name), dataset, DATA))
        for name in ("letters", "letters", "copy")
    ]
    reader = await one_child()
    async with asyncio.timeout(SOON_S):
        while reader.nice() == psutil.Process().nice():  # until it has begun
            await asyncio.sleep(0.02)
    environment = reader.environ()
    assert environment["CUDA_VISIBLE_DEVICES"] == "" and environment["HF_HUB_OFFLINE"] == "1"
    assert os.getsid(reader.pid) == reader.pid
    first, again, copy = await asyncio.gather(*asked)
    assert first == again
    assert (first.dataset, copy.dataset, copy.folder) == ("letters", "copy", first.folder)
    assert first.report.rows == len(rows_of(first.folder)) == 2
    assert len(list((tmp_path / "prepared").iterdir())) == 1

    # Asked again, also by another gateway and with no interpreter: it is answered from a file.
    os.utime(first.folder / REPORT_FILE, (1, 1))
    later = open_on(python="/none")
    assert await later.prepare(record(), dataset, DATA) == first
    assert time.time() - (first.folder / REPORT_FILE).stat().st_mtime < SOON_S  # it counts as used
    with pytest.raises(InvalidSpec):
        await later.preview(record(), dataset, 9, DATA)
    shown = await later.preview(record(), dataset, 2, DATA)
    assert [token.id for token in shown.tokens] == rows_of(first.folder)[1]["input_ids"]

    # Another key is none that is there.
    for data, template in [
        (data_spec(loss_mask=LossMask.ALL), "t"),
        (data_spec(max_row_tokens=9), "t"),
        (DATA, "another template"),
    ]:
        other = open_on(python="/none", template_sha256=template)
        with pytest.raises(TrainingUnavailable, match=r"does not start .*: /none"):
            await other.prepare(record(), dataset, data)
    with pytest.raises(TrainingUnavailable):
        await later.prepare(record("e" * 64), dataset, DATA)

    # What does not change the rows is no other key.
    for data in (data_spec(eval_fraction=0.3, reserve_tokens=3), data_spec(eval_dataset="x")):
        assert await later.prepare(record(), dataset, data) == first


async def test_who_gives_up_on_a_preview_keeps_its_place_until_its_thread_ends(
    open_on: Open, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preparations = open_on()
    running, most = 0, 0
    go, lock = threading.Event(), threading.Lock()

    def slow(*_: object) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        assert go.wait(SOON_S)
        with lock:
            running -= 1

    monkeypatch.setattr(preparations._previewer, "preview", slow)
    asked = [
        asyncio.create_task(preparations.preview(record(), dataset, 1, DATA)) for _ in range(4)
    ]
    await asyncio.sleep(0.1)
    for task in asked[:3]:
        task.cancel()
    await asyncio.sleep(0.1)
    go.set()
    await asyncio.wait(asked)
    assert most == MAX_PREVIEWS
    assert [task.cancelled() for task in asked] == [True, True, True, False]


async def test_rows_that_are_made_are_answered_though_others_cannot_be_removed(
    open_on: Open, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: PreparedFolders) -> None:
        raise FileNotFoundError("gone")

    monkeypatch.setattr(PreparedFolders, "prune", fail)
    assert (await open_on().prepare(record(), dataset, DATA)).report.rows == 2


async def test_the_log_is_closed_where_nobody_waits_any_more_while_it_is_opened(
    open_on: Open, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file, opening, go = Path.open, threading.Event(), threading.Event()
    opened: list[IO[Any]] = []

    def slow(path: Path, *args: Any, **options: Any) -> IO[Any]:
        if path.name == LOG_FILE:
            opening.set()
            go.wait(SOON_S)
        file: IO[Any] = open_file(path, *args, **options)
        opened.extend([file] if path.name == LOG_FILE else [])
        return file

    monkeypatch.setattr(Path, "open", slow)
    asking = asyncio.create_task(open_on().prepare(record(), dataset, DATA))
    await asyncio.to_thread(opening.wait, SOON_S)
    asking.cancel()
    asyncio.get_running_loop().call_later(0.2, go.set)
    await asyncio.gather(asking, return_exceptions=True)
    async with asyncio.timeout(SOON_S):
        while not (opened and opened[0].closed):
            await asyncio.sleep(0.01)


async def test_the_process_is_killed_when_nobody_waits_any_more(
    open_on: Open, tmp_path: Path, dataset: Path
) -> None:
    preparations = open_on()
    asked = [asyncio.create_task(preparations.prepare(record(), dataset, DATA)) for _ in range(2)]
    reader = await one_child()
    asked[0].cancel()
    await asyncio.wait({asked[0]})
    assert reader.is_running() and asked[0].cancelled()
    asked[1].cancel()
    await asyncio.wait({asked[1]})
    assert asked[1].cancelled()
    assert not reader.is_running()
    assert partial(tmp_path) == []


async def test_closing_ends_the_work_and_tells_who_waits(open_on: Open, dataset: Path) -> None:
    preparations = open_on()
    asked = asyncio.create_task(preparations.prepare(record(), dataset, DATA))
    reader = await one_child()
    await preparations.close()
    assert not reader.is_running()
    with pytest.raises(TrainingUnavailable, match="shutting down"):
        await asked
    with pytest.raises(TrainingUnavailable, match="shutting down"):
        await preparations.prepare(record(), dataset, DATA)


async def test_at_most_two_processes_read_at_a_time(
    open_on: Open, tmp_path: Path, dataset: Path
) -> None:
    slow = interpreter(tmp_path, f"echo $$ >> {tmp_path}/started; sleep 1; exec false")
    preparations = open_on(python=slow)
    began_s = time.monotonic()
    results = await asyncio.gather(
        *(preparations.prepare(record(f"{i}" * 64), dataset, DATA) for i in range(5)),
        return_exceptions=True,
    )
    assert all(isinstance(result, TrainingUnavailable) for result in results)
    assert len((tmp_path / "started").read_text().splitlines()) == 5
    assert time.monotonic() - began_s >= 3


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo one; echo No module named trainer >&2; exit 1", "No module named trainer; tell"),
        ("exit 7", "it said nothing"),
        ("kill -9 $$", "signal 9 killed it, as the system does when memory is short"),
        ("printf '\\377\\n'; exit 1", "\ufffd"),
    ],
)
async def test_a_process_that_fails_is_told_by_its_last_line(
    open_on: Open, tmp_path: Path, dataset: Path, script: str, said: str
) -> None:
    preparations = open_on(python=interpreter(tmp_path, script))
    with pytest.raises(TrainingUnavailable) as caught:
        await preparations.prepare(record(), dataset, DATA)
    assert said in str(caught.value)


async def test_a_full_disk_is_told_as_one(open_on: Open, tmp_path: Path, dataset: Path) -> None:
    preparations = open_on(python=interpreter(tmp_path, f"exit {EXIT_STORAGE_FULL}"))
    with pytest.raises(StorageFull) as caught:
        await preparations.prepare(record(), dataset, DATA)
    assert is_storage_full(caught.value)


async def test_a_failure_is_not_remembered(open_on: Open, tmp_path: Path, dataset: Path) -> None:
    python = interpreter(tmp_path, "exit 1")
    preparations = open_on(python=python)
    for _ in range(2):
        with pytest.raises(TrainingUnavailable):
            await preparations.prepare(record(), dataset, DATA)
    report = '{"valid": false, "reasons": ["no line"]}'
    interpreter(tmp_path, f"echo '{report}' > $3/{REPORT_FILE}")
    found = await preparations.prepare(record(), dataset, DATA)
    with pytest.raises(DatasetInvalid, match="dataset 'letters': no line"):
        found.require_valid()


async def test_what_a_crash_left_is_swept_first(
    open_on: Open, tmp_path: Path, dataset: Path
) -> None:
    left = tmp_path / "prepared" / f"{'d' * 64}-0.partial-77"
    left.mkdir(parents=True)
    preparations = open_on(python=interpreter(tmp_path, "exit 1"))
    with pytest.raises(TrainingUnavailable):
        await preparations.prepare(record(), dataset, DATA)
    assert not left.exists()


async def test_a_process_ends_with_the_gateway_that_started_it(
    tiny: Path, tmp_path: Path, dataset: Path
) -> None:
    write_whole(tmp_path / PLAN_FILE, PreparePlan(dataset=str(dataset), model=str(tiny), data=DATA))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "trainer.prepare",
        str(tmp_path),
        stdin=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdin is not None
    process.stdin.close()  # as the kernel does for a gateway that was killed
    async with asyncio.timeout(SOON_S):
        assert await process.wait() == EXIT_ORPHANED


def test_only_a_valid_dataset_may_be_trained_on(tmp_path: Path) -> None:
    Prepared(tmp_path, DatasetReport(valid=True, rows=1), "letters").require_valid()
    with pytest.raises(DatasetInvalid, match="dataset 'letters': too bad; very") as caught:
        Prepared(
            tmp_path, DatasetReport(valid=False, reasons=("too bad", "very")), "letters"
        ).require_valid()
    assert caught.value.report.reasons == ("too bad", "very")
