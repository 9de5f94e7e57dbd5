"""Versions are swapped under load: no stream fails or mixes them, and every worker follows."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from lora_gateway.v1 import adapters_pb2 as ad
from lora_gateway.v1 import inference_pb2 as pb
from lora_gateway.v1.adapters_pb2_grpc import AdaptersStub
from lora_gateway.v1.inference_pb2_grpc import InferenceStub
from tests.details import error_info
from tests.e2e.gateway_process import START_TIMEOUT_S, GatewayProcess, gateway_process

VERSIONS = (1, 2, 3)
PROMPTS = ("Once upon a time", "The river runs to the sea and", "def main():")
TOKENS, LOOK_TOKENS, LONG_TOKENS = 48, 4, 1500
STREAMS, SESSIONS = 16, 200
TIMEOUT_S = 120.0

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def gateway(scarce: GatewayProcess) -> GatewayProcess:
    """Each test has an adapter of its own."""
    return scarce


async def adapters(channel: grpc.aio.Channel, method: str, **fields: object) -> Any:
    """The answer of a unary method of the Adapters service."""
    request = getattr(ad, f"{method}Request")(**fields)
    return await getattr(AdaptersStub(channel), method)(request, timeout=TIMEOUT_S)


async def deploy(channel: grpc.aio.Channel, adapter: str, sources: Path, *numbers: int) -> None:
    """Create these versions; the first one of all takes the traffic."""
    for number in numbers:
        uri = str(sources / str(number))
        request = {"adapter": adapter, "source_uri": uri, "wait": True}
        made = (await adapters(channel, "CreateAdapterVersion", **request)).adapter_version
        assert (made.version, made.state) == (number, ad.VERSION_STATE_READY)


def arms(weights: Mapping[int, int]) -> list[ad.TrafficSplit]:
    return [ad.TrafficSplit(version=version, weight=weight) for version, weight in weights.items()]


async def refusal(answer: Awaitable[object]) -> tuple[str, str]:
    """Code and reason of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer
    return caught.value.code().name, error_info(caught.value).reason


def greedy(
    adapter: str, text: str = PROMPTS[0], *, tokens: int = LOOK_TOKENS, **fields: Any
) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    return pb.GenerateRequest(
        adapter=adapter, text=text, sampling=sampling, return_token_ids=True, **fields
    )


async def ask(channel: grpc.aio.Channel, request: pb.GenerateRequest) -> tuple[int, list[int]]:
    """The version that answers, and its tokens."""
    answer = await InferenceStub(channel).Generate(request, timeout=TIMEOUT_S)
    return answer.served_by.version, list(answer.completions[0].token_ids)


def connect(gateway: GatewayProcess) -> grpc.aio.Channel:
    """A connection of its own: the kernel picks the worker."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.insecure_channel(gateway.address, options=options)


def peers(pid: int) -> set[Any]:
    """The other ends of a process's connections."""
    connections = psutil.Process(pid).net_connections()
    return {c.raddr for c in connections if c.status == psutil.CONN_ESTABLISHED}


@contextlib.asynccontextmanager
async def to_each_worker(gateway: GatewayProcess) -> AsyncIterator[list[grpc.aio.Channel]]:
    """One connection to each worker: the first that the kernel gave it."""
    held: dict[int, grpc.aio.Channel] = {}
    workers = gateway.serving_workers()
    async with contextlib.AsyncExitStack() as stack:
        while len(held) < len(workers):
            before = {pid: peers(pid) for pid in workers}
            channel = await stack.enter_async_context(connect(gateway))
            await channel.channel_ready()
            (owner,) = [pid for pid in workers if peers(pid) - before[pid]]
            held.setdefault(owner, channel)
        assert len(held) == 2
        yield list(held.values())


@dataclass(slots=True)
class Ledger:
    """Which versions stood, and how the streams went meanwhile."""

    golden: Mapping[tuple[int, str], list[int]]
    """Greedy tokens of a version's answer to a prompt."""
    stood: list[int] = field(default_factory=lambda: [1])
    """At first and after each change; the last change may not be acknowledged yet."""
    acknowledged: int = 0
    """Index in `stood` of the change that returned last."""
    over: bool = False
    served: Counter[int] = field(default_factory=Counter)
    """Whole streams by version."""
    outlived: int = 0
    """Streams that ended on a version which did not stand any more."""
    failed: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)


