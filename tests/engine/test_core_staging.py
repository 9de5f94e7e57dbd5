"""The core's side of a staged load: it answers once all workers have told that they are done."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.core_staging import gateway_commit, gateway_stage, gateway_unstage
from engine.staging import tell

SOON_S = 30.0


class FakeCore:
    """What the utilities use of an engine core: an executor over two workers."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.answers: dict[str, list[Any]] = {}
        self.fails = False
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(world_size=2))
        self.model_executor = SimpleNamespace(collective_rpc=self._call)

    def _call(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        if self.fails:
            raise RuntimeError("Executor failed.")
        self.calls.append((method, args))
        return self.answers.get(method, [None, None])

    @property
    def address(self) -> str:
        """Where the workers were told to answer."""
        return str(next(args[-1] for method, args in self.calls if method == "gateway_stage"))


@pytest.fixture
def core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCore:
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", str(tmp_path))
    return FakeCore()


def stage(core: FakeCore, lora_int_id: int) -> Future[float]:
    return gateway_stage(core, "acme/pirate@1", lora_int_id, "/adapters/1")


def answer(core: FakeCore, lora_int_id: int, seconds: float, error: str = "") -> None:
    tell(core.address, {"lora_int_id": lora_int_id, "error": error, "seconds": seconds})


def test_it_is_staged_once_the_last_worker_has_it(core: FakeCore) -> None:
    first, second = stage(core, 1), stage(core, 2)
    assert core.calls[0] == ("gateway_stage", ("acme/pirate@1", 1, "/adapters/1", core.address))
    answer(core, 1, 0.5)
    answer(core, 2, 0.1)
    answer(core, 2, 0.2)
    assert second.result(SOON_S) == 0.2
    assert not first.done()
    answer(core, 1, 0.25)
    assert first.result(SOON_S) == 0.5


def test_one_worker_that_fails_fails_it_after_the_others_are_done(core: FakeCore) -> None:
    staged, other = stage(core, 1), stage(core, 2)
    answer(core, 1, 0.5, "no such file")
    answer(core, 2, 0.5)
    answer(core, 2, 0.5)
    other.result(SOON_S)
    assert not staged.done(), "the other worker reads still"
    answer(core, 1, 0.5)
    with pytest.raises(RuntimeError, match="no such file"):
        staged.result(SOON_S)


def test_what_is_forgotten_or_could_not_begin_is_not_waited_for(core: FakeCore) -> None:
    forgotten, other = stage(core, 1), stage(core, 2)
    gateway_unstage(core, 1)
    assert core.calls[-1] == ("gateway_unstage", (1,))
    core.fails = True
    with pytest.raises(RuntimeError, match="Executor failed"):
        stage(core, 3)
    for lora_int_id in (1, 3, 2):
        answer(core, lora_int_id, 0.5)
        answer(core, lora_int_id, 0.5)
    assert other.result(SOON_S) == 0.5
    assert not forgotten.done()


def test_it_is_committed_once_all_workers_have_done_so(core: FakeCore) -> None:
    core.answers["gateway_commit"] = [True, False]
    assert gateway_commit(core, 1) is False
    core.answers["gateway_commit"] = [True, True]
    assert gateway_commit(core, 1) is True
    assert core.calls == [("gateway_commit", (1,))] * 2


def test_one_thread_waits_for_all(core: FakeCore) -> None:
    def named() -> int:
        return sum(thread.name == "gateway-staged" for thread in threading.enumerate())

    before = named()
    for lora_int_id in range(1, 9):
        stage(core, lora_int_id)
    assert named() == before + 1
