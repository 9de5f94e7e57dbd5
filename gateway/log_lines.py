"""How all processes of the gateway log."""

from __future__ import annotations

import logging


def configure_logging() -> None:
    """One line per event on stderr, in host and workers alike."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s"
    )
    for package in ("gateway", "engine", "trainer", "store"):
        logging.getLogger(package).setLevel(logging.INFO)
    for library in ("vllm", "torch", "torch._library.triton", "torch.utils._pytree", "torchao"):
        logging.getLogger(library).setLevel(logging.ERROR)
