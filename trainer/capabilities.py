"""What is installed for training, as the interpreter sees it that runs the training processes.

    python -m trainer.capabilities     prints an `Installed` as JSON

The libraries are looked up and not imported: that takes milliseconds and no memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.child import child_process
from trainer.errors import TrainingUnavailable
from trainer.spec import Backend

LIBRARIES: Mapping[Backend, tuple[str, ...]] = {
    Backend.UNSLOTH: ("unsloth", "unsloth_zoo", "trl", "peft", "bitsandbytes", "datasets"),
    Backend.PEFT: ("peft", "transformers", "accelerate", "bitsandbytes", "datasets"),
}
"""What each backend imports; the first backend that is complete is the default."""
REPORTED = ("accelerate", "bitsandbytes", "peft", "torch", "transformers", "trl", "unsloth")

QUERY_S = 30.0


class Installed(BaseModel):
    """What an interpreter can import."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backends: tuple[Backend, ...]
    """In the order of preference."""
    versions: Mapping[str, str]
    """Of the libraries that train, by name."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What can be trained here. What can be served, the served model tells."""

    backends: tuple[Backend, ...]
    """The first is what an unset one means."""
    devices: tuple[str, ...]
    versions: Mapping[str, str]
    bfloat16: bool
    """Whether all devices compute in it."""


def installed() -> Installed:
    """What this interpreter has."""
    versions = {}
    for name in REPORTED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Installed(
        backends=tuple(
            backend
            for backend, names in LIBRARIES.items()
            if all(importlib.util.find_spec(name) is not None for name in names)
        ),
        versions=versions,
    )


async def installed_for(python: str, environment: Mapping[str, str]) -> Installed:
    """What that interpreter has. Raises TrainingUnavailable if it does not run."""
    if python == sys.executable:
        return await asyncio.to_thread(installed)
    async with contextlib.AsyncExitStack() as owned:
        try:
            child = await owned.enter_async_context(
                child_process(
                    (python, "-m", __spec__.name),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env=environment,
                )
            )
        except OSError as error:
            raise TrainingUnavailable(
                f"the interpreter for training does not start ({error.strerror}): {python}"
            ) from error
        said: list[str] = []
        try:
            answer, complaint = await asyncio.to_thread(child.communicate, timeout=QUERY_S)
            said = complaint.decode(errors="replace").split("\n")
            return Installed.model_validate_json(answer)
        except (subprocess.TimeoutExpired, ValidationError) as error:
            last = next((line for line in reversed(said) if line.strip()), "it does not answer")
            raise TrainingUnavailable(
                f"the interpreter for training does not run this release's trainer package: {last}"
            ) from error


if __name__ == "__main__":
    print(installed().model_dump_json())
