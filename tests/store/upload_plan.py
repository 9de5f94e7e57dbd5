"""One upload to be sent, whole or in pieces."""

from __future__ import annotations

import hashlib
from pathlib import Path

from store.uploads import UploadPlan, UploadStore

WEIGHTS = bytes(range(256)) * 40
PLAN = UploadPlan(
    upload_id="Night-run.1",
    adapter="sql",
    adapter_config=b'{"r": 8}',
    weights_size_bytes=len(WEIGHTS),
    weights_sha256=hashlib.sha256(WEIGHTS).hexdigest(),
    labels={"team": "search"},
    fingerprints={"config_sha256": "0" * 64},
)
TENANT = "acme"


def folder(tmp_path: Path) -> Path:
    return tmp_path / "uploads" / TENANT / PLAN.upload_id


def send(store: UploadStore, begin: int, end: int) -> None:
    with store.open(TENANT, PLAN) as opened:
        opened.write(begin, WEIGHTS[begin:end])


def send_all(store: UploadStore, plan: UploadPlan = PLAN) -> Path:
    with store.open(TENANT, plan) as opened:
        opened.write(opened.offset, WEIGHTS[opened.offset :])
        return opened.finish()


def offset(store: UploadStore) -> int:
    return store.find(TENANT, PLAN.upload_id).offset
