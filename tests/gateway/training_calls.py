"""What tests of the Training service ask: a dataset of one row, uploads, a job's spec."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from engine.base_model import BaseModules
from lora_gateway.v1 import training_pb2 as pb

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
BASE = BaseModules(
    {
        **{f"model.layers.0.self_attn.{name}": (256, 256) for name in MODULES},
        **{f"model.layers.0.mlp.{name}_proj": (512, 256) for name in ("gate", "up", "down")},
    },
    {"model.embed_tokens": (256, 1024)},
)
ROW = {
    "messages": [
        {"role": "user", "content": "Who keeps the light?"},
        {"role": "assistant", "content": "Old Marta does."},
    ]
}
CONTENT = json.dumps(ROW).encode() + b"\n"


def header(content: bytes = CONTENT, **fields: Any) -> pb.DatasetHeader:
    """Of an upload of that content, but for `fields`."""
    known = {
        "upload_id": "up-1",
        "dataset": "faq",
        "size_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    return pb.DatasetHeader(**{**known, **fields})


def sent(
    head: pb.DatasetHeader, content: bytes = CONTENT, offset: int = 0, size: int = 1000
) -> Iterable[pb.UploadDatasetRequest]:
    """The messages of an upload from `offset` on."""
    yield pb.UploadDatasetRequest(header=head)
    for start in range(offset, len(content), size):
        request = pb.UploadDatasetRequest()
        request.chunk.offset = start
        request.chunk.data = content[start : start + size]
        yield request


async def upload(stub: Any, content: bytes = CONTENT, **fields: Any) -> pb.Dataset:
    answer = await stub.UploadDataset(sent(header(content, **fields), content))
    return answer.dataset  # type: ignore[no-any-return]


def spec(**fields: Any) -> pb.JobSpec:
    return pb.JobSpec(**{"dataset": "faq", "adapter": "support", **fields})
