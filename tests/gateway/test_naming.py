"""Names reach the workers before the calls do, and follow the traffic."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client import REGISTRY

from engine.pool import ServedAdapter, ServedView
from engine.ring import AdapterKey
from engine.split import Split
from gateway import adapter_labels
from gateway.messages import Ask, NameAdapters, Question, ShowAdapter
from gateway.naming import Naming
from gateway.processes import Processes
from store.records import Arm
from tests.gateway.scripted_worker import ScriptedWorker, serving_fleet

ALL = ServedAdapter(Split([Arm(1, 1)]), (1,))
NONE = ServedAdapter(Split([]), ())


def key(adapter: str) -> AdapterKey:
    return AdapterKey("acme", adapter)


def view_of(*adapters: str) -> ServedView:
    view = ServedView()
    for adapter in adapters:
        view.show("acme", adapter, ALL)
    view.show("acme", "never-ready", NONE)
    return view


def followed(worker: ScriptedWorker, question: Question) -> Any:
    return None


def heard(worker: ScriptedWorker) -> list[object]:
    """Names and adapters, in the order in which they came."""
    found: list[object] = []
    for message in worker.heard:
        if isinstance(message, NameAdapters):
            found.append({named.adapter for named in message.named})
        elif isinstance(message, Ask) and isinstance(message.question, ShowAdapter):
            found.append(message.question.adapter)
    return found


def dropped() -> float:
    labels = {"reason": "rank"}
    return REGISTRY.get_sample_value("gateway_series_dropped_total", labels) or 0.0


async def test_a_name_is_there_before_its_adapter_in_every_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving_fleet(monkeypatch, 2, followed) as (fleet, workers):
        naming = Naming(dict, Processes(fleet), fleet)
        naming.open(view_of("a"))
        assert naming.named == {key("a")}, "for workers that join"
        await naming.show("acme", "b", ALL)
        await naming.show("acme", "b", ALL)
        await naming.show("acme", "b", NONE)
        for worker in workers:
            assert heard(worker) == [{"a", "b"}, "b", "b", {"a"}, "b"]


async def test_names_follow_the_traffic_and_what_is_not_named_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adapter_labels, "MAX_NAMED", 2)
    monkeypatch.setattr("gateway.naming.INTERVAL_S", 0.01)
    shares = {key("c"): 0.5, key("a"): 0.3, key("b"): 0.1}
    async with serving_fleet(monkeypatch, 1, followed) as (fleet, workers):
        looks: list[float] = []

        def look() -> dict[AdapterKey, float]:
            looks.append(dropped())
            return shares

        naming = Naming(look, Processes(fleet), fleet)
        naming.open(view_of("a", "b", "c"))
        assert naming.named == set()
        before = dropped()
        running = asyncio.create_task(naming.run())
        async with asyncio.timeout(10):
            while not heard(workers[0]):
                await asyncio.sleep(0.01)
        assert naming.named == {key("a"), key("c")}
        async with asyncio.timeout(10):
            while len(looks) < 5:
                await asyncio.sleep(0.01)
        shares = {key("b"): 0.9, key("a"): 0.05, key("c"): 0.01}
        async with asyncio.timeout(10):
            while len(heard(workers[0])) < 2:
                await asyncio.sleep(0.01)
        running.cancel()
        assert heard(workers[0]) == [{"a", "c"}, {"a", "b"}], "told when it changes alone"
        assert dropped() == before + 2, "first b, then c"
