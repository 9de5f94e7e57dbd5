"""The process that reads a dataset: lines in, rows and a report out.

    python -m trainer.prepare FOLDER

Reads `plan.json` in the folder, and writes `rows.parquet` and, last, `report.json` beside it. Its
memory does not grow with the file, but for 16 bytes a row. Exits with 0 also if the dataset is
not valid, which the report says; EXIT_STORAGE_FULL if the disk was full. It ends when its standard
input does, so that none is left when the gateway dies.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from array import array
from collections import Counter
from fractions import Fraction
from pathlib import Path

from trainer.chat_tokenizer import ChatTokenizer, TokenizerUnusable
from trainer.dataset_rows import DatasetRows, format_of
from trainer.failure import is_storage_full
from trainer.formats import BadLine
from trainer.lines import read_lines
from trainer.masks import MaskedRow
from trainer.prepare_plan import (
    EXIT_FAILED,
    EXIT_ORPHANED,
    EXIT_STORAGE_FULL,
    PLAN_FILE,
    PreparePlan,
)
from trainer.report import MAX_ISSUES, DatasetReport, LineIssue, LineIssueCode
from trainer.rows import REPORT_FILE, ROWS_FILE
from trainer.rows_file import RowsWriter
from trainer.run_folder import write_whole
from trainer.spec import DatasetFormat, DataSpec, OverlengthPolicy
from trainer.statistics import RowStatistics

NICENESS = 5
"""It shares the processor with serving: serving comes first."""

logger = logging.getLogger(__name__)


class Reading:
    """One dataset that is being read. Owns what was found so far."""

    def __init__(self, data: DataSpec, format: DatasetFormat | None) -> None:
        assert data.max_bad_ratio is not None
        self._data = data
        self._format = format
        # As it was written: the binary number nearest to 0.29 is below it.
        self._max_bad_ratio = Fraction(str(data.max_bad_ratio))
        self._total = 0
        self._bad = 0
        self._issues: list[LineIssue] = []
        self._counts = Counter[LineIssueCode]()
        self._overlength: list[int] = []
        self._overlength_rows = self._truncated = self._untrained = 0
        self._statistics = RowStatistics()

    def read(self, path: Path, rows: DatasetRows, writer: RowsWriter) -> None:
        """Take in every line. Raises OSError."""
        for number, line in enumerate(read_lines(path), start=1):
            self._total = number
            try:
                self._fit(number, line, rows, writer)
            except BadLine as error:
                self._note(number, error)

    def _fit(self, number: int, line: bytes | None, rows: DatasetRows, writer: RowsWriter) -> None:
        fit = rows.fit(line)
        if fit.row is None:
            self._overlength_rows += 1
            if len(self._overlength) < MAX_ISSUES:
                self._overlength.append(number)
        elif not fit.row.trained:
            self._untrained += 1
        else:
            self._truncated += bool(fit.turns_left_out)
            self._keep(number, fit.row, writer)

    def _keep(self, number: int, row: MaskedRow, writer: RowsWriter) -> None:
        ids = array("i", row.ids)
        writer.add(number, ids, array("i", row.labels))
        self._statistics.add(number, ids.tobytes(), len(ids), row.trained)

    def _note(self, number: int, error: BadLine) -> None:
        self._bad += 1
        self._counts[error.code] += 1
        if len(self._issues) < MAX_ISSUES:
            # The template's own words may hold what no JSON text can.
            message = error.message.encode(errors="backslashreplace").decode()
            self._issues.append(
                LineIssue(line=number, code=error.code, field=error.field, message=message)
            )

    def report(self) -> DatasetReport:
        """What was found."""
        refused = self._bad > self._max_bad_ratio * self._total
        duplicate_rows, duplicate_lines = self._statistics.duplicates()
        return DatasetReport(
            valid=not refused and self._statistics.rows > 0,
            reasons=tuple(self._reasons(refused)),
            format=self._format,
            total_lines=self._total,
            bad_lines=self._bad,
            issues=tuple(self._issues),
            issue_counts=dict(self._counts),
            rows=self._statistics.rows,
            overlength_rows=self._overlength_rows,
            overlength_lines=tuple(self._overlength),
            truncated_rows=self._truncated,
            duplicate_rows=duplicate_rows,
            duplicate_lines=duplicate_lines,
            untrained_rows=self._untrained,
            tokens=self._statistics.tokens(),
        )

    def _reasons(self, refused: bool) -> list[str]:
        bad, data = self._bad, self._data
        if not self._total:
            return ["the file has no line: upload one JSON object a line"]
        if refused:
            return [
                f"{bad} of {self._total} lines are bad, and at most "
                f"{float(self._max_bad_ratio * 100):g} % may be: correct them as the issues say, "
                "or raise max_bad_ratio"
            ]
        if self._statistics.rows:
            return []
        reasons = ["no row is left to train on"]
        if bad:
            reasons.append(f"{bad} of {self._total} lines are bad: correct them as the issues say")
        if self._overlength_rows:
            limit = (
                "max_row_tokens"
                if data.overlength is OverlengthPolicy.DROP
                else "max_sequence_tokens"
            )
            reasons.append(
                f"{self._overlength_rows} are too long: raise {limit}, or split them into several "
                "lines"
            )
        if self._untrained:
            reasons.append(
                f"{self._untrained} have no token that is trained: look at one with PreviewTokens"
            )
        return reasons


def prepare(plan: PreparePlan, folder: Path) -> DatasetReport:
    """Write the rows and the report of a dataset. Raises OSError if the disk fails."""
    path = Path(plan.dataset)
    try:
        report = _read(plan, path, folder)
    except TokenizerUnusable as error:
        report = _invalid(str(error))
    except FileNotFoundError:
        if path.exists():
            raise
        report = _invalid("the file is not there any more: delete the dataset, and upload it again")
    if not report.valid:
        (folder / ROWS_FILE).unlink(missing_ok=True)
    write_whole(folder / REPORT_FILE, report)
    return report


def _read(plan: PreparePlan, path: Path, folder: Path) -> DatasetReport:
    format = format_of(path, plan.data)
    rows = DatasetRows(ChatTokenizer(Path(plan.model)), plan.data, format)
    reading = Reading(plan.data, format)
    with RowsWriter(folder / ROWS_FILE) as writer:
        reading.read(path, rows, writer)
    return reading.report()


def _invalid(reason: str) -> DatasetReport:
    return DatasetReport(valid=False, reasons=(reason,))


def main(folder: Path) -> int:
    """Do what the folder's plan says; the process's exit code."""
    threading.Thread(target=_end_with_our_parent, daemon=True).start()
    os.nice(NICENESS)
    plan = PreparePlan.model_validate_json((folder / PLAN_FILE).read_bytes())
    try:
        prepare(plan, folder)
    except Exception as error:
        logger.exception("the dataset could not be read")
        return EXIT_STORAGE_FULL if is_storage_full(error) else EXIT_FAILED
    return 0


def _end_with_our_parent() -> None:
    """Nothing is ever sent: what can be read is that the other end is closed."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(EXIT_ORPHANED)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    sys.exit(main(Path(sys.argv[1])))
