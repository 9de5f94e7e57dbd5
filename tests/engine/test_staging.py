"""Adapters that are staged lie in vLLM's slots as if vLLM had loaded them, on its own layers."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.models import resolve_model
from tests.engine.adapter_kinds import KINDS, WEIGHTS, changed
from tests.engine.lora_layers import PLACES, SLOTS, empty, in_slot, lora_layers, manager_of, request
from tests.tiny_adapter import write_tiny_adapter

if TYPE_CHECKING:
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    from engine.staging import Staging

SOON_S = 30.0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model("tiny", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def layers(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LRUCacheWorkerLoRAManager]:
    with lora_layers(tiny, tmp_path_factory.mktemp("layers")) as loras:
        yield loras


@pytest.fixture
def loras(layers: LRUCacheWorkerLoRAManager) -> LRUCacheWorkerLoRAManager:
    """The layers without an adapter, and with no batch that runs."""
    empty(layers)
    return layers


@pytest.fixture
def staging(loras: LRUCacheWorkerLoRAManager, monkeypatch: pytest.MonkeyPatch) -> Staging:
    """Nothing is moved off the processors of this process."""
    from engine import staging

    monkeypatch.setattr(staging, "leave_processors_that_compute", lambda: None)
    return staging.Staging(loras)


@pytest.fixture
def spared(staging: Staging) -> Staging:
    """As on a GPU, with a spare slot; here it lies in the same memory as all others."""
    return type(staging)(staging._loras, spare=True)


@pytest.fixture
def plain(tiny: Path, tmp_path: Path) -> Path:
    return write_tiny_adapter(tmp_path / "plain", tiny, seed=1, rank=16)


@pytest.fixture
def core(tmp_path: Path) -> Iterator[socket.socket]:
    """Where the core would hear of the end of a read."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "core"))
        listener.settimeout(SOON_S)
        yield listener


def read(staging: Staging, lora_int_id: int, folder: Path, core: socket.socket) -> dict[str, Any]:
    """Stage an adapter. What the core is told."""
    staging.stage(request(lora_int_id, folder), core.getsockname())
    answer: dict[str, Any] = json.loads(core.recv(2**16))
    assert answer["lora_int_id"] == lora_int_id
    return answer


def load(staging: Staging, lora_int_id: int, folder: Path, core: socket.socket) -> int:
    """Stage and commit one. How many calls that took."""
    assert read(staging, lora_int_id, folder, core)["error"] == ""
    calls = 1
    while not staging.commit(lora_int_id):
        calls += 1
    return calls


def runs_on(loras: LRUCacheWorkerLoRAManager, *lora_int_ids: int) -> None:
    """A step computes with these."""
    from vllm.lora.layers import LoRAMapping

    mapping = LoRAMapping(lora_int_ids, lora_int_ids, is_prefill=True)
    asked = {request(lora_int_id, Path("/none")) for lora_int_id in lora_int_ids}
    loras.set_active_adapters(asked, mapping)


