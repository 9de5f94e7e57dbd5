"""`gateway serve` with engine arguments that the gateway has no flags for, for measurements.

    python tests/gpu/lean_gateway.py '{"load_format": "dummy"}' serve FLAGS

The first argument is JSON: names and values of vLLM's `AsyncEngineArgs`.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.core import EngineConfig, EngineOptions


def build_config(options: EngineOptions, more: Mapping[str, Any]) -> EngineConfig:
    """What the gateway builds of the options, with these arguments in place of its own."""
    with _arguments(more):
        config: EngineConfig = _BUILD(options)
        return config


@contextlib.contextmanager
def _arguments(more: Mapping[str, Any]) -> Iterator[None]:
    from vllm.engine import arg_utils

    original = arg_utils.AsyncEngineArgs

    def arguments(**own: Any) -> Any:
        given = {**own, **more}
        if "compilation_config" in given:
            from vllm.config import CompilationConfig

            given["compilation_config"] = CompilationConfig(**given["compilation_config"])
        if "profiler_config" in given:
            from vllm.config import ProfilerConfig

            given["profiler_config"] = ProfilerConfig(**given["profiler_config"])
        return original(**given)

    arg_utils.AsyncEngineArgs = arguments  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        arg_utils.AsyncEngineArgs = original  # type: ignore[misc]


def _original() -> Any:
    from engine.core import EngineOptions

    return EngineOptions.build_config


_BUILD = _original()


# Engine cores and workers are spawned, and each child imports this module again.
if __name__ == "__main__":
    from engine.core import EngineOptions as Options
    from gateway.cli import app

    MORE = json.loads(sys.argv.pop(1))
    Options.build_config = lambda self: build_config(self, MORE)  # type: ignore[method-assign]
    app()
