"""The corpus of broken adapters, offered to a gateway that serves: it says why, and serves on."""

from __future__ import annotations

import asyncio
import itertools
import re
import shutil
import time
from collections import Counter
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from google.rpc import error_details_pb2

from lora_gateway.v1 import adapters_pb2 as ad
from lora_gateway.v1 import inference_pb2 as pb
from lora_gateway.v1.adapters_pb2_grpc import AdaptersStub
from lora_gateway.v1.inference_pb2_grpc import InferenceStub
from tests.corpus.broken import CANARY, Broken, Kind, Offer, Upload, meddling
from tests.corpus.catalogue import CORPUS
from tests.details import detail, error_info
from tests.e2e.gateway_process import GatewayProcess, gateway_process

if TYPE_CHECKING:
    from lora_gateway.v1.adapters_pb2_grpc import AdaptersAsyncStub

DEADLINE_S = 20.0
"""Of one case: built, offered twice, refused twice."""
LEAST_CASES, LEAST_GOOD_ANSWERS = 60, 100
TOKENS = 12
BASE_MODEL, GOOD = "", ("alpha", "beta")
PROMPTS = ("Once upon a time", "The river runs to the sea and")
CHUNK_BYTES = 1024**2

CODES = {
    "ADAPTER_INVALID": grpc.StatusCode.INVALID_ARGUMENT,
    "CHECKSUM_MISMATCH": grpc.StatusCode.INVALID_ARGUMENT,
    "INVALID_FIELD": grpc.StatusCode.INVALID_ARGUMENT,
    "SOURCE_NOT_ALLOWED": grpc.StatusCode.PERMISSION_DENIED,
    "UPLOAD_INCOMPLETE": grpc.StatusCode.FAILED_PRECONDITION,
    "UPLOAD_OFFSET_MISMATCH": grpc.StatusCode.FAILED_PRECONDITION,
}
"""By reason, as errors.proto has them."""

Question = tuple[str, str]
"""Adapter and prompt."""
Golden = Mapping[Question, list[int]]
"""Greedy tokens that answer a question while nothing else is asked."""

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the gateway's state, and the place that its callers may name."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "allowed").mkdir()
    return folder


@pytest.fixture(scope="module")
def gateway(adapters: Mapping[str, Path], folder: Path) -> Iterator[GatewayProcess]:
    """A gateway for this file alone, with two good adapters."""
    with gateway_process(
        folder,
        workers=2,
        adapters={name: adapters[name] for name in GOOD},
        extra=["--adapter-source-allow", str(folder / "allowed")],
    ) as process:
        yield process


