"""What keeps a checkpoint from being published: what it is itself, and what is not its fault."""

from __future__ import annotations

import errno
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NoReturn

import pytest
from prometheus_client import REGISTRY

from engine.errors import ShardUnavailable
from store.artifacts import WEIGHTS_FILE
from store.records import VersionState
from store.upload_folder import DatabaseFull
from tests.engine.drafts import configure
from tests.engine.library import key
from tests.gateway.trained import FINGERPRINTS, LOOSE, STEP, Trained, trained
from trainer.events import PublicationState
from trainer.spec import GateSpec

REJECTED, SERVING, FAILED = (
    PublicationState.REJECTED,
    PublicationState.SERVING,
    PublicationState.FAILED,
)


@pytest.fixture
async def at(tmp_path: Path) -> AsyncIterator[Trained]:
    async with trained(tmp_path) as at:
        yield at


def rejections(reason: str) -> float:
    name = "lora_gateway_gate_rejections_total"
    return REGISTRY.get_sample_value(name, {"reason": reason}) or 0.0


# --- its own fault


async def test_pitfalls_what_the_engine_does_not_say_after_the_trainer_is_rejected_and_counted(
    at: Trained,
) -> None:
    before = rejections("logprob_delta")
    publication = await at.publish(at.checkpoint(off_by=0.5), 100)
    assert (publication.state, publication.version) == (REJECTED, 1)
    (reason,) = publication.reasons
    assert "differ by 0.5 nats a token, and max_logprob_delta_mean is 0.2" in reason
    assert publication.gate is not None
    assert publication.gate.logprob_delta_mean == pytest.approx(0.5)
    record = await at.library.registry.version(*key(1))
    assert record.state is VersionState.FAILED and record.findings == publication.reasons
    assert await at.weights() == {} and at.library.core.keys == set()
    assert rejections("logprob_delta") == before + 1


async def test_a_refusal_stands_until_other_limits_are_asked_for(at: Trained) -> None:
    checkpoint = at.checkpoint(off_by=0.5)
    first = await at.publish(checkpoint)
    asked = len(at.shard.asked)
    assert await at.publish(checkpoint) == first
    assert len(at.shard.asked) == asked and await at.versions() == [1]
    loose = await at.publish(checkpoint, gate=LOOSE)
    assert (loose.state, loose.version) == (SERVING, 2)
    assert loose.gate is not None and loose.gate.limits["max_logprob_delta_mean"] == 10.0
    assert await at.publish(checkpoint, gate=LOOSE) == loose
    assert await at.versions() == [1, 2], "the same checkpoint becomes one version"


async def test_stricter_limits_are_held_against_what_was_measured_and_the_version_goes_on(
    at: Trained,
) -> None:
    checkpoint = at.checkpoint()
    serving = await at.publish(checkpoint, 100)
    assert serving.state is SERVING and serving.gate is not None
    asked, before = len(at.shard.asked), rejections("eval_loss")
    strict = GateSpec(max_eval_loss=0.01, max_eval_loss_ratio=0.25)
    rejected = await at.publish(checkpoint, 50, gate=strict)
    assert (rejected.state, rejected.version, rejected.traffic_percent) == (REJECTED, 1, 0)
    assert len(rejected.reasons) == 2 and "max_eval_loss is 0.01" in rejected.reasons[1]
    assert rejected.gate is not None and rejected.gate.eval_loss == serving.gate.eval_loss
    assert rejected.gate.limits["max_eval_loss"] == 0.01
    assert await at.publish(checkpoint, 50, gate=strict) == rejected

    assert await at.library.state(1) is VersionState.READY and await at.weights() == {1: 100}
    assert len(at.shard.asked) == asked and await at.versions() == [1]
    assert rejections("eval_loss") == before, "what counts is what the engine was asked"
    # Limits that it keeps within say so, and the first ones answer as before.
    kept = await at.publish(checkpoint, gate=GateSpec(max_eval_loss=10.0))
    assert kept.state is SERVING and kept.gate is not None
    assert kept.gate.limits["max_eval_loss"] == 10.0
    assert await at.publish(checkpoint, 100) == serving


async def test_limits_are_the_callers_also_where_a_crash_came_between(tmp_path: Path) -> None:
    async with trained(tmp_path) as at:
        checkpoint = at.checkpoint()
        await at.publish(checkpoint)
    async with trained(tmp_path) as at:
        rejected = await at.publish(checkpoint, gate=GateSpec(max_eval_loss=0.01))
        assert (rejected.state, rejected.version) == (REJECTED, 1)
        assert (await at.publish(checkpoint)).state is SERVING and not at.shard.asked


async def test_limits_on_the_loss_are_the_jobs_own(at: Trained) -> None:
    before = rejections("eval_loss")
    gate = GateSpec(max_eval_loss=0.01, max_eval_loss_ratio=0.25)
    publication = await at.publish(at.checkpoint(), gate=gate)
    assert publication.state is REJECTED and len(publication.reasons) == 2
    assert rejections("eval_loss") == before + 1


async def test_what_cannot_be_served_at_all_is_rejected_before_an_engine_sees_it(
    at: Trained,
) -> None:
    before = rejections("shape")
    checkpoint = at.checkpoint(spoil=configure(r=4))
    publication = await at.publish(checkpoint)
    assert publication.state is REJECTED and "other shapes" in publication.reasons[0]
    assert publication.gate is None and at.library.core.loads == []
    assert rejections("shape") == before + 1
    assert await at.publish(checkpoint) == publication and await at.versions() == [1]


