"""A real gateway that dies while it publishes a trained adapter has published it once.

Some of the points at which a host may die; `tests/gateway/test_publishing_kills.py` has all.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from lora_gateway.v1 import training_pb2 as pb
from tests.e2e import training
from tests.e2e.scripted_gateway import ScriptedGateway, Watch, scripted_gateway

POINTS = (
    "after begin_version",
    "after complete_version",
    "after change_job (publication serving)",
)

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ScriptedGateway]:
    folder = tmp_path_factory.mktemp("published")
    program = ("-m", "tests.e2e.killed_host", str(folder / "kill"))
    with scripted_gateway(folder, program=program) as found:
        async with found.channel() as channel:
            await training.upload(channel, "facts", training.facts())
        yield found


@pytest.mark.parametrize("point", POINTS)
async def test_kill_job_host_while_it_publishes(gateway: ScriptedGateway, point: str) -> None:
    name = f"publish-{POINTS.index(point)}"
    before = await gateway.versions()
    (gateway.folder / "kill").write_text(point)
    await gateway.create(name, publish=True, epochs=2)
    watch = Watch(gateway, name)
    await watch.until(pb.JOB_STATE_RUNNING)
    gateway.start_again_once_it_is_killed()

    job = await watch.end()
    assert job.state == pb.JOB_STATE_SUCCEEDED, job.error
    assert job.publication.state == pb.PUBLICATION_STATE_SERVING, job.publication
    assert job.publication.version == len(before) + 1
    assert await gateway.versions() == [*before, "VERSION_STATE_READY"]
    told = [e.publication.state for e in watch.events if e.HasField("publication")]
    assert told.count(pb.PUBLICATION_STATE_SERVING) == 1
    async with gateway.channel() as channel:
        question = "Who keeps the light?"
        assert await training.answer(channel, question, "facts", job.publication.version)
    print(f"1 kill point: host {point}, {len(watch.events)} events, {watch.states}")
