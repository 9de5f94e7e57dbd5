"""An evaluation: a held-out set through chosen versions, scored, on capacity to spare.

Examples go to all versions in turn, so that one which is broken off compares them fairly. Live
traffic comes first: nothing is generated before the caller says that there is capacity.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from engine.errors import GenerationFailed, InvalidRequest, Violation
from engine.examples import MAX_EXAMPLES, Example
from engine.generation import GenerationRequest, Output, Prompt, ServedVersion
from engine.rendering import RenderedPrompt
from engine.scoring import (
    ScoreDifference,
    Scorer,
    ScoreTable,
    VersionScore,
    contains_all,
    exact_match,
    mean_logprob,
    valid_json,
)
from engine.shard import Shard

MAX_VERSIONS = 8
MAX_TOKENS = 4096
"""Of each answer."""
MAX_CONCURRENCY = 64
DEFAULT_MAX_TOKENS = 256
DEFAULT_MAX_CONCURRENCY = 4
POLL_INTERVAL_S = 0.05
"""Between two looks for capacity while there is none."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How much is done."""

    done: int
    """Answers that were scored, or ended in an error."""
    total: int
    """Examples times versions."""


@dataclass(frozen=True, slots=True)
class Result:
    """One scored answer."""

    example: int
    """Its index, from 0."""
    version: int
    """0 is the base model."""
    answer: str
    scores: Mapping[Scorer, float]
    """By those scorers for which the example has what they need."""
    error: str = ""
    """Why there is neither answer nor score; empty if there is."""


@dataclass(frozen=True, slots=True)
class Summary:
    """The versions compared, at the end."""

    scores: Sequence[VersionScore]
    differences: Sequence[ScoreDifference]
    """Of each other version from the first one."""
    failed_count: int
    """Answers that ended in an error."""


class Runner(Protocol):
    """Where an evaluation generates."""

    def open(self, version: int) -> AbstractAsyncContextManager[tuple[Shard, ServedVersion | None]]:
        """A shard, with the version loaded on it until the context ends; 0 is the base model."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What to evaluate. Raises InvalidRequest with every violation, under the names of
    EvaluateVersionRequest."""

    examples: Sequence[Example]
    versions: Sequence[int]
    """0 is the base model. The first is the baseline."""
    scorers: Sequence[Scorer] = ()
    """Empty: all for which some example has what they need."""
    max_tokens: int = DEFAULT_MAX_TOKENS
    max_concurrency: int = DEFAULT_MAX_CONCURRENCY
    """Most answers that are generated at once."""
    return_results: bool = False
    """Whether `run` yields each Result. Without, answers that no scorer reads are not made."""
    cache_salt: str = ""
    """Keeps one tenant's prefix cache from another's; empty for none."""

    def __post_init__(self) -> None:
        wrong = [Violation(field, text) for field, text in self._violations()]
        if wrong:
            raise InvalidRequest(*wrong)

    async def run(
        self, runner: Runner, has_capacity: Callable[[], Awaitable[bool]]
    ) -> AsyncGenerator[Progress | Result | Summary, None]:
        """A Progress after each example of each version, with its Result before if asked for,
        and at the end one Summary.

        Open it with `contextlib.aclosing`: leaving early ends everything that it started.
        `has_capacity` is asked before each generation, and again every POLL_INTERVAL_S while it
        says no. An example that the engine refuses or fails has an error and no score;
        ShardUnavailable, and whatever else `runner` or `has_capacity` raise, ends the evaluation.
        """
        table = ScoreTable(self.versions, self._applied(), len(self.examples))
        total = len(self.examples) * len(self.versions)
        # Bounded, so that a caller who does not read stops the generation too. The producer is a
        # task of its own because a task group must not stay open across a yield.
        outcomes = asyncio.Queue[Result | Exception | None](self.max_concurrency)
        producer = asyncio.create_task(_Run(self, runner, has_capacity).produce(outcomes))
        done = failed_count = 0
        try:
            while (outcome := await outcomes.get()) is not None:
                if isinstance(outcome, Exception):
                    raise outcome
                table.put(outcome.example, outcome.version, outcome.scores)
                done += 1
                failed_count += bool(outcome.error)
                if self.return_results:
                    yield outcome
                yield Progress(done, total)
        finally:
            producer.cancel()
            await asyncio.gather(producer, return_exceptions=True)
        yield Summary(table.scores(), table.differences(), failed_count)

    def _applied(self) -> Sequence[Scorer]:
        return self.scorers or [scorer for scorer in Scorer if self._has_examples_for(scorer)]

    def scorers_of(self, example: Example) -> list[Scorer]:
        """Those that can judge its answers."""
        return [scorer for scorer in self.scorers or Scorer if example.serves(scorer)]

    def _has_examples_for(self, scorer: Scorer) -> bool:
        return any(example.serves(scorer) for example in self.examples)

    def _violations(self) -> Iterator[tuple[str, str]]:
        if not self.examples:
            yield "examples", "must not be empty"
        if len(self.examples) > MAX_EXAMPLES:
            yield "examples", f"may have {MAX_EXAMPLES} entries, has {len(self.examples)}"
        if not 1 <= len(self.versions) <= MAX_VERSIONS:
            yield "versions", f"must have 1 to {MAX_VERSIONS} entries, has {len(self.versions)}"
        elif len(set(self.versions)) < len(self.versions):
            yield "versions", "names one twice; name each once"
        if len(set(self.scorers)) < len(self.scorers):
            yield "scorers", "names one twice; name each once"
        for scorer in dict.fromkeys(self.scorers):
            if self.examples and not self._has_examples_for(scorer):
                yield "scorers", f"no example has what {scorer.name} needs: {_NEEDS[scorer]}"
        if not 1 <= self.max_tokens <= MAX_TOKENS:
            yield "max_tokens", f"must be 1 to {MAX_TOKENS}, is {self.max_tokens}"
        if not 1 <= self.max_concurrency <= MAX_CONCURRENCY:
            yield "max_concurrency", f"must be 1 to {MAX_CONCURRENCY}, is {self.max_concurrency}"
        for index, example in enumerate(self.examples):
            for field, text in example.violations():
                yield f"examples[{index}].{field}", text


