"""A checkpoint becomes a version that serves, once: what it tells, traffic, restarts."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.adapter_codec import MAX_ARMS, MAX_LABELS, MAX_WEIGHT
from gateway.publication_note import note_path
from gateway.publishing import shared
from store.records import Arm, Guard, NewVersion, VersionState
from store.sqlite_registry import SqliteRegistry
from tests.engine.library import ME, TENANT, key
from tests.gateway.trained import (
    FINGERPRINTS,
    JOB,
    STEP,
    UID,
    Trained,
    resolved,
    trained,
)
from trainer.events import PublicationState
from trainer.spec import DataSpec, LoraSpec

REJECTED, SERVING, FAILED = (
    PublicationState.REJECTED,
    PublicationState.SERVING,
    PublicationState.FAILED,
)


@pytest.fixture
async def at(tmp_path: Path) -> AsyncIterator[Trained]:
    async with trained(tmp_path) as at:
        yield at


async def split(at: Trained, *arms: tuple[int, int], guard: Guard | None = None) -> None:
    await at.library.ledger.set_traffic(
        TENANT, "sql", [Arm(*arm) for arm in arms], guard=guard, etag="", actor=ME
    )


# --- a version, and what is known of it


async def test_a_checkpoint_becomes_a_version_without_traffic_and_tells_what_was_measured(
    at: Trained,
) -> None:
    publication = await at.publish(at.checkpoint(off_by=0.125), labels={"team": "search"})
    assert (publication.state, publication.version) == (SERVING, 1)
    assert (publication.adapter, publication.traffic_percent) == ("sql", 0)
    assert not publication.reasons
    record = await at.library.registry.version(*key(1))
    assert record.state is VersionState.READY and not record.take_traffic
    assert record.source_uri == f"train:{UID}/1/{STEP}"
    assert record.labels == {"team": "search", "job": JOB, "dataset": "faq"}
    assert record.fingerprints == FINGERPRINTS
    assert record.content is not None
    assert record.expected_sha256 == record.content.weights_sha256
    assert await at.weights() == {}
    report = publication.gate
    assert report is not None and (report.rows, report.tokens) == (2, 6)
    assert report.logprob_delta_mean == pytest.approx(0.125) == report.logprob_delta_max
    assert report.base_eval_loss == pytest.approx(2 * report.eval_loss)
    assert report.effect_mean == pytest.approx(report.eval_loss)
    assert report.trained_effect_mean == pytest.approx(report.effect_mean)
    assert report.effect_ratio == pytest.approx(1.0)
    assert report.limits == {
        "max_logprob_delta_mean": 0.2,
        "max_eval_loss_ratio": 1.0,
        "min_effect_ratio": 0.5,
    }
    assert (report.trained_as, report.served_as) == ("nf4/bfloat16", "bfloat16")


async def test_a_checkpoint_of_a_release_that_did_not_measure_its_effect_is_published(
    at: Trained,
) -> None:
    publication = await at.publish(at.checkpoint(arrives=None))
    assert publication.state is SERVING and publication.gate is not None
    assert publication.gate.trained_effect_mean is None and publication.gate.effect_ratio is None


async def test_labels_of_ours_win_and_all_fit_into_a_version(at: Trained) -> None:
    theirs = {f"key-{number:02}": "x" for number in range(MAX_LABELS - 1)}
    await at.publish(at.checkpoint(), labels={**theirs, "job": "other"})
    labels = (await at.library.registry.version(*key(1))).labels
    assert len(labels) == MAX_LABELS
    assert (labels["job"], labels["dataset"]) == (JOB, "faq")
    assert sorted(theirs)[: MAX_LABELS - 2] == sorted(labels.keys() - {"job", "dataset"})


@pytest.mark.parametrize("told", ["linked", "real"])
async def test_jobs_may_lie_behind_a_link(tmp_path: Path, told: str) -> None:
    real, linked = tmp_path / "elsewhere", tmp_path / "state" / "jobs"
    real.mkdir()
    linked.parent.mkdir()
    linked.symlink_to(real)
    async with trained(tmp_path) as at:
        checkpoint = at.checkpoint()
        publication = await at.publish(checkpoint.resolve() if told == "real" else checkpoint)
        assert publication.state is SERVING
        record = await at.library.registry.version(*key(1))
        assert record.source_uri == f"train:{UID}/1/{STEP}"


async def test_the_rows_are_scored_apart_from_other_tenants_caches(at: Trained) -> None:
    await at.publish(at.checkpoint())
    assert {request.cache_salt for request, _ in at.shard.asked} == {TENANT}


async def test_the_same_again_finds_the_version_and_measures_nothing(at: Trained) -> None:
    checkpoint = at.checkpoint()
    first = await at.publish(checkpoint)
    asked = len(at.shard.asked)
    assert await at.publish(checkpoint) == first
    assert len(at.shard.asked) == asked and await at.versions() == [1]


async def test_two_at_once_make_one_version(at: Trained) -> None:
    checkpoint = at.checkpoint()
    one, other = await asyncio.gather(at.publish(checkpoint, 10), at.publish(checkpoint, 10))
    assert one == other and await at.versions() == [1]


async def test_each_checkpoint_and_each_adapter_has_a_version_of_its_own(at: Trained) -> None:
    first, second = at.checkpoint(1), at.checkpoint(2)
    assert [(await at.publish(each)).version for each in (first, second)] == [1, 2]
    other = await at.publish(first, adapter="other")
    assert (other.adapter, other.version, other.state) == ("other", 1, SERVING)


async def test_a_version_that_was_deleted_is_made_again(at: Trained) -> None:
    checkpoint = at.checkpoint()
    await at.publish(checkpoint)
    await at.library.delete(1)
    again = await at.publish(checkpoint)
    assert (again.state, again.version) == (SERVING, 2)
    assert again.gate is not None


async def test_one_who_leaves_leaves_nothing_that_was_not_checked(at: Trained) -> None:
    checkpoint = at.checkpoint(off_by=1.0)
    at.library.probe.may_answer.clear()
    publishing = asyncio.create_task(at.publish(checkpoint, 50))
    while not at.library.probe.probed:
        await asyncio.sleep(0.001)
    publishing.cancel()
    await asyncio.gather(publishing, return_exceptions=True)
    at.library.probe.may_answer.set()
    await at.library.until(1, VersionState.FAILED)
    assert await at.weights() == {}


@pytest.mark.parametrize("before", [(), (1,)])
async def test_one_who_leaves_while_traffic_is_given_is_told_that_it_was(
    at: Trained, monkeypatch: pytest.MonkeyPatch, before: tuple[int, ...]
) -> None:
    for step in before:
        await at.publish(at.checkpoint(step), 100)
    name = "set_traffic" if before else "promote"
    change, begun, may_go_on = getattr(at.library.ledger, name), asyncio.Event(), asyncio.Event()

    async def slow(*args: Any, **fields: Any) -> object:
        begun.set()
        await may_go_on.wait()
        return await change(*args, **fields)

    monkeypatch.setattr(at.library.ledger, name, slow)
    publishing = asyncio.create_task(at.publish(at.checkpoint(2), 50))
    await begun.wait()
    publishing.cancel()
    await asyncio.wait({publishing}, timeout=0.05)
    may_go_on.set()
    publication = await publishing
    version, percent = (2, 50) if before else (1, 100)
    assert (publication.state, publication.version) == (SERVING, version)
    assert publication.traffic_percent == percent and publication.gate is not None
    assert version in await at.weights()


async def test_one_who_leaves_while_the_version_is_loaded_is_not_held_up(
    at: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading = asyncio.Event()

    async def load(key: object) -> None:
        loading.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(at.library.catalog, "load", load)
    publishing = asyncio.create_task(at.publish(at.checkpoint(), 50))
    await loading.wait()
    publishing.cancel()
    await asyncio.wait({publishing}, timeout=5)
    assert publishing.cancelled() and await at.weights() == {}


# --- traffic


@pytest.mark.parametrize("percent", [1, 100])
async def test_an_adapter_without_a_split_gives_it_all(at: Trained, percent: int) -> None:
    publication = await at.publish(at.checkpoint(), percent)
    assert publication.traffic_percent == 100 and await at.weights() == {1: 100}


async def test_others_keep_their_proportions_and_their_guard(at: Trained) -> None:
    for step in (1, 2):
        await at.publish(at.checkpoint(step))
    guard = Guard(2, 20, max_error_ratio=0.1)
    await split(at, (1, 3), (2, 1), guard=guard)
    publication = await at.publish(at.checkpoint(3), 20)
    assert publication.traffic_percent == 20
    assert await at.weights() == {1: 3, 2: 1, 3: 1}
    assert (await at.library.registry.adapter(TENANT, "sql")).guard == guard


async def test_all_of_the_traffic_is_a_promotion(at: Trained) -> None:
    await at.publish(at.checkpoint(1), 100)
    publication = await at.publish(at.checkpoint(2), 100)
    assert publication.traffic_percent == 100 and await at.weights() == {2: 100}


async def test_traffic_is_not_moved_twice(at: Trained) -> None:
    first, second = at.checkpoint(1), at.checkpoint(2)
    await at.publish(first, 100)
    await at.publish(second, 10)
    await split(at, (1, 1), (2, 1))
    again = await at.publish(second, 10)
    assert again.traffic_percent == 50 and await at.weights() == {1: 1, 2: 1}
    await at.publish(second, 0)
    assert await at.weights() == {1: 1, 2: 1}


async def test_a_split_that_others_change_meanwhile_is_read_again(
    at: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    await at.publish(at.checkpoint(1), 100)
    await at.publish(at.checkpoint(2))
    set_traffic = at.library.catalog.set_traffic
    races = 3

    async def raced(*args: Any, **fields: Any) -> object:
        nonlocal races
        if races:
            races -= 1
            await split(at, (1, 1), (2, 1))
        return await set_traffic(*args, **fields)

    monkeypatch.setattr(at.library.catalog, "set_traffic", raced)
    publication = await at.publish(at.checkpoint(3), 50)
    assert publication.state is SERVING and races == 0
    assert await at.weights() == {1: 1, 2: 1, 3: 2}


async def test_a_split_without_room_stays_and_says_so(
    at: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.publishing.MAX_ARMS", 1)
    await at.publish(at.checkpoint(1), 100)
    publication = await at.publish(at.checkpoint(2), 10)
    assert (publication.state, publication.version) == (FAILED, 2)
    assert "SetTraffic" in publication.reasons[0] and await at.weights() == {1: 100}


async def test_a_version_that_cannot_be_loaded_gets_no_traffic(at: Trained) -> None:
    checkpoint = at.checkpoint()
    await at.publish(checkpoint)
    await at.library.catalog.unload(key(1))
    at.library.core.refusals[key(1)] = 2
    publication = await at.publish(checkpoint, 100)
    assert publication.state is FAILED and "the engine refuses it" in publication.reasons[0]
    assert await at.weights() == {}
    assert (await at.publish(checkpoint, 100)).state is SERVING


@given(
    weights=st.lists(st.integers(1, MAX_WEIGHT), min_size=1, max_size=MAX_ARMS - 1),
    percent=st.integers(1, 99),
)
def test_shares_are_exact_enough_and_numbers_that_a_caller_could_set(
    weights: list[int], percent: int
) -> None:
    arms = [Arm(number, weight) for number, weight in enumerate(weights, 1)]
    split = shared(arms, 99, percent)
    assert [arm.version for arm in split] == [*range(1, len(arms) + 1), 99]
    assert all(1 <= arm.weight <= MAX_WEIGHT for arm in split)
    total, before = sum(arm.weight for arm in split), sum(weights)
    assert split[-1].weight / total == pytest.approx(percent / 100, abs=1e-4)
    for arm, weight in zip(split, weights, strict=False):
        wanted = (100 - percent) / 100 * weight / before
        assert arm.weight / total == pytest.approx(wanted, abs=1e-4)


# --- restarts


async def crash_in_publication(root: Path, checkpoint: Path, at: Trained) -> None:
    """As the registry and the disk are when the host dies while the version is checked."""
    at.library.probe.may_answer.clear()
    publishing = asyncio.create_task(at.publish(checkpoint, 100))
    while not at.library.probe.probed:
        await asyncio.sleep(0.001)
    await at.library.catalog.close()
    publishing.cancel()
    await asyncio.gather(publishing, return_exceptions=True)
    assert await at.library.state(1) is VersionState.VALIDATING


@pytest.mark.parametrize(("off_by", "state"), [(0.0, SERVING), (0.5, REJECTED)])
async def test_what_a_restart_interrupts_is_gated_by_the_next_start(
    tmp_path: Path, off_by: float, state: PublicationState
) -> None:
    async with trained(tmp_path) as at:
        checkpoint = at.checkpoint(off_by=off_by)
        await crash_in_publication(tmp_path, checkpoint, at)
    async with trained(tmp_path) as at:
        await at.library.catalog.resume()
        publication = await at.publish(checkpoint, 100)
        assert (publication.state, publication.version) == (state, 1)
        assert publication.gate is not None and at.shard.asked
        assert await at.weights() == ({1: 100} if state is SERVING else {})


async def test_what_was_found_before_a_restart_is_told_after_it(tmp_path: Path) -> None:
    async with trained(tmp_path) as at:
        good, bad = at.checkpoint(1), at.checkpoint(2, off_by=0.5)
        before = [await at.publish(each) for each in (good, bad)]
    async with trained(tmp_path) as at:
        assert [await at.publish(each) for each in (good, bad)] == before
        assert not at.shard.asked and await at.versions() == [1, 2]


async def test_a_version_whose_checkpoint_is_gone_after_a_restart_is_never_ready(
    tmp_path: Path,
) -> None:
    async with trained(tmp_path) as at:
        checkpoint = at.checkpoint()
        await crash_in_publication(tmp_path, checkpoint, at)
    note_path(checkpoint, "sql").unlink()
    async with trained(tmp_path) as at:
        await at.library.catalog.resume()
        failed = await at.library.until(1, VersionState.FAILED)
        assert not at.shard.asked
        assert not any(str(tmp_path) in finding for finding in failed.findings)


async def test_a_version_that_names_no_checkpoint_is_never_ready(tmp_path: Path) -> None:
    async with trained(tmp_path) as at:
        shutil.copytree(at.checkpoint(), at.sources.jobs / "elsewhere")
    async with SqliteRegistry(tmp_path / "registry.sqlite") as registry:
        new = NewVersion(TENANT, "sql", "train:../jobs/elsewhere")
        await registry.begin_version(new, request_id="", actor=ME)
    async with trained(tmp_path) as at:
        await at.library.catalog.resume()
        await at.library.until(1, VersionState.FAILED)


# --- before anything is trained


def test_what_could_be_served_has_no_findings(at: Trained) -> None:
    lora = LoraSpec(r=8, target_modules=("q_proj", "down_proj"))
    assert at.publisher.findings(resolved(lora=lora)) == []


def test_what_could_not_be_served_is_told_by_fields_of_the_contract(at: Trained) -> None:
    spec = resolved(
        lora=LoraSpec(r=512, bias="all", target_modules=("c_attn",)),
        data=DataSpec(max_sequence_tokens=65),
    )
    found = at.publisher.findings(spec)
    assert sorted(finding.field for finding in found) == [
        "spec.data.max_sequence_tokens",
        "spec.lora.bias",
        "spec.lora.r",
        "spec.lora.target_modules",
    ]
    assert all(": " in finding.text or "must" in finding.text for finding in found)