async def test_what_changes_nothing_is_rejected(at: Trained) -> None:
    before = rejections("effect")
    at.library.probe.says[key(1)] = ["it changes nothing"]
    publication = await at.publish(at.checkpoint())
    assert (publication.state, publication.reasons) == (REJECTED, ("it changes nothing",))
    assert rejections("effect") == before + 1


async def test_what_the_engine_applies_next_to_nothing_of_is_rejected(at: Trained) -> None:
    before = rejections("effect")
    checkpoint = at.checkpoint(arrives=0.1)
    publication = await at.publish(checkpoint, 100)
    assert publication.state is REJECTED and await at.weights() == {}
    (reason,) = publication.reasons
    assert "0.1 of it, and min_effect_ratio is 0.5" in reason
    assert publication.gate is not None and publication.gate.effect_ratio == pytest.approx(0.1)
    assert rejections("effect") == before + 1
    gate = GateSpec(min_effect_ratio=0.05)
    assert (await at.publish(checkpoint, gate=gate)).state is SERVING


@pytest.mark.parametrize("differs", FINGERPRINTS)
async def test_pitfalls_what_was_trained_with_another_model_template_or_tokenizer_is_rejected(
    at: Trained, differs: str
) -> None:
    before = rejections("shape")
    checkpoint = at.checkpoint(fingerprints={**FINGERPRINTS, differs: "9" * 64})
    publication = await at.publish(checkpoint, 100)
    (reason,) = publication.reasons
    assert publication.state is REJECTED
    assert f"fingerprints.{differs} is {'9' * 64}" in reason
    assert f"the served model's is {FINGERPRINTS[differs]}: train" in reason
    assert at.library.core.loads == [] and await at.weights() == {}
    assert rejections("shape") == before + 1
    as_served = await at.publish(at.checkpoint(step=STEP + 1))
    assert as_served.state is SERVING


async def test_answers_in_no_numbers_are_rejected_without_a_report(at: Trained) -> None:
    before = rejections("other")
    at.shard.spoils = {3: float("nan")}
    checkpoint = at.checkpoint()
    publication = await at.publish(checkpoint)
    assert publication.state is REJECTED and "NaN or infinity" in publication.reasons[0]
    assert publication.gate is None and rejections("other") == before + 1
    assert await at.publish(checkpoint) == publication and await at.versions() == [1]


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
async def test_a_trainer_that_says_no_numbers_is_rejected_for_that(at: Trained, odd: float) -> None:
    before = rejections("other")
    checkpoint = at.checkpoint(off_by=odd)
    publication = await at.publish(checkpoint)
    assert (publication.state, publication.version) == (REJECTED, 1)
    (reason,) = publication.reasons
    assert reason.startswith("the trainer's log probabilities are NaN or infinity")
    assert publication.gate is None and rejections("other") == before + 1
    assert await at.publish(checkpoint) == publication and await at.versions() == [1]


# --- not its fault


async def test_a_full_disk_fails_it_and_the_next_try_goes_on(
    at: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoint = at.checkpoint()
    with monkeypatch.context() as patch:
        patch.setattr(at.library.store, "stage", full)
        publication = await at.publish(checkpoint, 100)
    assert (publication.state, publication.version) == (FAILED, 1)
    assert "No space left on device" in publication.reasons[0]
    with monkeypatch.context() as patch:
        patch.setattr("gateway.publishing.write_note", full)
        publication = await at.publish(checkpoint, 100)
    assert publication.state is FAILED and "No space left on device" in publication.reasons[0]

    async def no_room(*_: object, **__: object) -> NoReturn:
        raise DatabaseFull("the gateway's disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(at.library.registry, "begin_version", no_room)
        publication = await at.publish(checkpoint, 100)
    assert publication.state is FAILED and "disk is full" in publication.reasons[0]
    again = await at.publish(checkpoint, 100)
    assert (again.state, again.version, again.traffic_percent) == (SERVING, 2, 100)


async def test_a_shard_that_is_down_fails_it_and_the_same_version_goes_on(at: Trained) -> None:
    checkpoint = at.checkpoint()
    at.library.probe.says[key(1)] = ShardUnavailable("shard-0")
    publication = await at.publish(checkpoint)
    assert publication.state is FAILED and "shard-0 is not available" in publication.reasons[0]
    assert await at.library.state(1) is VersionState.VALIDATING
    del at.library.probe.says[key(1)]
    again = await at.publish(checkpoint)
    assert (again.state, again.version) == (SERVING, 1)


@pytest.mark.parametrize("name", [f"adapter/{WEIGHTS_FILE}", "reference.json", "manifest.json"])
@pytest.mark.parametrize("gone", [True, False])
async def test_a_damaged_checkpoint_becomes_nothing(at: Trained, name: str, gone: bool) -> None:
    checkpoint = at.checkpoint()
    (checkpoint / name).unlink() if gone else (checkpoint / name).write_bytes(b"{}")
    publication = await at.publish(checkpoint)
    assert publication.state is FAILED and "train again" in publication.reasons[0]
    assert str(at.sources.jobs) not in publication.reasons[0]
    assert await at.library.registry.snapshot() == []


async def test_a_bug_is_logged_and_tells_no_internals(
    at: Trained, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> NoReturn:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(at.library.catalog, "create", broken)
    publication = await at.publish(at.checkpoint())
    assert publication.state is FAILED and "secret" in caplog.text
    assert "secret" not in publication.reasons[0]
