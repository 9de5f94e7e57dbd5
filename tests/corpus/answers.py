"""Adapters that are well-formed, load, and are still not to be served: the probe's."""

from __future__ import annotations

from tests.corpus.broken import Kind, spoiled
from tests.corpus.draft import Draft, configure

HUGE = 1e30
"""A number in float32, but not squared."""


def swollen(draft: Draft) -> None:
    for name, tensor in draft.tensors.items():
        if "lora_A" in name:
            tensor.fill_(HUGE)


ANSWERS = spoiled(
    Kind.ANSWERS,
    {
        "answers-of-the-base-model": (configure(lora_alpha=1e-300), "it changes nothing"),
        "answers-in-nan": (swollen, "the model answers in NaN or infinity"),
    },
)
