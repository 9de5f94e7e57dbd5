"""An evaluation scores every example of every version, gives way, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from engine import evaluation as module
from engine.errors import (
    AdapterLoadFailed,
    ChatTemplateMissing,
    GenerationFailed,
    InvalidRequest,
    PromptTooLong,
    ShardUnavailable,
    Violation,
)
from engine.evaluation import Evaluation, Progress, Result, Summary
from engine.examples import Example
from engine.fake import FakeShard, Script
from engine.generation import (
    Chat,
    GenerationRequest,
    Output,
    PositionLogprobs,
    Prompt,
    ServedVersion,
    TokenLogprob,
)
from engine.rendering import RenderedPrompt
from engine.scoring import Scorer

SOON_S = 5.0
EXACT, CONTAINS, JSON, LIKELIHOOD = Scorer


class OracleShard(FakeShard):
    """Answers "v" and the version, as in "v2"; version v gives token k log probability -v-k/8."""

    def __init__(self, script: Script | None = None) -> None:
        super().__init__(script=script)
        self.asked: list[tuple[GenerationRequest, list[int], int]] = []
        self.most_running = 0
        self.refuses: dict[Prompt, Exception] = {}
        """What rendering a prompt raises."""
        self.spoils_logprobs = False

    async def render(self, prompt: Prompt) -> RenderedPrompt:
        if isinstance(prompt, str | Chat) and prompt in self.refuses:
            raise self.refuses[prompt]
        return await super().render(prompt)

    async def generate(
        self, request: GenerationRequest, prompt: RenderedPrompt, version: ServedVersion | None
    ) -> AsyncGenerator[Output, None]:
        number = version.version if version else 0
        self.asked.append((request, list(prompt.token_ids), number))
        async with aclosing(super().generate(request, prompt, version)) as outputs:
            self.most_running = max(self.most_running, len(self.running) + 1)
            async for output in outputs:
                (delta,) = output.deltas
                logprobs = self._logprobs(request, prompt.token_ids, number)
                yield replace(
                    output,
                    deltas=[replace(delta, text=f"v{number}")],
                    prompt_logprobs=logprobs,
                )

    def _logprobs(
        self, request: GenerationRequest, token_ids: Sequence[int], version: int
    ) -> list[PositionLogprobs]:
        if "prompt_logprobs" not in request.sampling:
            return []
        values = [math.nan if self.spoils_logprobs else -version - i / 8 for i in token_ids]
        first, *rest = [
            PositionLogprobs(TokenLogprob(i, value, 1, ""), ())
            for i, value in zip(token_ids, values, strict=True)
        ]
        return [replace(first, chosen=None), *rest]


@dataclass
class Host:
    """Opens versions on one shard, and says whether there is capacity."""

    shard: OracleShard = field(default_factory=OracleShard)
    open_now: Counter[int] = field(default_factory=Counter)
    failure: Exception | None = None
    """What opening a version raises."""
    free: asyncio.Event = field(default_factory=asyncio.Event)
    questions: int = 0

    def __post_init__(self) -> None:
        self.free.set()

    @asynccontextmanager
    async def open(self, version: int) -> AsyncIterator[tuple[OracleShard, ServedVersion | None]]:
        if self.failure:
            raise self.failure
        self.open_now[version] += 1
        try:
            served = ServedVersion("tenant", "pirate", version, version, "/nowhere", "digest")
            yield self.shard, served if version else None
        finally:
            self.open_now[version] -= 1

    async def has_capacity(self) -> bool:
        self.questions += 1
        return self.free.is_set()


def evaluation(*examples: Example, **others: Any) -> Evaluation:
    chosen: dict[str, Any] = {"versions": [0, 1], "max_tokens": 2, "return_results": True}
    return Evaluation(examples or [Example("one two", "v1")], **(chosen | others))


async def events_of(
    asked: Evaluation, host: Host | None = None
) -> tuple[list[Result], list[Progress], list[Summary]]:
    host = host or Host()
    events: list[Result | Progress | Summary] = []
    async with asyncio.timeout(SOON_S), aclosing(asked.run(host, host.has_capacity)) as run:
        async for event in run:
            events.append(event)
    assert not host.shard.running
    assert not +host.open_now
    return (
        [event for event in events if isinstance(event, Result)],
        [event for event in events if isinstance(event, Progress)],
        [event for event in events if isinstance(event, Summary)],
    )


def refusals(*examples: Example, **others: Any) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        evaluation(*examples, **others)
    return {violation.field: violation.description for violation in caught.value.violations}


# --- what it yields ---------------------------------------------------------


async def test_every_example_of_every_version_is_scored() -> None:
    examples = [Example("one two", "v1"), Example("three", contains=("V",)), Example("four")]
    results, progress, summaries = await events_of(evaluation(*examples))
    found = {(result.example, result.version): result for result in results}
    assert set(found) == {(example, version) for example in range(3) for version in (0, 1)}
    assert found[0, 0].answer == "v0"
    assert found[0, 0].scores == {EXACT: 0, CONTAINS: 0, JSON: 0, LIKELIHOOD: 0.0}
    assert found[0, 1].scores == {EXACT: 1, CONTAINS: 1, JSON: 0, LIKELIHOOD: -1.0}
    assert found[1, 1].scores == {CONTAINS: 1, JSON: 0}
    assert found[2, 1].scores == {JSON: 0}
    assert progress == [Progress(done, 6) for done in range(1, 7)]
    (summary,) = summaries
    assert {(s.version, s.scorer): (s.mean, s.count) for s in summary.scores} == {
        (0, EXACT): (0.0, 1),
        (0, CONTAINS): (0.5, 2),
        (0, JSON): (0.0, 3),
        (0, LIKELIHOOD): (0.0, 1),
        (1, EXACT): (1.0, 1),
        (1, CONTAINS): (1.0, 2),
        (1, JSON): (0.0, 3),
        (1, LIKELIHOOD): (-1.0, 1),
    }
    assert {d.scorer: d.difference for d in summary.differences} == {
        EXACT: 1.0,
        CONTAINS: 0.5,
        JSON: 0.0,
        LIKELIHOOD: -1.0,
    }
    assert summary.failed_count == 0


async def kinds_of(asked: Evaluation) -> list[type]:
    host = Host()
    async with aclosing(asked.run(host, host.has_capacity)) as run:
        return [type(event) async for event in run]


async def test_the_summary_comes_last_and_results_only_if_asked_for() -> None:
    kinds = await kinds_of(evaluation())
    assert kinds == [Result, Progress, Result, Progress, Summary]
    assert await kinds_of(evaluation(return_results=False)) == [Progress, Progress, Summary]


async def test_only_the_scorers_that_were_chosen_judge() -> None:
    (first, _), _, (summary,) = await events_of(evaluation(scorers=[CONTAINS]))
    assert set(first.scores) == {CONTAINS}
    assert {score.scorer for score in summary.scores} == {CONTAINS}


async def test_examples_go_to_all_versions_in_turn() -> None:
    examples = [Example("one"), Example("one two")]
    asked = evaluation(*examples, versions=[3, 0, 1], scorers=[JSON], max_concurrency=1)
    results, _, _ = await events_of(asked)
    order = [(result.example, result.version) for result in results]
    assert order == [(0, 3), (0, 0), (0, 1), (1, 3), (1, 0), (1, 1)]


# --- what it asks of the engine ---------------------------------------------


async def test_answers_are_greedy_and_for_the_tenant_alone() -> None:
    host = Host()
    asked = evaluation(scorers=[EXACT], max_tokens=7, cache_salt="tenant")
    await events_of(asked, host)
    assert len({request.request_id for request, _, _ in host.shard.asked}) == 2
    for request, _, _ in host.shard.asked:
        assert request.request_id.startswith("evaluation-")
        assert request.sampling == {"temperature": 0.0, "max_tokens": 7}
        assert request.cache_salt == "tenant"
        assert not request.stream


async def test_a_log_likelihood_is_that_of_the_expected_tokens_after_the_prompt() -> None:
    host = Host()
    example = Example("one two three", "four five")  # tokens 0 1 2, and then 0 1
    asked = evaluation(example, scorers=[LIKELIHOOD], versions=[2], return_results=False)
    _, _, (summary,) = await events_of(asked, host)
    ((request, token_ids, version),) = host.shard.asked  # no answer, since nobody reads one
    assert (token_ids, version) == ([0, 1, 2, 0, 1], 2)
    assert request.sampling["prompt_logprobs"] == 0
    assert request.sampling["max_tokens"] == 1
    assert summary.scores[0].mean == -2 - 1 / 16


async def test_at_most_so_many_run_at_once() -> None:
    host = Host(OracleShard(Script(token_interval_s=0.001)))
    asked = evaluation(*[Example("one")] * 20, scorers=[JSON], max_concurrency=3)
    await events_of(asked, host)
    assert host.shard.most_running == 3


# --- giving way -------------------------------------------------------------


async def test_nothing_is_generated_without_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_INTERVAL_S", 0.001)
    host = Host()
    host.free.clear()
    run = asyncio.create_task(events_of(evaluation(), host))
    async with asyncio.timeout(SOON_S):
        while host.questions < 5:
            await asyncio.sleep(0)
    assert host.shard.asked == []
    assert not +host.open_now, "no version is held while it waits"
    host.free.set()
    assert len((await run)[0]) == 2


async def test_capacity_is_asked_for_before_each_generation() -> None:
    host = Host()
    await events_of(evaluation(), host)
    assert host.questions == len(host.shard.asked) == 4  # an answer and a likelihood, twice


async def test_a_caller_who_does_not_read_stops_the_generation_and_may_leave() -> None:
    host, before = Host(), asyncio.all_tasks()
    asked = evaluation(*[Example("one")] * 100, scorers=[JSON], max_concurrency=2)
    async with aclosing(asked.run(host, host.has_capacity)) as run:
        await anext(run)
        for _ in range(1000):
            await asyncio.sleep(0)
        assert len(host.shard.asked) <= 6
    assert asyncio.all_tasks() == before


async def test_leaving_early_ends_everything_that_it_started() -> None:
    host = Host(OracleShard(Script(token_interval_s=60)))
    asked = evaluation(*[Example("one")] * 9, scorers=[JSON], max_concurrency=3)
    before = asyncio.all_tasks()
    async with aclosing(asked.run(host, host.has_capacity)) as run:
        first = asyncio.ensure_future(anext(run))
        async with asyncio.timeout(SOON_S):
            while len(host.shard.running) < 3:
                await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    assert len(host.shard.aborted) == 3
    assert not +host.open_now
    assert asyncio.all_tasks() == before


# --- what goes wrong --------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [PromptTooLong(Violation("prompt", "shorten it")), GenerationFailed("the engine failed")],
    ids=["refused", "failed"],
)
async def test_an_example_that_fails_has_an_error_and_no_score(error: Exception) -> None:
    host = Host()
    host.shard.refuses["bad"] = error
    asked = evaluation(Example("bad", "v1"), Example("good", "v1"), max_concurrency=1)
    results, progress, (summary,) = await events_of(asked, host)
    assert results[0] == Result(0, 0, "", {}, str(error))
    assert [bool(result.error) for result in results] == [True, True, False, False]
    assert progress[-1] == Progress(4, 4)
    assert summary.failed_count == 2
    assert {score.count for score in summary.scores} == {1}


async def test_a_log_likelihood_that_is_no_number_is_an_error() -> None:
    host = Host()
    host.shard.spoils_logprobs = True
    results, _, (summary,) = await events_of(evaluation(scorers=[LIKELIHOOD]), host)
    assert [result.error for result in results] == ["the model answers in NaN or infinity"] * 2
    assert (summary.scores, summary.differences, summary.failed_count) == ([], [], 2)


async def test_a_shard_that_dies_ends_it() -> None:
    host = Host(OracleShard(Script(dies_after_tokens=1)))
    before = asyncio.all_tasks()
    with pytest.raises(ShardUnavailable):
        await events_of(evaluation(), host)
    assert asyncio.all_tasks() == before


async def test_results_before_the_end_are_not_lost() -> None:
    host, seen = Host(), []
    host.shard.refuses["deadly"] = ShardUnavailable("shard-0")
    asked = evaluation(Example("one"), Example("deadly"), versions=[0], max_concurrency=1)
    with pytest.raises(ShardUnavailable):
        async for event in asked.run(host, host.has_capacity):
            seen.append(type(event))
    assert seen == [Result, Progress]


@pytest.mark.parametrize(
    "error", [AdapterLoadFailed("pirate", 1, "no room"), ChatTemplateMissing("base")], ids=repr
)
async def test_what_would_fail_every_example_ends_it(error: Exception) -> None:
    with pytest.raises(type(error)):
        await events_of(evaluation(), Host(failure=error))


# --- what cannot be asked ---------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "field", "sentence"),
    [
        ({"versions": []}, "versions", "must have 1 to 8 entries, has 0"),
        ({"versions": range(9)}, "versions", "must have 1 to 8 entries, has 9"),
        ({"versions": [1, 0, 1]}, "versions", "names one twice; name each once"),
        ({"scorers": [EXACT, EXACT]}, "scorers", "names one twice; name each once"),
        ({"max_tokens": 0}, "max_tokens", "must be 1 to 4096, is 0"),
        ({"max_tokens": 4097}, "max_tokens", "must be 1 to 4096, is 4097"),
        ({"max_concurrency": 65}, "max_concurrency", "must be 1 to 64, is 65"),
    ],
    ids=str,
)
def test_what_is_out_of_bounds_is_refused(wrong: dict[str, Any], field: str, sentence: str) -> None:
    assert refusals(**wrong) == {field: sentence}


@pytest.mark.parametrize(
    ("scorer", "need"),
    [
        (EXACT, "`expected`"),
        (CONTAINS, "`contains` or `expected`"),
        (LIKELIHOOD, "`expected` that is not empty"),
    ],
)
def test_a_scorer_needs_an_example_that_it_can_judge(scorer: Scorer, need: str) -> None:
    said = refusals(Example("one"), Example("two"), scorers=[scorer])
    assert said == {"scorers": f"no example has what {scorer.name} needs: {need}"}
    assert evaluation(Example("one"), Example("two", "2"), scorers=[scorer])


def test_everything_wrong_is_told_at_once() -> None:
    with pytest.raises(InvalidRequest) as caught:
        Evaluation([], [1, 1], max_tokens=-1, max_concurrency=0)
    fields = [violation.field for violation in caught.value.violations]
    assert fields == ["examples", "versions", "max_tokens", "max_concurrency"]


def test_a_bad_example_is_named_by_its_place() -> None:
    bad = [Example("one"), Example(""), Example(Chat(())), Example("two", contains=("a", ""))]
    assert list(refusals(*bad)) == [
        "examples[1].text",
        "examples[2].chat.messages",
        "examples[3].contains[1]",
    ]


def test_there_may_be_so_many_examples_and_no_more() -> None:
    assert refusals(*[Example("one")] * 10_001) == {"examples": "may have 10000 entries, has 10001"}
    assert evaluation(*[Example("one")] * 10_000)
