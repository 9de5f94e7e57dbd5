"""Good adapters of which the caller says what is not true."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from engine.base_model import fingerprints
from tests.corpus.broken import Broken, Build, Kind, Offer
from tests.corpus.draft import good_draft

OTHER_SHA256 = "0" * 64


def claimed(**fields: Any) -> Build:
    """A good adapter, offered with these fields of the request."""

    def build(folder: Path, model: Path) -> Offer:
        good_draft(model).write(folder)
        return Offer(str(folder), **fields)

    return build


def trained_on(**others: str) -> Build:
    """A good adapter, offered with the served model's fingerprints but for `others`."""

    def build(folder: Path, model: Path) -> Offer:
        good_draft(model).write(folder)
        return Offer(str(folder), fingerprints=dataclasses.asdict(fingerprints(model)) | others)

    return build


def of_another(field: str) -> str:
    return rf"fingerprints\.{field} is 0{{64}}, and the served model's is [0-9a-f]{{64}}: train"


CLAIMS = (
    Broken(
        "claim-sha256",
        Kind.CLAIM,
        claimed(expected_sha256=OTHER_SHA256),
        r"has the sha256 [0-9a-f]{64}, and expected_sha256 is 0{64}",
    ),
    *(
        Broken(
            f"claim-{field.replace('_', '-')}",
            Kind.CLAIM,
            trained_on(**{field: OTHER_SHA256}),
            of_another(field),
        )
        for field in (
            *("config_sha256", "weights_sha256", "tokenizer_sha256", "chat_template_sha256"),
        )
    ),
    Broken(
        "claim-all-fingerprints",
        Kind.CLAIM,
        trained_on(config_sha256=OTHER_SHA256, tokenizer_sha256=OTHER_SHA256),
        of_another("tokenizer_sha256"),
        findings=2,
    ),
)