@pytest.mark.parametrize("by", ["parts", "a spare slot"])
@pytest.mark.parametrize("rank", [8, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_slot_holds_what_vllm_would_have_put_there(
    kind: str,
    rank: int,
    by: str,
    loras: LRUCacheWorkerLoRAManager,
    staging: Staging,
    spared: Staging,
    core: socket.socket,
    plain: Path,
    tiny: Path,
    tmp_path: Path,
) -> None:
    folder = KINDS[kind](write_tiny_adapter(tmp_path / "it", tiny, seed=2, rank=rank), tiny)
    under_test = staging if by == "parts" else spared
    manager = manager_of(loras)
    for dirty in (91, 92):  # all slots had another adapter, of the highest rank
        load(under_test, dirty, plain, core)
    calls = load(under_test, 1, folder, core)
    ours = in_slot(manager, 1)
    empty(loras)
    for dirty in (91, 92):
        loras.add_adapter(request(dirty, plain))
    loras.add_adapter(request(2, folder))
    vllms = in_slot(manager, 2)
    assert any(tensor.any() for tensor in vllms.values())
    assert ours.keys() == vllms.keys()
    assert [name for name in ours if not torch.equal(ours[name], vllms[name])] == []
    if by == "a spare slot":
        assert calls == 1 and under_test._spare is not None


def test_a_spare_slot_serves_one_adapter_after_the_other(
    loras: LRUCacheWorkerLoRAManager,
    spared: Staging,
    core: socket.socket,
    plain: Path,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second is read before the first is committed, and has its slot filled by parts."""
    manager = manager_of(loras)
    other = write_tiny_adapter(tmp_path / "other", tiny, seed=5, rank=8)
    monkeypatch.setattr("engine.staging.FILL_BUDGET_S", 0.0)
    assert read(spared, 1, plain, core)["error"] == ""
    assert read(spared, 2, other, core)["error"] == ""
    assert not spared.commit(2)
    assert spared.commit(1), "at once"
    while not spared.commit(2):
        pass
    first, second = in_slot(manager, 1), in_slot(manager, 2)
    # Dropped after it was read, and before: the spare slot is free again.
    assert read(spared, 3, plain, core)["error"] == ""
    spared.drop(3)
    spared.stage(request(4, plain), core.getsockname())
    spared.stage(request(5, other), core.getsockname())
    spared.drop(4)
    spared.drop(5)
    for _ in range(2):
        core.recv(2**16)
    assert load(spared, 6, other, core) == 1
    spared.rest()
    assert load(spared, 9, plain, core) == 1, "another one is made"
    empty(loras)
    loras.add_adapter(request(7, plain))
    loras.add_adapter(request(8, other))
    assert all(torch.equal(first[name], each) for name, each in in_slot(manager, 7).items())
    assert all(torch.equal(second[name], each) for name, each in in_slot(manager, 8).items())


def test_without_memory_for_a_spare_slot_slots_are_filled_by_parts(
    loras: LRUCacheWorkerLoRAManager,
    spared: Staging,
    core: socket.socket,
    plain: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_memory(manager: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("engine.staging.SpareSlot", no_memory)
    monkeypatch.setattr("engine.staging.FILL_BUDGET_S", 0.0)
    assert load(spared, 1, plain, core) > 1
    assert loras.list_adapters() == {1}


def test_what_vllm_copies_later_by_itself_is_the_same(
    loras: LRUCacheWorkerLoRAManager, staging: Staging, core: socket.socket, plain: Path
) -> None:
    """In a step, once the adapter has lost its slot and is in host memory only."""
    manager = manager_of(loras)
    load(staging, 1, changed(plain, use_rslora=True), core)
    ours = in_slot(manager, 1)
    load(staging, 2, plain, core)
    load(staging, 3, plain, core)
    assert 1 not in manager.lora_index_to_id and loras.list_adapters() == {1, 2, 3}
    runs_on(loras, 1)
    again = in_slot(manager, 1)
    assert all(torch.equal(ours[name], again[name]) for name in ours)


# --- slots ------------------------------------------------------------------


def test_a_slot_is_filled_by_parts_and_nothing_is_named_before(
    loras: LRUCacheWorkerLoRAManager,
    staging: Staging,
    core: socket.socket,
    plain: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manager = manager_of(loras)
    load(staging, 1, plain, core)
    monkeypatch.setattr("engine.staging.FILL_BUDGET_S", 0.0)
    assert read(staging, 2, plain, core)["error"] == ""
    for _ in manager.modules:
        assert not staging.commit(2)
        assert loras.list_adapters() == {1}
        runs_on(loras, 1)  # steps go on
    assert staging.commit(2)
    assert loras.list_adapters() == {1, 2}
    assert staging.commit(2), "another worker of the engine may need longer"
    assert any(tensor.any() for tensor in in_slot(manager, 2).values())


def test_a_slot_that_a_step_needs_is_let_go(
    loras: LRUCacheWorkerLoRAManager,
    staging: Staging,
    core: socket.socket,
    plain: Path,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manager = manager_of(loras)
    other = write_tiny_adapter(tmp_path / "other", tiny, seed=5, rank=8)
    load(staging, 1, plain, core)
    load(staging, 2, other, core)
    whole = in_slot(manager, 2)
    runs_on(loras, 2)  # the slot of 1 is the one that is set aside
    monkeypatch.setattr("engine.staging.FILL_BUDGET_S", 0.0)
    assert read(staging, 3, plain, core)["error"] == ""
    assert not staging.commit(3)
    assert manager.lora_index_to_id.count(3) == 1
    runs_on(loras, 1, 2)
    before = in_slot(manager, 1)
    assert staging.commit(3), "it is in host memory, and vLLM finds it there"
    assert 3 not in manager.lora_index_to_id and loras.list_adapters() == {1, 2, 3}
    after = in_slot(manager, 1)
    assert all(torch.equal(before[name], after[name]) for name in before)
    runs_on(loras, 2)
    runs_on(loras, 3)
    assert all(torch.equal(before[name], each) for name, each in in_slot(manager, 3).items())
    assert all(torch.equal(whole[name], each) for name, each in in_slot(manager, 2).items())


def test_no_slot_is_taken_from_a_batch_that_runs(
    loras: LRUCacheWorkerLoRAManager, staging: Staging, core: socket.socket, plain: Path
) -> None:
    manager = manager_of(loras)
    for number in range(1, SLOTS + 1):
        load(staging, number, plain, core)
    runs_on(loras, *range(1, SLOTS + 1))
    load(staging, 9, plain, core)
    assert {*manager.lora_index_to_id} == {*range(1, SLOTS + 1)}
    assert 9 in loras.list_adapters()


def test_the_one_that_was_used_least_recently_leaves_a_full_cache(
    loras: LRUCacheWorkerLoRAManager, staging: Staging, core: socket.socket, plain: Path
) -> None:
    """The host never lets it come to that."""
    for number in range(1, PLACES + 1):
        load(staging, number, plain, core)
    runs_on(loras, 1)
    load(staging, 9, plain, core)
    assert loras.list_adapters() == {1, 9, *range(3, PLACES + 1)}


# --- what goes wrong --------------------------------------------------------


def test_files_that_are_gone_or_broken_are_told_in_vllms_words(
    loras: LRUCacheWorkerLoRAManager,
    staging: Staging,
    core: socket.socket,
    plain: Path,
    tmp_path: Path,
) -> None:
    for folder in (tmp_path / "gone", plain):
        if folder is plain:
            (plain / WEIGHTS).write_bytes(b"\0" * 100)
        with pytest.raises(Exception) as vllms:
            loras.add_adapter(request(7, folder))
        assert read(staging, 7, folder, core)["error"] == str(vllms.value)
        with pytest.raises(KeyError):
            staging.commit(7)
    assert loras.list_adapters() == set() and not any(manager_of(loras).lora_index_to_id)


def test_weights_that_do_not_fit_the_spare_slot_leave_no_trace(
    loras: LRUCacheWorkerLoRAManager,
    spared: Staging,
    core: socket.socket,
    plain: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.staging.FILL_BUDGET_S", 0.0)
    tensors = load_file(plain / WEIGHTS)
    wide = {name: torch.ones(2 * each.shape[0], each.shape[1]) for name, each in tensors.items()}
    good = plain.rename(plain.with_name("good"))
    save_file(wide, shutil.copytree(good, plain) / WEIGHTS)
    assert "must match" in read(spared, 1, plain, core)["error"]
    with pytest.raises(KeyError):
        spared.commit(1)
    assert not len(manager_of(loras)) and not any(manager_of(loras).lora_index_to_id)
    assert load(spared, 2, good, core) == 1


def test_weights_that_do_not_fit_leave_no_trace(
    loras: LRUCacheWorkerLoRAManager,
    staging: Staging,
    core: socket.socket,
    plain: Path,
    tiny: Path,
    tmp_path: Path,
) -> None:
    good = write_tiny_adapter(tmp_path / "good", tiny, seed=3, rank=8)
    tensors = load_file(plain / WEIGHTS)
    name = next(name for name in tensors if "layers.3" in name and "down_proj.lora_B" in name)
    save_file(tensors | {name: torch.ones(2 * tensors[name].shape[0], 16)}, plain / WEIGHTS)
    assert read(staging, 1, plain, core)["error"] == ""
    with pytest.raises(RuntimeError):
        while not staging.commit(1):
            pass
    with pytest.raises(KeyError):
        staging.commit(1)
    manager = manager_of(loras)
    assert loras.list_adapters() == set() and not any(manager.lora_index_to_id)
    load(staging, 2, good, core)
    ours = in_slot(manager, 2)
    empty(loras)
    loras.add_adapter(request(3, good))
    assert all(torch.equal(ours[name], each) for name, each in in_slot(manager, 3).items())


def test_one_that_is_dropped_is_forgotten_at_any_time(
    loras: LRUCacheWorkerLoRAManager,
    staging: Staging,
    core: socket.socket,
    plain: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.staging.FILL_BUDGET_S", 0.0)
    manager = manager_of(loras)
    # Before it is read: the thread reads one after the other.
    staging.stage(request(1, plain), core.getsockname())
    staging.stage(request(2, plain), core.getsockname())
    staging.drop(2)
    assert [json.loads(core.recv(2**16))["lora_int_id"] for _ in range(2)] == [1, 2]
    with pytest.raises(KeyError):
        staging.commit(2)
    # While its slot is filled.
    assert not staging.commit(1)
    staging.drop(1)
    with pytest.raises(KeyError):
        staging.commit(1)
    assert not any(manager.lora_index_to_id) and not len(manager)
    # What is committed stays.
    monkeypatch.setattr("engine.staging.FILL_BUDGET_S", SOON_S)
    load(staging, 3, plain, core)
    staging.drop(3)
    assert loras.list_adapters() == {3} and 3 in manager.lora_index_to_id


def test_a_core_that_is_gone_ends_no_reads(
    staging: Staging, core: socket.socket, plain: Path, tmp_path: Path
) -> None:
    staging.stage(request(1, plain), str(tmp_path / "nobody"))
    assert read(staging, 2, plain, core)["error"] == ""
    while not staging.commit(1):
        pass
