"""EvaluateVersion: a request to an evaluation, its events to messages."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

from engine.errors import InvalidRequest, Violation
from engine.evaluation import (
    DEFAULT_MAX_CONCURRENCY,
    DEFAULT_MAX_TOKENS,
    Evaluation,
    Progress,
    Result,
    Summary,
)
from engine.examples import MAX_DATASET_BYTES, Example, parse_jsonl
from engine.generation import Chat, ChatMessage, ServedVersion, VersionKey
from engine.intake import in_daemon_thread
from engine.pool import Route
from engine.scoring import Scorer
from engine.shard import Shard
from gateway import adapter_codec as codec
from gateway.shards import Shards
from lora_gateway.v1 import adapters_pb2 as pb
from store.artifacts import SourceUnusable
from store.records import VersionNotReady, VersionState
from store.registry import Registry
from store.sources import AllowedSources

MAX_READ_AT_ONCE = 4
"""Datasets; each may be of a server that does not answer."""

_SCORERS = {scorer: pb.Scorer.Value(f"SCORER_{scorer.name}") for scorer in Scorer}
_SCORERS_BY_NUMBER = {number: scorer for scorer, number in _SCORERS.items()}


class Evaluations:
    """Runs evaluations beside live traffic, each on one shard of its adapter."""

    def __init__(
        self,
        registry: Registry,
        sources: AllowedSources,
        shards: Shards,
        max_num_seqs: int,
    ) -> None:
        """`max_num_seqs` is what an engine runs at once; half of it is left to live traffic."""
        self._registry = registry
        self._sources = sources
        self._shards = shards
        self._max_running = max(1, max_num_seqs // 2)
        self._reading = asyncio.Semaphore(MAX_READ_AT_ONCE)

    async def run(
        self, request: pb.EvaluateVersionRequest, tenant: str
    ) -> AsyncGenerator[pb.EvaluateVersionResponse, None]:
        """The messages of one evaluation."""
        evaluation = await self._decode(request, tenant)
        # All versions on one shard, and the base model too: so they are compared fairly.
        home = self._shards.pool.homes(VersionKey(tenant, request.adapter, 0))[0]
        runner = _Runner(self._shards, home, tenant, request.adapter, self._max_running)
        async with contextlib.aclosing(evaluation.run(runner, runner.has_capacity)) as events:
            async for event in events:
                yield _encode(event)

    async def _decode(self, request: pb.EvaluateVersionRequest, tenant: str) -> Evaluation:
        wrong = list(codec.name_violations(request.adapter))
        if request.examples and request.dataset_uri:
            wrong.append(Violation("dataset_uri", "must be empty where there are examples"))
        unknown = [number for number in request.scorers if number not in _SCORERS_BY_NUMBER]
        if unknown:
            wrong.append(Violation("scorers", f"has unknown values: {unknown[:3]}"))
        codec.refuse(wrong)
        await self._registry.adapter(tenant, request.adapter)  # also if only 0 is asked for
        for version in request.versions[:64]:
            if version:
                record = await self._registry.version(tenant, request.adapter, version)
                if record.state is not VersionState.READY:
                    raise VersionNotReady(request.adapter, version, record.state)
        if request.dataset_uri:
            uri = request.dataset_uri
            async with self._reading:
                examples: Sequence[Example] = await in_daemon_thread(lambda: self._read(uri))
        else:
            examples = [
                _example(example, f"examples[{index}]")
                for index, example in enumerate(request.examples)
            ]
        return Evaluation(
            examples=examples,
            versions=list(request.versions),
            scorers=[_SCORERS_BY_NUMBER[number] for number in request.scorers],
            max_tokens=request.max_tokens or DEFAULT_MAX_TOKENS,
            max_concurrency=request.max_concurrency or DEFAULT_MAX_CONCURRENCY,
            return_results=request.return_results,
            cache_salt=tenant,
        )

    def _read(self, dataset_uri: str) -> list[Example]:
        folder, _, name = dataset_uri.rpartition("/")
        try:
            self._sources.resolve(dataset_uri)  # the name obeys the same rules as the folder
            if not name:
                raise SourceUnusable(f"{dataset_uri} names no file")
            with self._sources.resolve(folder).open() as files:
                content = b"".join(files.chunks(name, MAX_DATASET_BYTES))
        except SourceUnusable as error:
            what, _, _ = str(error).partition(";")
            raise InvalidRequest(
                Violation("dataset_uri", f"{what}; name a JSON Lines file of examples")
            ) from error
        return parse_jsonl(content)


class _Runner:
    """Leases versions of one adapter on one shard."""

    def __init__(
        self, shards: Shards, home: Route, tenant: str, adapter: str, max_running: int
    ) -> None:
        self._shards = shards
        self._home = home
        self._tenant = tenant
        self._adapter = adapter
        self._max_running = max_running

    async def has_capacity(self) -> bool:
        """Whether the shard has some to spare."""
        name = self._home.shard.name
        load = await self._home.shard.core_load()
        if self._shards.are_slots_contended(name):  # a turn more would be at the cost of others
            return False
        return load.waiting == 0 and load.running < self._max_running

    @contextlib.asynccontextmanager
    async def open(self, version: int) -> AsyncIterator[tuple[Shard, ServedVersion | None]]:
        key = VersionKey(self._tenant, self._adapter, version) if version else None
        async with self._home.to(key).lease() as served:
            yield self._home.shard, served


def _example(message: pb.EvaluationExample, field: str) -> Example:
    match message.WhichOneof("prompt"):
        case "text":
            prompt: str | Chat = message.text
        case "chat":
            prompt = Chat([ChatMessage(m.role, m.content) for m in message.chat.messages])
        case _:
            raise InvalidRequest(Violation(f"{field}.prompt", "is required; set text or chat"))
    expected = message.expected if message.HasField("expected") else None
    return Example(prompt, expected, tuple(message.contains))


def _encode(event: Progress | Result | Summary) -> pb.EvaluateVersionResponse:
    match event:
        case Progress(done, total):
            return pb.EvaluateVersionResponse(
                progress=pb.EvaluationProgress(done=done, total=total)
            )
        case Result():
            return pb.EvaluateVersionResponse(
                result=pb.EvaluationResult(
                    example=event.example,
                    version=event.version,
                    answer=event.answer,
                    scores=[
                        pb.Score(scorer=_SCORERS[scorer], value=value)
                        for scorer, value in event.scores.items()
                    ],
                    error=event.error,
                )
            )
        case Summary():
            return pb.EvaluateVersionResponse(summary=_encode_summary(event))


def _encode_summary(summary: Summary) -> pb.EvaluationSummary:
    return pb.EvaluationSummary(
        scores=[
            pb.VersionScore(
                version=score.version,
                scorer=_SCORERS[score.scorer],
                mean=score.mean,
                low=score.interval.low,
                high=score.interval.high,
                count=score.count,
            )
            for score in summary.scores
        ],
        differences=[
            pb.ScoreDifference(
                version=difference.version,
                scorer=_SCORERS[difference.scorer],
                difference=difference.difference,
                low=difference.interval.low,
                high=difference.interval.high,
                significant=difference.significant,
            )
            for difference in summary.differences
        ],
        failed_count=summary.failed_count,
    )
