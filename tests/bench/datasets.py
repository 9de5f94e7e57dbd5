"""What reading a dataset costs: a million rows, in rows a second and in memory.

Makes a file of short chats, one in fifty of them bad. Reads it without tokenizing, and then as
jobs do, in the process that prepares rows: once the first tenth and once all of it. Both must take
the same memory, but for 16 bytes a row. Times are those of the processor. The exit code is 0
whenever it could measure: a missed target is printed as missed.

    python -m tests.bench.datasets
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from engine.models import resolve_model
from trainer.formats import BadLine, parse
from trainer.lines import read_lines
from trainer.prepare_plan import PLAN_FILE, PreparePlan
from trainer.report import DatasetReport
from trainer.rows import REPORT_FILE
from trainer.run_folder import write_whole
from trainer.spec import DatasetFormat, DataSpec

TARGET_LINES_PER_S = 20_000
TARGET_GROWTH_MIB = 64
"""From a tenth of the rows to all of them: 16 bytes a row, the report, and what allocators
round up."""
BAD_EVERY = 50
WORDS = ("ship", "sail", "tide", "north", "harbour", "rope", "wind", "chart", "gull", "anchor")
MIB = 1024**2


class Run(NamedTuple):
    """One process that prepared rows."""

    report: DatasetReport
    processor_s: float
    peak_bytes: int


def main() -> None:
    """Entry of the command."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="bench-datasets-", dir=options.folder) as name:
        folder = Path(name)
        model = resolve_model("tiny", folder)
        few, many = folder / "few.jsonl", folder / "many.jsonl"
        _write(few, options.rows // 10)
        _write(many, options.rows)
        size_mb = many.stat().st_size / 1e6
        print(f"{options.rows} rows, {size_mb:.0f} MB, one in {BAD_EVERY} bad")
        _measure_parsing(many)
        small, large = _prepare(few, model, folder / "a"), _prepare(many, model, folder / "b")
        rate = large.report.total_lines / large.processor_s
        print(f"  prepared, with tokens {rate:10.0f} rows/s")
        growth_mib = (large.peak_bytes - small.peak_bytes) / MIB
        verdict = "met" if growth_mib <= TARGET_GROWTH_MIB else "MISSED"
        print(
            f"  peak memory {small.peak_bytes / MIB:.0f} MiB of a tenth, "
            f"{large.peak_bytes / MIB:.0f} MiB of all; target at most {TARGET_GROWTH_MIB} MiB "
            f"more: {verdict}"
        )


def _measure_parsing(path: Path) -> None:
    begin_s, good, lines = time.process_time(), 0, 0
    for line in read_lines(path):
        lines += 1
        try:
            parse(line, DatasetFormat.CHAT)
        except BadLine:
            continue
        good += 1
    rate = lines / (time.process_time() - begin_s)
    verdict = "met" if rate >= TARGET_LINES_PER_S else "MISSED"
    print(f"  read, {good} good {rate:18.0f} rows/s; target {TARGET_LINES_PER_S}: {verdict}")


def _prepare(path: Path, model: Path, folder: Path) -> Run:
    folder.mkdir()
    data = DataSpec().resolved(max_model_len=2048)
    write_whole(folder / PLAN_FILE, PreparePlan(dataset=str(path), model=str(model), data=data))
    with subprocess.Popen(
        [sys.executable, "-m", "trainer.prepare", str(folder)], stdin=subprocess.PIPE
    ) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the process that reads the dataset ended with {process.returncode}")
    report = DatasetReport.model_validate_json((folder / REPORT_FILE).read_bytes())
    return Run(report, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def _write(path: Path, rows: int) -> None:
    chosen = random.Random(rows)
    with path.open("w", encoding="utf-8") as file:
        for row in range(rows):
            if row % BAD_EVERY == BAD_EVERY - 1:
                file.write(f'{{"id": {row}, "messages": [{{"role": "user", "content": "no"}}]}}\n')
                continue
            asked, answered = (" ".join(chosen.choices(WORDS, k=12)) for _ in range(2))
            file.write(
                f'{{"id": {row}, "messages": [{{"role": "user", "content": "{asked} {row}?"}}, '
                f'{{"role": "assistant", "content": "{answered}."}}]}}\n'
            )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.datasets", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="at least 1000")
    parser.add_argument("--folder", type=Path, help="on the disk to be used; default: /tmp")
    return parser.parse_args()


if __name__ == "__main__":
    main()
