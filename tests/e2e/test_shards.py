"""Two real engines behind one gateway: who answers what, and who goes on when one dies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.e2e.gateway_process import GatewayProcess, gateway_process
from tests.e2e.shard_calls import NAMES, ask, ask_often, homes

SPREAD = ("8", "9", "10", "11", "14", "17")
"""Adapters of the folder of sources; the ring puts some on each shard."""


@pytest.fixture(scope="module")
def two(
    adapters: Mapping[str, Path], sources: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayProcess]:
    """A gateway with two shards and two workers. Tests must leave both serving."""
    served = {name: sources / name for name in SPREAD} | dict(adapters)
    folder = tmp_path_factory.mktemp("two")
    with gateway_process(folder, workers=2, adapters=served, extra=["--shards", "2"]) as process:
        yield process


async def test_adapters_are_spread_over_the_shards_as_the_ring_says(two: GatewayProcess) -> None:
    homes_of = homes(SPREAD)
    assert set(homes_of.values()) == set(NAMES)
    for adapter, home in homes_of.items():
        answers = await ask_often(two.address, adapter, 4)  # over both workers
        assert {answer.served_by.shard for answer in answers} == {home}


async def test_the_base_model_is_on_both_shards_and_answers_alike(two: GatewayProcess) -> None:
    answers = await ask_often(two.address, "", 16)
    assert {answer.served_by.shard for answer in answers} == set(NAMES)
    assert len({answer.completions[0].text for answer in answers}) == 1


async def test_two_shards_answer_as_one_does(
    two: GatewayProcess, gateway: GatewayProcess, adapters: Mapping[str, Path]
) -> None:
    for adapter in ("", *adapters):
        one, other = [
            (await ask(address, adapter)).completions[0].text
            for address in (two.address, gateway.address)
        ]
        assert one == other, adapter or "the base model"


async def test_metrics_tell_the_shards_apart(
    two: GatewayProcess, adapters: Mapping[str, Path]
) -> None:
    homes_of = homes([*SPREAD, *adapters])
    for shard in NAMES:
        living = [adapter for adapter, home in homes_of.items() if home == shard]
        assert two.metrics("adapters_resident", shard=shard) == [len(living)]
        for name in ("vllm:num_requests_running", "vllm:kv_cache_usage_perc"):
            assert len(two.metrics(name, shard=shard)) == 1, "one series for each shard"
        before = sum(two.metrics("vllm:generation_tokens_total", shard=shard))
        planned = sum(two.metrics("gateway_placements_total", shard=shard, reason="planned"))
        for adapter in living:
            await ask(two.address, adapter, max_tokens=5)
        after = sum(two.metrics("vllm:generation_tokens_total", shard=shard))
        assert after - before == 5 * len(living)
        assert sum(
            two.metrics("gateway_placements_total", shard=shard, reason="planned")
        ) == planned + len(living)
        assert two.metrics("gateway_client_slots_left", shard=shard)