_NEEDS = {
    Scorer.EXACT_MATCH: "`expected`",
    Scorer.CONTAINS: "`contains` or `expected`",
    Scorer.VALID_JSON: "nothing",
    Scorer.LOG_LIKELIHOOD: "`expected` that is not empty",
}


class _Run:
    """One run of an evaluation."""

    def __init__(
        self, evaluation: Evaluation, runner: Runner, has_capacity: Callable[[], Awaitable[bool]]
    ) -> None:
        self._evaluation = evaluation
        self._runner = runner
        self._has_capacity = has_capacity
        self._asking = asyncio.Lock()
        """Held by whoever looks for capacity: one may ask for all."""
        self._id = uuid.uuid4().hex
        self._numbers = itertools.count()

    async def produce(self, outcomes: asyncio.Queue[Result | Exception | None]) -> None:
        """Put all results, and then None; or the exception that ended it."""
        evaluation = self._evaluation
        places = itertools.product(range(len(evaluation.examples)), evaluation.versions)
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(evaluation.max_concurrency):
                    tasks.create_task(self._work(places, outcomes))
        except ExceptionGroup as errors:
            await outcomes.put(errors.exceptions[0])
        else:
            await outcomes.put(None)

    async def _work(
        self,
        places: Iterator[tuple[int, int]],
        outcomes: asyncio.Queue[Result | Exception | None],
    ) -> None:
        """Take the next place as long as there is one; all workers share the iterator."""
        for example, version in places:
            await outcomes.put(await self._result(example, version))

    async def _result(self, index: int, version: int) -> Result:
        example = self._evaluation.examples[index]
        scorers = self._evaluation.scorers_of(example)
        scores, answer = dict[Scorer, float](), ""
        try:
            if self._evaluation.return_results or any(scorer.judges_text for scorer in scorers):
                answer = await self._answer(example, version)
            for scorer in scorers:
                match scorer:
                    case Scorer.EXACT_MATCH:
                        scores[scorer] = exact_match(answer, example.expected or "")
                    case Scorer.CONTAINS:
                        scores[scorer] = contains_all(answer, example.wanted)
                    case Scorer.VALID_JSON:
                        scores[scorer] = valid_json(answer)
                    case Scorer.LOG_LIKELIHOOD:
                        scores[scorer] = await self._log_likelihood(example, version)
        except (InvalidRequest, GenerationFailed) as error:
            return Result(index, version, "", {}, str(error))
        return Result(index, version, answer, scores)

    async def _answer(self, example: Example, version: int) -> str:
        await self._capacity()
        async with self._runner.open(version) as (shard, served):
            prompt = await shard.render(example.prompt)
            sampling = {"max_tokens": self._evaluation.max_tokens}
            output = await self._generate(shard, served, example.prompt, prompt, sampling)
        return output.deltas[0].text

    async def _log_likelihood(self, example: Example, version: int) -> float:
        """Nats per token of `expected`.

        It is tokenized apart from the prompt, as an answer would be, and not with it: a token
        that spans the boundary would be one that no answer can begin with.
        """
        await self._capacity()
        async with self._runner.open(version) as (shard, served):
            asked = await shard.render(example.prompt)
            expected = await shard.tokenize(example.expected or "")
            token_ids = [*asked.token_ids, *expected]
            # The engine scores what it is given, and must generate one token besides. Text of
            # the scored tokens would be made on the event loop, and nobody reads it.
            sampling = {"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
            prompt = await shard.render(token_ids)
            output = await self._generate(shard, served, token_ids, prompt, sampling)
        logprobs = [
            position.chosen.logprob
            for position in output.prompt_logprobs[len(asked.token_ids) :]
            if position.chosen is not None
        ]
        if len(logprobs) != len(expected):
            raise GenerationFailed(f"{shard.name} did not score all tokens of `expected`")
        try:
            return mean_logprob(logprobs)
        except ValueError as error:
            raise GenerationFailed(str(error)) from error

    async def _generate(
        self,
        shard: Shard,
        version: ServedVersion | None,
        asked: Prompt,
        prompt: RenderedPrompt,
        sampling: Mapping[str, Any],
    ) -> Output:
        request = GenerationRequest(
            request_id=f"evaluation-{self._id}-{next(self._numbers)}",
            prompt=asked,
            sampling={"temperature": 0.0, **sampling},
            stream=False,
            cache_salt=self._evaluation.cache_salt,
        )
        async with aclosing(shard.generate(request, prompt, version)) as outputs:
            async for output in outputs:
                return output  # the only one, since it is no stream
        raise GenerationFailed(f"{shard.name} ended the request without an answer")

    async def _capacity(self) -> None:
        async with self._asking:
            while not await self._has_capacity():  # noqa: ASYNC110  # the engine tells no one
                await asyncio.sleep(POLL_INTERVAL_S)
