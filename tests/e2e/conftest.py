"""Gateways for all tests that leave them serving: one of one shard, a scarce one, one of two."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from engine.models import resolve_model
from tests.collector import Collector
from tests.e2e.gateway_process import GatewayProcess, gateway_process
from tests.e2e.shard_calls import SPREAD, STALL_TIMEOUT_S
from tests.tiny_adapter import write_tiny_adapter


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model."""
    return resolve_model("tiny", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Adapters for the tiny model: two plain ones and an rsLoRA one of another rank."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "alpha": write_tiny_adapter(folder / "alpha", tiny_model, seed=1, rank=8),
        "beta": write_tiny_adapter(folder / "beta", tiny_model, seed=2, rank=8),
        "pirate": write_tiny_adapter(folder / "pirate", tiny_model, seed=3, rank=16, rslora=True),
    }


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Where the shared gateway sends its spans."""
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="session")
def gateway(
    adapters: Mapping[str, Path], collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayProcess]:
    """The shared gateway. Tests must leave it serving."""
    with gateway_process(
        tmp_path_factory.mktemp("gateway"),
        workers=2,
        adapters=adapters,
        extra=["--otlp-endpoint", collector.endpoint],
    ) as process:
        yield process


@pytest_asyncio.fixture(loop_scope="session")
async def channel(gateway: GatewayProcess) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to the shared gateway."""
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        yield channel


@pytest.fixture(scope="session")
def sources(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters for callers to name: `1` to `20`, of two ranks."""
    folder = tmp_path_factory.mktemp("sources")
    for number in range(1, 21):
        rank = 16 if number % 2 else 8
        write_tiny_adapter(folder / str(number), tiny_model, seed=number, rank=rank)
    return folder


@pytest.fixture(scope="session")
def scarce(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A shared gateway with two workers, which begins without adapters and has room for four,
    two of them in a batch, read by our thread. Each test has adapters of its own."""
    flags = ["--max-loras", "2", "--max-cpu-loras", "4", "--adapter-loader", "staged"]
    flags += ["--adapter-source-allow", str(sources)]
    with gateway_process(tmp_path_factory.mktemp("scarce"), workers=2, extra=flags) as process:
        yield process


@pytest.fixture(scope="session")
def two(
    adapters: Mapping[str, Path], sources: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayProcess]:
    """A shared gateway with two shards and two workers. Tests may kill a core, and must leave
    both shards serving."""
    served = {name: sources / name for name in SPREAD} | dict(adapters)
    folder = tmp_path_factory.mktemp("two")
    flags = ["--shards", "2", "--engine-stall-timeout-s", f"{STALL_TIMEOUT_S}"]
    with gateway_process(folder, workers=2, adapters=served, extra=flags) as process:
        yield process
