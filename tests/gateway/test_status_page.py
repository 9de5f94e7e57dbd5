"""The page in a real browser: texts of others stay texts, and a lost connection is told and made
again. What a real gateway shows is in tests/e2e/test_status_page.py."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.http_endpoint import HttpEndpoint
from gateway.status import Phase, ResidentStatus, Status, TurnStatus
from gateway.status_feed import StatusFeed
from tests.chromium import Tab, find_chromium, open_tab
from tests.gateway.statuses import ADAPTER, EVENT, JOB, NOW_S, SHARD, status

CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here"),
    pytest.mark.timeout(300),
]
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><b>&amp;\u2028"
LIVE = "document.getElementById('link').textContent === 'live'"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the metrics of all processes, of which there are none."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))


@contextlib.asynccontextmanager
async def gateway(
    shown: dict[str, Any], address: str = "127.0.0.1:0", max_viewers: int = 2
) -> AsyncIterator[str]:
    """The address of an endpoint that shows a status with these fields."""

    async def read() -> Status:
        return status(**shown)

    feed = StatusFeed(read, interval_s=0.05, heartbeat_s=0.2, max_viewers=max_viewers)
    endpoint = HttpEndpoint(address, feed, lambda: Phase.SERVING)
    await endpoint.start()
    try:
        yield endpoint.address
    finally:
        await feed.close()
        await endpoint.close()


@contextlib.asynccontextmanager
async def browser(address: str) -> AsyncIterator[Tab]:
    assert CHROMIUM is not None
    async with open_tab(CHROMIUM, f"http://{address}/") as tab:
        yield tab


async def texts(tab: Tab, selector: str) -> list[str]:
    found: list[str] = await tab.evaluate(
        f"[...document.querySelectorAll('{selector}')].map((node) => node.textContent)"
    )
    return found


async def test_texts_of_others_are_shown_as_they_are_wherever_they_stand() -> None:
    resident = ResidentStatus(HOSTILE, 1, 0.0, 0.2, 1, None)
    guarded = replace(ADAPTER.arms[0], guard=HOSTILE)
    fields = ("name", "adapter", "state", "device", "message", "publication")
    texts_of_job: dict[str, Any] = dict.fromkeys(fields, HOSTILE)
    shown: dict[str, Any] = {
        "model": HOSTILE,
        "version": HOSTILE,
        "workers": {HOSTILE: 1},
        "shards": (
            replace(
                SHARD,
                name=HOSTILE,
                state=HOSTILE,
                reason=HOSTILE,
                residents=(resident,),
                turns=(TurnStatus(HOSTILE, 1, HOSTILE, 0.0),),
            ),
        ),
        "adapters": (replace(ADAPTER, name=HOSTILE, shards=(HOSTILE,), arms=(guarded,)),),
        "jobs": (replace(JOB, **texts_of_job),),
        "events": (replace(EVENT, subject=HOSTILE, text=HOSTILE),),
    }
    async with gateway(shown) as address, browser(address) as tab:
        await tab.wait_for(LIVE)
        for selector in (
            *("#model", "#shards h3", "#shards .state", "#shards .note", "#adapters .name"),
            *("#adapters .homes", "#jobs h3", "#jobs .state", "#jobs .note"),
            *("#events .name", "#events li > :last-child"),
        ):
            assert HOSTILE in await texts(tab, selector), selector
        for selector in (
            *("#facts", "#shards .chips li", "#shards .turns li", "#adapters .guard"),
            "#jobs .facts",
        ):
            assert any(HOSTILE in text for text in await texts(tab, selector)), selector
        assert await tab.evaluate("document.querySelectorAll('img, b > b, script').length") == 1
        assert "· lora-gateway" in await tab.evaluate("document.title")
        assert tab.problems == []
        assert tab.requests == [f"http://{address}/", f"http://{address}/events"]


async def test_what_changes_is_shown_and_what_stays_is_left_alone() -> None:
    shown: dict[str, Any] = {"phase": Phase.STARTING, "adapters": (), "jobs": (), "events": ()}
    async with gateway(shown) as address, browser(address) as tab:
        await tab.wait_for(LIVE)
        assert await texts(tab, "#phase") == ["starting"]
        assert await tab.evaluate("document.getElementById('adapters').hidden")
        await tab.evaluate("document.querySelector('#shards h3').mine = true")
        arms = (replace(ADAPTER.arms[0], share=0.75), replace(ADAPTER.arms[0], version=2))
        beyond = replace(JOB, curve=tuple((step, 9.0 - step) for step in range(1, 9)))
        shown.update(
            phase=Phase.SERVING,
            adapters=(replace(ADAPTER, arms=arms),),
            adapter_count=1001,
            jobs=(beyond,),
            shards=(replace(SHARD, state="rebuilding", answers=False), replace(SHARD, name="b")),
        )
        await tab.wait_for("document.getElementById('phase').textContent === 'serving'")
        assert await texts(tab, "#shards .state") == ["rebuilding", "up"]
        assert await texts(tab, "#up") == ["1 / 2"]
        assert await texts(tab, "#adapters .ratio") == ["75 %", "90 %"]
        assert "1\u202f000 more" in (await texts(tab, "#more-adapters"))[0]
        line = "document.querySelector('.curve .line').getAttribute('points').split(' ').length"
        assert await tab.evaluate(line) == 8
        label = await tab.evaluate("document.querySelector('.curve').getAttribute('aria-label')")
        assert label == "Loss from 8.000 at step 1 to 1.000 at step 8 of 10"
        assert "queue" not in (await texts(tab, "#jobs .facts"))[0]
        assert await tab.evaluate("document.querySelector('#shards h3').mine")
        shown["jobs"] = (replace(JOB, state="queued", queue_position=2, priority=-3),)
        shown["shards"] = (replace(SHARD, name="b"),)
        await tab.wait_for("document.querySelectorAll('#shards h3').length === 1")
        assert await texts(tab, "#shards h3") == ["b"]
        facts = (await texts(tab, "#jobs .facts"))[0]
        assert "place in the queue 2" in facts and "priority -3" in facts
        assert tab.problems == []


async def test_turns_of_a_batch_are_shown_with_who_waits() -> None:
    turns = [TurnStatus("sql", 1, "held", NOW_S), TurnStatus("faq", 2, "returning", NOW_S)]
    turns.append(TurnStatus("law", 3, "waiting", NOW_S))
    shown: dict[str, Any] = {
        "shards": (replace(SHARD, batch_slots=2, turns=turns, turns_held=2, turns_waiting=1),)
    }
    async with gateway(shown) as address, browser(address) as tab:
        await tab.wait_for(LIVE)
        held, returning, waiting, taken = await texts(tab, "#shards .turns li")
        assert held.startswith("sql@1 has its slot ") and returning.startswith("faq@2 gives it ")
        assert waiting.startswith("law@3 waits ")
        assert taken == "2 of 2 slots taken · 1 waiting for a turn"
        assert await texts(tab, "#shards .waits b") == ["law@3"]
        shown["shards"] = (replace(SHARD, turns=(), turns_held=0),)
        await tab.wait_for("document.querySelectorAll('#shards .turns li').length === 1")
        assert await texts(tab, "#shards .turns li") == ["0 of 8 slots taken"]
        assert tab.problems == []


async def test_a_lost_gateway_is_told_and_found_again() -> None:
    async with contextlib.AsyncExitStack() as stack:
        async with gateway({}) as address:
            tab = await stack.enter_async_context(browser(address))
            await tab.wait_for(LIVE)
            assert not await tab.evaluate("document.querySelector('main').matches('.old')")
        await tab.wait_for("document.getElementById('link').textContent.startsWith('connection')")
        assert await tab.evaluate("document.querySelector('main').matches('.old')")
        assert "old" in (await texts(tab, "#announce"))[0]
        assert await texts(tab, "#shards h3") == ["shard-0"], "what was known is shown still"
        async with gateway({"model": "another"}, address):
            await tab.wait_for(LIVE)
            assert await texts(tab, "#model") == ["another"]
            assert not await tab.evaluate("document.querySelector('main').matches('.old')")


async def test_a_viewer_that_was_refused_comes_back() -> None:
    """A browser gives up by itself where it gets an error."""
    async with gateway({}, max_viewers=1) as address, contextlib.AsyncExitStack() as first:
        tab = await first.enter_async_context(browser(address))
        await tab.wait_for(LIVE)
        async with browser(address) as second:
            await second.wait_for("source.readyState === EventSource.CLOSED")
            await first.aclose()
            await second.wait_for(LIVE)
            assert await texts(second, "#shards h3") == ["shard-0"]