def connect(gateway: GatewayProcess) -> grpc.aio.Channel:
    """A connection of its own: the kernel picks the worker."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.insecure_channel(gateway.address, options=options)


def core_pid(gateway: GatewayProcess) -> int:
    (core,) = [
        process
        for process in gateway.family()
        if "EngineCore" in process.name() or "EngineCore" in " ".join(process.cmdline())
    ]
    return core.pid


# --- good requests


async def answer(channel: grpc.aio.Channel, question: Question) -> list[int]:
    """Tokens of a streamed answer, which must come to its end."""
    adapter, prompt = question
    request = pb.GenerateRequest(
        adapter=adapter,
        text=prompt,
        sampling=pb.SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True),
        return_token_ids=True,
    )
    tokens, end = list[int](), None
    async for event in InferenceStub(channel).GenerateStream(request, timeout=DEADLINE_S):
        end = event.WhichOneof("event")
        tokens.extend(event.delta.token_ids)
    assert end == "finished"
    return tokens


async def golden_answers(channel: grpc.aio.Channel) -> Golden:
    questions = itertools.product((BASE_MODEL, *GOOD), PROMPTS)
    golden = {question: await answer(channel, question) for question in questions}
    for prompt in PROMPTS:  # else no mixture could be seen
        assert len({tuple(golden[name, prompt]) for name in (BASE_MODEL, *GOOD)}) == 3
    return golden


@dataclass(slots=True)
class GoodRequests:
    """Those that run while the corpus is offered."""

    golden: Golden
    answered: int = 0
    failed: list[str] = field(default_factory=list)
    over: bool = False

    async def keep_asking(self, channel: grpc.aio.Channel) -> None:
        for question in itertools.cycle(self.golden):
            if self.over:
                return
            try:
                tokens = await answer(channel, question)
            except (grpc.aio.AioRpcError, AssertionError) as error:
                self.failed.append(f"{question}: {error!r}")
                await asyncio.sleep(1)  # one that is gone would fail thousands a second
                continue
            self.answered += 1
            if tokens != self.golden[question]:
                self.failed.append(f"{question}: {tokens}, not {self.golden[question]}")


# --- bad adapters


@dataclass(frozen=True, slots=True)
class Refusal:
    """How a call failed."""

    reason: str
    sentences: Sequence[str]
    """The message, and what is said of single fields."""
    version: int
    """The version that became FAILED; 0 if it came to none."""

    @classmethod
    async def of(cls, call: Awaitable[object]) -> Refusal:
        """Of a call that must fail, with the code of its reason."""
        try:
            taken = await call
        except grpc.aio.AioRpcError as error:
            info = error_info(error)
            assert error.code() is CODES.get(info.reason), f"{error.code()} {info.reason}"
            sentences = [error.details() or ""]
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                bad = detail(error, error_details_pb2.BadRequest)
                sentences += [f"{v.field}: {v.description}" for v in bad.field_violations]
                assert len(sentences) > 1
            return cls(info.reason, sentences, int(info.metadata.get("version", "0")))
        raise AssertionError(f"is taken: {taken}")


@dataclass(slots=True)
class Corpus:
    """Broken adapters on their way through the RPCs."""

    adapters: AdaptersAsyncStub
    allowed: Path
    model: Path
    refused: Counter[Kind] = field(default_factory=Counter)
    failed_versions: int = 0
    slowest_s: tuple[float, str] = 0.0, ""
    wrong: list[str] = field(default_factory=list)
    """What was not answered as it should be."""

    async def offer(self, broken: Broken) -> None:
        """Build a case, offer it, and enter how it went."""
        begin_s = time.monotonic()
        case = self.allowed / broken.name
        try:
            async with asyncio.timeout(DEADLINE_S):
                case.mkdir()
                built = await asyncio.to_thread(broken.build, case, self.model)
                if isinstance(built, Offer):
                    with meddling(built):
                        await self._validate(broken, built)
                        await self._create(broken, built)
                else:
                    await self._upload(broken, built)
            assert not (case / CANARY).exists(), "code of a pickle ran"
        except Exception as error:
            self.wrong.append(f"{broken.name}: {error!r}")
        else:
            self.refused[broken.kind] += 1
        self.slowest_s = max(self.slowest_s, (time.monotonic() - begin_s, broken.name))

    async def _validate(self, broken: Broken, offer: Offer) -> None:
        call = self.adapters.ValidateAdapter(
            ad.ValidateAdapterRequest(
                source_uri=offer.source_uri,
                expected_sha256=offer.expected_sha256,
                fingerprints=pb.ModelFingerprints(**offer.fingerprints),
            ),
            timeout=DEADLINE_S,
        )
        if broken.reason == "SOURCE_NOT_ALLOWED":
            self._check(broken, await Refusal.of(call))
            return
        checked = await call
        if broken.kind is Kind.ANSWERS:
            assert checked.valid and not checked.findings, "no check of the files can tell"
            return
        assert not checked.valid and not checked.HasField("facts")
        assert len(checked.findings) == broken.findings, checked.findings
        assert says(broken, checked.findings), f"ValidateAdapter says {checked.findings}"

    async def _create(self, broken: Broken, offer: Offer) -> None:
        refusal = await Refusal.of(
            self.adapters.CreateAdapterVersion(
                ad.CreateAdapterVersionRequest(
                    adapter=broken.name,
                    source_uri=offer.source_uri,
                    expected_sha256=offer.expected_sha256,
                    fingerprints=pb.ModelFingerprints(**offer.fingerprints),
                    wait=True,
                ),
                timeout=DEADLINE_S,
            )
        )
        assert refusal.version or broken.kind is Kind.PLACE, "no version is told"
        await self._look_at(broken, refusal)

    async def _upload(self, broken: Broken, upload: Upload) -> None:
        call = self.adapters.UploadAdapterVersion(iter(upload.requests), timeout=DEADLINE_S)
        refusal = await Refusal.of(call)
        await self._look_at(broken, refusal)
        first = upload.requests[0]
        if first.HasField("header"):
            await self._end(first.header)

    async def _end(self, header: ad.UploadHeader) -> None:
        """Go on with an upload that was kept, in zeros: the checksum drops it."""
        query = ad.QueryUploadRequest(upload_id=header.upload_id)
        try:
            status = await self.adapters.QueryUpload(query, timeout=DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            assert error_info(error).reason in ("UPLOAD_NOT_FOUND", "INVALID_FIELD")
            return
        if status.HasField("adapter_version"):
            return
        requests = [ad.UploadAdapterVersionRequest(header=header)]
        for offset in range(status.offset, header.weights_size_bytes, CHUNK_BYTES):
            zeros = bytes(min(CHUNK_BYTES, header.weights_size_bytes - offset))
            chunk = ad.UploadChunk(offset=offset, data=zeros)
            requests.append(ad.UploadAdapterVersionRequest(chunk=chunk))
        call = self.adapters.UploadAdapterVersion(iter(requests), timeout=DEADLINE_S)
        assert (await Refusal.of(call)).reason == "CHECKSUM_MISMATCH"

    async def _look_at(self, broken: Broken, refusal: Refusal) -> None:
        """At the refusal, and at what became of the version if there is one."""
        assert refusal.reason == broken.reason, refusal
        if not refusal.version:
            self._check(broken, refusal)
            return
        request = ad.GetAdapterVersionRequest(adapter=broken.name, version=refusal.version)
        version = (
            await self.adapters.GetAdapterVersion(request, timeout=DEADLINE_S)
        ).adapter_version
        assert version.state == ad.VERSION_STATE_FAILED
        assert says(broken, version.findings), f"GetAdapterVersion says {version.findings}"
        assert not version.residency
        self.failed_versions += 1

    @staticmethod
    def _check(broken: Broken, refusal: Refusal) -> None:
        assert refusal.reason == broken.reason, refusal
        assert says(broken, refusal.sentences), refusal


def says(broken: Broken, sentences: Sequence[str]) -> bool:
    return any(re.search(broken.expected, sentence) for sentence in sentences)


async def good_digests(adapters: AdaptersAsyncStub) -> set[str]:
    """Of the adapters that the gateway began with."""
    versions = [
        await adapters.GetAdapterVersion(ad.GetAdapterVersionRequest(adapter=name, version=1))
        for name in GOOD
    ]
    return {version.adapter_version.digest for version in versions}


# --- both at once


@pytest.mark.slow
async def test_each_is_refused_with_its_reason_and_no_good_request_notices(
    gateway: GatewayProcess, folder: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    core, workers = core_pid(gateway), gateway.serving_workers()
    async with connect(gateway) as channel, connect(gateway) as one, connect(gateway) as other:
        good = GoodRequests(await golden_answers(channel))
        corpus = Corpus(AdaptersStub(channel), folder / "allowed", tiny_model)
        async with asyncio.TaskGroup() as streams:
            for each in (one, other):
                streams.create_task(good.keep_asking(each))
            for broken in CORPUS:
                await corpus.offer(broken)
            good.over = True
        digests = await good_digests(corpus.adapters)

    deaths = (core_pid(gateway) != core) + len(set(workers) - set(gateway.serving_workers()))
    seconds, name = corpus.slowest_s
    with capsys.disabled():
        kinds = ", ".join(f"{kind.name} {count}" for kind, count in corpus.refused.items())
        print(
            f"\ncorpus: {corpus.refused.total()} of {len(CORPUS)} broken adapters refused with "
            f"their reason ({kinds}), {corpus.failed_versions} versions FAILED, {deaths} deaths, "
            f"{good.answered} good requests, {len(good.failed)} failed; the slowest took "
            f"{seconds:.2f} s ({name})"
        )
    assert not corpus.wrong
    assert corpus.refused.total() == len(CORPUS) >= LEAST_CASES
    assert corpus.failed_versions >= LEAST_CASES
    assert deaths == 0
    assert not good.failed
    assert good.answered >= LEAST_GOOD_ANSWERS
    assert "Traceback" not in gateway.log

    state = folder / "state"
    assert {path.name for path in (state / "adapters").iterdir()} == digests
    assert not list((state / "staging").iterdir())
    assert not [path for path in (state / "uploads").rglob("*") if path.is_file()]


async def test_files_deleted_while_loaded_fail_the_requests_that_need_them_alone(
    gateway: GatewayProcess, folder: Path
) -> None:
    """`rm -rf` of an adapter's files: what is loaded answers on, and what must be loaded fails
    until they are restored."""
    core, workers = core_pid(gateway), gateway.serving_workers()
    adapter = GOOD[0]
    async with connect(gateway) as channel:
        adapters, golden = AdaptersStub(channel), await golden_answers(channel)
        version = await adapters.GetAdapterVersion(
            ad.GetAdapterVersionRequest(adapter=adapter, version=1)
        )
        stored, kept = folder / "state/adapters" / version.adapter_version.digest, folder / "kept"
        shutil.copytree(stored, kept)
        stored.chmod(0o700)
        shutil.rmtree(stored)
        assert await answer(channel, (adapter, PROMPTS[0])) == golden[adapter, PROMPTS[0]]

        unload = ad.UnloadAdapterVersionRequest(adapter=adapter, version=1)
        await adapters.UnloadAdapterVersion(unload, timeout=DEADLINE_S)
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await answer(channel, (adapter, PROMPTS[0]))
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert error_info(caught.value).reason == "ADAPTER_LOAD_FAILED"
            assert error_info(caught.value).metadata["adapter"] == adapter
        for question, tokens in golden.items():
            if question[0] != adapter:
                assert await answer(channel, question) == tokens

        shutil.copytree(kept, stored)
        # Requests are told the last failure for two seconds; who asks for a load gets one.
        load = ad.LoadAdapterVersionRequest(adapter=adapter, version=1)
        await adapters.LoadAdapterVersion(load, timeout=DEADLINE_S)
        for question, tokens in golden.items():
            assert await answer(channel, question) == tokens
    assert core_pid(gateway) == core
    assert gateway.serving_workers() == workers