async def stream(channel: grpc.aio.Channel, request: pb.GenerateRequest, ledger: Ledger) -> None:
    """One stream from begin to end, entered in the ledger."""
    since, version, tokens, end = ledger.acknowledged, 0, list[int](), ""
    try:
        async for event in InferenceStub(channel).GenerateStream(request, timeout=TIMEOUT_S):
            end = event.WhichOneof("event") or ""
            if end == "started":
                version = event.started.served_by.version
                if version not in (stood := ledger.stood[since:]):
                    ledger.stale.append(f"{version} answered, {stood} stood")
            tokens.extend(event.delta.token_ids)
    except grpc.aio.AioRpcError as error:
        ledger.failed.append(f"{error.code().name} {error.details()}")
        return
    if end != "finished":
        ledger.failed.append(f"OK after {end!r}")
    elif tokens != ledger.golden.get((version, request.text)):
        ledger.mixed.append(f"version {version}, {request.text!r}: {tokens}")
    else:
        ledger.served[version] += 1
        ledger.outlived += version != ledger.stood[ledger.acknowledged]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [100, 300])
async def test_promote_under_load(
    changes: int,
    gateway: GatewayProcess,
    channel: grpc.aio.Channel,
    sources: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = f"support-{changes}"
    await deploy(channel, adapter, sources, *VERSIONS)
    golden = {}
    for version in VERSIONS:
        for prompt in PROMPTS:
            request = greedy(adapter, prompt, version=version, tokens=TOKENS)
            served, golden[version, prompt] = await ask(channel, request)
            assert served == version
    assert len({tuple(tokens) for tokens in golden.values()}) == 9, "else no mixture could be seen"

    rng, ledger, kinds = random.Random(20), Ledger(golden), Counter[str]()
    line = [1]  # what rollbacks go back along; the last one stands

    async def keep_streaming(number: int, channel: grpc.aio.Channel) -> None:
        session = f"session-{number}" if number % 2 else ""
        request = greedy(adapter, PROMPTS[number % 3], session_id=session, tokens=TOKENS)
        while not (ledger.over or ledger.failed):
            await stream(channel, request, ledger)

    async def look_anew(request: pb.GenerateRequest) -> tuple[int, list[int]]:
        async with connect(gateway) as channel:
            return await ask(channel, request)

    async with (
        to_each_worker(gateway) as first,
        to_each_worker(gateway) as second,
        asyncio.TaskGroup() as streams,
    ):
        etag = (await adapters(channel, "GetAdapter", adapter=adapter)).adapter.etag
        for number in range(STREAMS):
            streams.create_task(keep_streaming(number, [*first, *second][number % 4]))
        for number in range(changes):
            if len(line) > 1 and rng.random() < 0.5:
                line.pop()
                method, fields = "RollbackAdapter", {}
            else:
                line.append(rng.choice([version for version in VERSIONS if version != line[-1]]))
                method, fields = "PromoteVersion", {"version": line[-1]}
            ledger.stood.append(line[-1])
            after = await adapters(channel, method, adapter=adapter, etag=etag, **fields)
            ledger.acknowledged += 1
            kinds[method] += 1
            assert [arm.version for arm in after.adapter.splits] == [line[-1]]
            assert after.adapter.etag != etag
            etag = after.adapter.etag
            look = greedy(adapter, PROMPTS[number % 3])
            answers = await asyncio.gather(
                *(ask(worker, look) for worker in first), *(look_anew(look) for _ in range(4))
            )
            expected = line[-1], golden[line[-1], look.text][:LOOK_TOKENS]
            assert answers == [expected] * 6, f"change {number} is followed by every worker"
        ledger.over = True

    with capsys.disabled():
        print(
            f"\npromote under load: {dict(kinds)}, {ledger.served.total()} streams "
            f"{dict(ledger.served)}, {ledger.outlived} outlived their version, "
            f"{len(ledger.failed)} failed, {len(ledger.mixed)} mixed, {len(ledger.stale)} stale"
        )
    assert not (ledger.failed or ledger.mixed or ledger.stale), ledger
    assert kinds.total() == changes and min(kinds.values()) > changes / 6
    assert set(ledger.served) == set(VERSIONS) and ledger.outlived, "some ran on over a change"


async def test_split_sticky(
    gateway: GatewayProcess, channel: grpc.aio.Channel, sources: Path
) -> None:
    """A session keeps its arm over all workers, and after one was killed."""

    async def picks() -> list[int]:
        async with to_each_worker(gateway) as workers:
            looks = [greedy("canary", session_id=f"s{n}", tokens=1) for n in range(SESSIONS)]
            one, other = [
                await asyncio.gather(*(ask(worker, look) for look in looks)) for worker in workers
            ]
        assert one == other
        return [version for version, _ in one]

    await deploy(channel, "canary", sources, 1, 2)
    await adapters(channel, "SetTraffic", adapter="canary", splits=arms({1: 90, 2: 10}))
    before = await picks()
    assert SESSIONS * 0.04 < before.count(2) < SESSIONS * 0.2
    serving = gateway.log.count("is serving")
    os.kill(gateway.serving_workers()[0], signal.SIGKILL)
    await asyncio.to_thread(gateway.wait_log, "is serving", START_TIMEOUT_S, count=serving + 1)
    assert await picks() == before
    async with connect(gateway) as other:
        await adapters(other, "SetTraffic", adapter="canary", splits=arms({1: 80, 2: 20}))
    moved = {(old, new) for old, new in zip(before, await picks(), strict=True) if old != new}
    assert moved == {(1, 2)}, "only to the arm that grew"


async def test_an_etag_that_is_not_the_newest_changes_nothing(
    channel: grpc.aio.Channel, sources: Path
) -> None:
    await deploy(channel, "etag", sources, 1, 2)
    old = (await adapters(channel, "GetAdapter", adapter="etag")).adapter.etag
    stands = (await adapters(channel, "PromoteVersion", adapter="etag", version=2)).adapter
    for method, fields in (
        ("SetTraffic", {"splits": arms({1: 1})}),
        ("PromoteVersion", {"version": 1}),
        ("RollbackAdapter", {}),
    ):
        late = adapters(channel, method, adapter="etag", etag=old, **fields)
        assert await refusal(late) == ("ABORTED", "ETAG_MISMATCH")
    assert (await adapters(channel, "GetAdapter", adapter="etag")).adapter == stands
    assert (await ask(channel, greedy("etag")))[0] == 2


async def test_rollback_twice_and_no_further(channel: grpc.aio.Channel, sources: Path) -> None:
    """Versions that lose their traffic stay READY, and are promoted again."""
    await deploy(channel, "back", sources, *VERSIONS)
    for version in (2, 3, 1):
        await adapters(channel, "PromoteVersion", adapter="back", version=version)
        assert (await ask(channel, greedy("back")))[0] == version
    idle = (await adapters(channel, "GetAdapterVersion", adapter="back", version=3)).adapter_version
    assert (idle.state, idle.weight) == (ad.VERSION_STATE_READY, 0)
    for version in (3, 2, 1):
        await adapters(channel, "RollbackAdapter", adapter="back")
        assert (await ask(channel, greedy("back")))[0] == version
    code = await refusal(adapters(channel, "RollbackAdapter", adapter="back"))
    assert code == ("FAILED_PRECONDITION", "NOTHING_TO_ROLL_BACK")
    assert (await ask(channel, greedy("back")))[0] == 1


async def first_refusal(channel: grpc.aio.Channel, request: pb.GenerateRequest) -> tuple[str, str]:
    """Ask until a request is refused: workers learn of a deletion a moment after it is written."""
    while True:
        try:
            await ask(channel, request)
        except grpc.aio.AioRpcError as error:
            return error.code().name, error_info(error).reason


@pytest.mark.parametrize("verb", ["Delete", pytest.param("Unload", marks=pytest.mark.slow)])
async def test_a_version_leaves_when_its_last_stream_has_ended(
    verb: str, gateway: GatewayProcess, sources: Path
) -> None:
    leaver: dict[str, Any] = {"adapter": f"leaver-{verb.lower()}", "version": 2}
    look, gone = greedy(**leaver), ("NOT_FOUND", "VERSION_NOT_FOUND")
    async with to_each_worker(gateway) as workers:
        channel, other = workers
        await deploy(channel, leaver["adapter"], sources, 1, 2)
        in_use = adapters(channel, "DeleteAdapterVersion", **{**leaver, "version": 1})
        assert await refusal(in_use) == ("FAILED_PRECONDITION", "VERSION_IN_USE")
        golden = await ask(channel, look)
        long = greedy(**leaver, tokens=LONG_TOKENS)
        sent_s = time.monotonic()
        events = aiter(InferenceStub(channel).GenerateStream(long, timeout=TIMEOUT_S))
        await anext(events)
        leaving = asyncio.create_task(adapters(other, f"{verb}AdapterVersion", **leaver))
        answered_s = list[float]()
        leaving.add_done_callback(lambda _: answered_s.append(time.monotonic()))
        if verb == "Delete":
            async with asyncio.timeout(30):
                assert {await first_refusal(worker, look) for worker in workers} == {gone}
        tokens = 0
        async for event in events:
            tokens += len(event.delta.token_ids)
        assert tokens == event.finished.usage.completion_tokens == LONG_TOKENS
        left = (await leaving).adapter_version
        # By the worker's clock: what it has sent may wait here for long before it is read.
        assert answered_s[0] >= sent_s + event.finished.timings.total_ms / 1000
        assert not left.residency
        if verb == "Delete":
            assert left.state == ad.VERSION_STATE_DELETED
            assert (await adapters(other, "DeleteAdapterVersion", **leaver)).adapter_version == left
            assert await refusal(ask(channel, look)) == gone
        else:
            assert left.state == ad.VERSION_STATE_READY
            assert await ask(channel, look) == golden
            loaded = await adapters(other, "GetAdapterVersion", **leaver)
            assert loaded.adapter_version.residency


async def watch(channel: grpc.aio.Channel, after: int, last: int) -> list[ad.AdapterEvent]:
    """The events after a sequence number, up to `last`: each once, none missing."""
    found: list[ad.AdapterEvent] = []
    request = ad.WatchAdaptersRequest(after_sequence=after)
    items = aiter(AdaptersStub(channel).WatchAdapters(request, timeout=TIMEOUT_S))
    assert (await anext(items)).HasField("heartbeat")
    while len(found) < last - after:
        item = await anext(items)
        if item.HasField("event"):
            found.append(item.event)
    assert [event.sequence for event in found] == list(range(after + 1, last + 1))
    return found


def describe(event: ad.AdapterEvent) -> str:
    kind = ad.EventKind.Name(event.kind).removeprefix("EVENT_KIND_")
    return f"{kind} {event.version or [arm.version for arm in event.splits]}"


async def picture(channel: grpc.aio.Channel) -> tuple[Any, Any, Any]:
    """What is told of adapter `kept`, but for what an engine holds, and who gets which arm."""
    adapter = (await adapters(channel, "GetAdapter", adapter="kept")).adapter
    versions = await adapters(channel, "ListAdapterVersions", adapter="kept", show_deleted=True)
    for version in versions.adapter_versions:
        version.ClearField("residency")
    sessions = [greedy("kept", session_id=f"s{number}", tokens=1) for number in range(40)]
    return adapter, versions, await asyncio.gather(*(ask(channel, each) for each in sessions))


@pytest.mark.slow
async def test_every_change_is_an_event_and_survives_a_kill(sources: Path, tmp_path: Path) -> None:
    with gateway_process(tmp_path, extra=[f"--adapter-source-allow={sources}"]) as gateway:
        family = gateway.family()
        async with connect(gateway) as channel:
            follower = asyncio.create_task(watch(channel, 0, 12))
            await deploy(channel, "kept", sources, 1, 2)
            await adapters(channel, "PromoteVersion", adapter="kept", version=2)
            await adapters(channel, "RollbackAdapter", adapter="kept")
            await adapters(channel, "SetTraffic", adapter="kept", splits=arms({1: 90, 2: 10}))
            await deploy(channel, "kept", sources, 3)
            await adapters(channel, "DeleteAdapterVersion", adapter="kept", version=3)
            told = await follower
            assert await watch(channel, 0, 12) == told
            before = await picture(channel)
    assert [describe(event) for event in told] == [
        *("VERSION_CREATED 1", "VERSION_READY 1", "TRAFFIC_SET [1]"),
        *("VERSION_CREATED 2", "VERSION_READY 2", "VERSION_PROMOTED [2]"),
        *("ADAPTER_ROLLED_BACK [1]", "TRAFFIC_SET [1, 2]"),
        *("VERSION_CREATED 3", "VERSION_READY 3", "VERSION_DRAINING 3", "VERSION_DELETED 3"),
    ]
    assert not psutil.wait_procs(family, timeout=10)[1], "the gateway was killed, all of it"
    with gateway_process(tmp_path, extra=[f"--adapter-source-allow={sources}"]) as gateway:
        async with connect(gateway) as channel:
            assert await picture(channel) == before
            assert await watch(channel, 7, 12) == told[7:]
            etag = before[0].etag
            await adapters(channel, "PromoteVersion", adapter="kept", version=2, etag=etag)
            (event,) = await watch(channel, 12, 13)
            assert describe(event) == "VERSION_PROMOTED [2]"
