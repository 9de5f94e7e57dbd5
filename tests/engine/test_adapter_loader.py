"""The host's side of a load, by either loader."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from engine.adapter_loader import LoadPhase, StagedLoader, VllmLoader
from engine.errors import ShardUnavailable
from engine.liveness import Liveness

LORA: Any = SimpleNamespace(lora_name="acme/pirate@1", lora_int_id=7, lora_path="/adapters/1")


class Core:
    """Answers utilities, and says which were called."""

    def __init__(self, commits: int = 1) -> None:
        self.called: list[str] = []
        self.fails: dict[str, Exception] = {}
        self._commits = commits
        self.engine_core = self

    async def call_utility_async(self, utility: str, *arguments: Any) -> Any:
        self.called.append(utility)
        if (error := self.fails.get(utility)) is not None:
            raise error
        if utility == "gateway_stage":
            assert arguments == ("acme/pirate@1", 7, "/adapters/1")
            return 0.1
        assert arguments == (7,)
        self._commits -= 1
        return not self._commits

    async def add_lora(self, lora: Any) -> bool:
        assert lora is LORA
        self.called.append("add_lora")
        return True

    async def remove_lora(self, lora_int_id: int) -> bool:
        assert lora_int_id == 7
        self.called.append("remove_lora")
        return True


def staged(core: Any) -> StagedLoader:
    vllms = VllmLoader(core, Liveness("shard-0"), 30.0)
    return StagedLoader(core, core.call_utility_async, vllms)


async def test_a_staged_load_is_read_and_then_committed_by_parts() -> None:
    core = Core(commits=3)
    times = await staged(core).load(LORA)
    assert core.called == ["gateway_stage", *["gateway_commit"] * 3]
    assert {*times} == {LoadPhase.READ, LoadPhase.COMMIT} and min(times.values()) >= 0.0


@pytest.mark.parametrize("utility", ["gateway_stage", "gateway_commit"])
async def test_what_the_core_answers_is_raised(utility: str) -> None:
    core = Core(commits=3)
    core.fails[utility] = ShardUnavailable("shard-0")
    with pytest.raises(ShardUnavailable):
        await staged(core).load(LORA)
    assert core.called[-1] == utility


async def test_after_a_failure_vllm_tries_once_itself() -> None:
    core = Core(commits=2)
    loader = staged(core)
    core.fails["gateway_commit"] = RuntimeError("no kernel image is available")
    with pytest.raises(RuntimeError, match="no kernel image"):
        await loader.load(LORA)
    core.called.clear()
    assert {*await loader.load(LORA)} == {LoadPhase.COMMIT}
    assert core.called == ["add_lora"]
    core.called.clear()
    core.fails.clear()
    await loader.load(LORA)
    assert core.called[0] == "gateway_stage", "and the next one is staged again"


async def test_a_core_that_does_not_answer_is_no_reason_to_load_otherwise() -> None:
    core = Core(commits=1)
    loader = staged(core)
    core.fails["gateway_stage"] = ShardUnavailable("shard-0")
    with pytest.raises(ShardUnavailable):
        await loader.load(LORA)
    core.fails.clear()
    await loader.load(LORA)
    assert "add_lora" not in core.called


async def test_what_is_left_of_a_staged_load_is_dropped_wherever_it_is() -> None:
    core = Core()
    await staged(core).drop(7)
    assert core.called == ["gateway_unstage", "remove_lora"]


async def test_vllms_own_load_is_one_call() -> None:
    core: Any = Core()
    loader = VllmLoader(core, Liveness("shard-0"), 30.0)
    assert {*await loader.load(LORA)} == {LoadPhase.COMMIT}
    await loader.drop(7)
    assert core.called == ["add_lora", "remove_lora"]


async def test_vllms_own_load_ends_with_the_core() -> None:
    core: Any = Core()
    never = asyncio.Event()

    async def add_lora(lora: Any) -> bool:
        return await never.wait()

    core.add_lora = add_lora
    liveness = Liveness("shard-0")
    asyncio.get_running_loop().call_soon(liveness.declare_dead)
    with pytest.raises(ShardUnavailable):
        await VllmLoader(core, liveness, 30.0).load(LORA)
