"""Prepared rows: token ids and what is trained on, as the training process reads them.

A folder, made whole under another name and renamed: `rows.parquet` with the columns below, and
`report.json`, a `trainer.report.DatasetReport`. Both backends read the same rows, so they train
on the same masks in the same order.

    line       int64         of the dataset's file, from 1
    input_ids  list<int32>
    labels     list<int32>   the id where it is trained on, else IGNORED
"""

from __future__ import annotations

IGNORED = -100
"""The label of a token that is no part of the loss (torch.nn.CrossEntropyLoss)."""
ROWS_FILE = "rows.parquet"
REPORT_FILE = "report.json"
