"""Requests and versions that crash engines, on real ones: two shards, two workers."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2

from lora_gateway.v1 import adapters_pb2, inference_pb2
from lora_gateway.v1.adapters_pb2_grpc import AdaptersStub
from lora_gateway.v1.inference_pb2_grpc import InferenceStub
from tests.details import bad_fields, detail, error_info
from tests.e2e import evil_plugin
from tests.e2e.evil_plugin import DIES, RAISES
from tests.e2e.gateway_process import GatewayProcess, gateway_process
from tests.e2e.shard_calls import NAMES, OPTIONS, Stream, core_of, homes

SERVED = ("8", "9")
"""Adapters of the folder of sources; the ring puts one on each shard."""
HOMES = homes(SERVED)
BACK_S = 240.0
"""A load of the model on a busy machine."""
SOON_S = 60.0
"""For what takes no time, on a busy machine."""
CALL_S = 400.0
"""For an answer of 1,500 tokens, begun anew on the other shard, on a busy machine."""

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]


@pytest.fixture(scope="module")
def crashing(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A gateway with two shards whose engines crash on evil words. It is none that others share:
    its log is full of tracebacks."""
    folder = tmp_path_factory.mktemp("crashing")
    plugin = folder / "plugin"
    plugin.mkdir()
    served = {name: sources / name for name in SERVED}
    flags = ["--shards", "2", "--adapter-source-allow", str(sources)]
    with pytest.MonkeyPatch.context() as environment:  # which the gateway inherits
        environment.setenv("PYTHONPATH", evil_plugin.install(plugin))
        gateway = gateway_process(folder, workers=2, adapters=served, extra=flags)
        with gateway as process:
            yield process


@pytest_asyncio.fixture
async def poisoned(crashing: GatewayProcess) -> AsyncIterator[GatewayProcess]:
    """The same, once both shards are up."""
    await until_both_up(crashing)
    yield crashing


async def until_both_up(gateway: GatewayProcess) -> None:
    async with asyncio.timeout(BACK_S):
        for shard in NAMES:
            while await metrics(gateway, "gateway_shard_up", shard=shard) != [1.0]:
                await asyncio.sleep(0.2)


async def metrics(gateway: GatewayProcess, name: str, **labels: str) -> list[float]:
    return await asyncio.to_thread(lambda: gateway.metrics(name, **labels))


async def quarantined(gateway: GatewayProcess) -> tuple[float, float]:
    """How many requests and versions are."""
    (requests,) = await metrics(gateway, "gateway_poison_quarantined", kind="request")
    (versions,) = await metrics(gateway, "gateway_poison_quarantined", kind="adapter_version")
    return requests, versions


async def total(gateway: GatewayProcess, name: str, **labels: str) -> float:
    return sum(await metrics(gateway, name, **labels))


async def ask(
    gateway: GatewayProcess,
    tokens: list[int],
    adapter: str = "",
    version: int | None = None,
    max_tokens: int = 4,
) -> inference_pb2.GenerateResponse | grpc.aio.AioRpcError:
    """One answer, or how it failed, on a connection of its own."""
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=tokens),
        adapter=adapter,
        version=version,
        sampling=inference_pb2.SamplingParams(
            max_tokens=max_tokens, temperature=0, ignore_eos=True
        ),
    )
    async with grpc.aio.insecure_channel(gateway.address, options=OPTIONS) as channel:
        try:
            return await InferenceStub(channel).Generate(request, timeout=CALL_S)
        except grpc.aio.AioRpcError as error:
            return error


async def crash(gateway: GatewayProcess, tokens: list[int], adapter: str = "") -> str:
    """Send what crashes an engine; returns the shard that it took, once the host knows it."""
    before = deaths(gateway)
    error = await ask(gateway, tokens, adapter)
    assert isinstance(error, grpc.aio.AioRpcError), error
    assert error.code() is grpc.StatusCode.UNAVAILABLE, error
    info = error_info(error)
    assert (info.reason, info.metadata["tokens_emitted"]) == ("SHARD_UNAVAILABLE", "0")
    shard = str(info.metadata["shard"])
    async with asyncio.timeout(SOON_S):
        while deaths(gateway)[shard] == before[shard]:
            await asyncio.sleep(0.05)
    return shard


async def refusals(
    gateway: GatewayProcess, tokens: list[int], adapter: str = "", version: int | None = None
) -> list[grpc.aio.AioRpcError]:
    """How eight tries fail, over both workers."""
    tries = (ask(gateway, tokens, adapter, version) for _ in range(8))
    answers = await asyncio.gather(*tries)
    assert all(isinstance(answer, grpc.aio.AioRpcError) for answer in answers), answers
    return [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]


def deaths(gateway: GatewayProcess) -> dict[str, int]:
    """How often each shard has died."""
    return {shard: gateway.log.count(f"{shard} ended:") for shard in NAMES}


async def test_kills_from_outside_accuse_no_request(poisoned: GatewayProcess) -> None:
    """The same request is in flight when both cores are killed, one after the other."""
    adapter = SERVED[0]
    home = HOMES[adapter]
    (other,) = set(NAMES) - {home}
    suspects = await total(poisoned, "gateway_crash_suspects_total")
    held = await quarantined(poisoned)
    request = asyncio.create_task(ask(poisoned, [5, 6, 7], adapter, max_tokens=1500))
    for shard in (home, other):
        async with asyncio.timeout(SOON_S):
            while await metrics(poisoned, "vllm:num_requests_running", shard=shard) != [1.0]:
                await asyncio.sleep(0.05)
        core_of(poisoned, shard).send_signal(signal.SIGKILL)
    error = await request
    assert isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.UNAVAILABLE
    assert await total(poisoned, "gateway_crash_suspects_total") == suspects
    assert await quarantined(poisoned) == held
    await until_both_up(poisoned)
    answer = await ask(poisoned, [5, 6, 7], adapter)
    assert isinstance(answer, inference_pb2.GenerateResponse), "it is served as before"


async def test_a_poison_request_crashes_two_engines_and_is_refused_then(
    poisoned: GatewayProcess,
) -> None:
    """Its process dies by a signal of its own, with streams beside it."""
    adapter, poison = SERVED[0], [*DIES, 5, 6]
    before, retried = deaths(poisoned), await total(poisoned, "gateway_retries_total")
    held = await quarantined(poisoned)
    streams = [Stream(poisoned.address, adapter) for _ in range(20)]
    for stream in streams:
        await stream.has_token.wait()
    # 1. It is new in the step in which the engine dies, so it is sent to no other.
    first = await crash(poisoned, poison, adapter)
    await asyncio.gather(*(stream.done for stream in streams))
    assert any(stream.shard == first for stream in streams)
    for stream in streams:
        if stream.shard != first:
            assert stream.finished, "the other shard's streams go on"
            continue
        assert stream.error is not None and stream.error.code() is grpc.StatusCode.UNAVAILABLE
        assert error_info(stream.error).reason == "SHARD_UNAVAILABLE"
    assert deaths(poisoned) == before | {first: before[first] + 1}, "the other one lives"
    assert await total(poisoned, "gateway_retries_total") == retried
    assert await quarantined(poisoned) == held, "one crash proves nothing"
    await until_both_up(poisoned)
    # 2. The caller's own retry is the second crash.
    good = Stream(poisoned.address, adapter)
    await good.has_token.wait()
    await crash(poisoned, poison, adapter)
    await good.done
    died = deaths(poisoned)
    assert sum(died.values()) == sum(before.values()) + 2
    poisoned.wait_log(r"request [0-9a-f]{16} was there in two crashes: quarantined", SOON_S)
    # 3. No engine sees it again, whichever worker is asked.
    for error in await refusals(poisoned, poison, adapter):
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        info = error_info(error)
        assert info.reason == "POISON_REQUEST" and bad_fields(error) == {"prompt"}
        left_s = _seconds_until(info.metadata["until"])
        assert 3000 < left_s <= 3600
    assert await quarantined(poisoned) == (held[0] + 1, held[1])
    # 4. Other prompts of the adapter go on, those that were in both crashes among them.
    for answer in await asyncio.gather(
        *(ask(poisoned, [5, 6, 7, number], adapter) for number in range(8))
    ):
        assert isinstance(answer, inference_pb2.GenerateResponse), answer
    same = Stream(poisoned.address, adapter)
    await same.done
    assert same.finished
    assert deaths(poisoned) == died, "no shard died of the third try"
    await until_both_up(poisoned)


async def test_a_version_that_crashes_on_different_prompts_is_quarantined_and_no_other(
    poisoned: GatewayProcess, sources: Path
) -> None:
    """Its engine ends with an exception, of which the workers hear first."""
    adapter = SERVED[1]
    before, held = deaths(poisoned), await quarantined(poisoned)
    async with grpc.aio.insecure_channel(poisoned.address) as channel:
        made = await AdaptersStub(channel).CreateAdapterVersion(
            adapters_pb2.CreateAdapterVersionRequest(
                adapter=adapter, source_uri=str(sources / "20"), wait=True
            ),
            timeout=CALL_S,
        )
    assert made.adapter_version.version == 2
    assert await crash(poisoned, [*RAISES, 5], adapter) == HOMES[adapter]
    await until_both_up(poisoned)
    assert await crash(poisoned, [*RAISES, 6], adapter) == HOMES[adapter]
    poisoned.wait_log(rf"adapter version default/{adapter}@1 was there in two crashes", SOON_S)
    for error in await refusals(poisoned, [5, 6, 7], adapter):
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        info = error_info(error)
        assert info.reason == "ADAPTER_QUARANTINED"
        assert (info.metadata["adapter"], info.metadata["version"]) == (adapter, "1")
        delay_s = detail(error, error_details_pb2.RetryInfo).retry_delay.seconds
        assert abs(delay_s - _seconds_until(info.metadata["until"])) < SOON_S
    for version, name in ((2, adapter), (None, SERVED[0]), (None, "")):
        answer = await ask(poisoned, [5, 6, 7], name, version)
        assert isinstance(answer, inference_pb2.GenerateResponse), (name, version)
    assert await quarantined(poisoned) == (held[0], held[1] + 1)
    home = HOMES[adapter]
    assert deaths(poisoned) == before | {home: before[home] + 2}


def _seconds_until(moment: str) -> float:
    return (datetime.fromisoformat(moment) - datetime.now(UTC)).total_seconds()
