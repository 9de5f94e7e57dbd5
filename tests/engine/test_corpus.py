"""Every broken adapter is refused with its own finding, before any engine hears of it."""

from __future__ import annotations

import asyncio
import pickle
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.base_model import base_modules, fingerprints
from engine.errors import AdapterInvalid
from engine.intake import Announced, Intake
from engine.models import resolve_model
from store.artifacts import ArtifactStore
from store.sources import AllowedSources, SourceNotAllowed
from store.uploads import UploadStore
from tests.corpus.broken import CANARY, Broken, Kind, Offer, meddling
from tests.corpus.catalogue import CORPUS
from tests.corpus.draft import good_draft
from tests.corpus.files import Canary

MAX_LORA_RANK = 32
DEADLINE_S = 20.0
ROUNDS = 20
"""Of what depends on the moment."""
CHECKED = [broken for broken in CORPUS if broken.kind not in (Kind.UPLOAD, Kind.ANSWERS)]
PROBED = [broken for broken in CORPUS if broken.kind is Kind.ANSWERS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model("tiny", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def allowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The only place that may be read."""
    folder = tmp_path_factory.mktemp("place") / "allowed"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def intake(root: Path, model: Path, allowed: Path) -> Iterator[Intake]:
    intake = Intake(
        ArtifactStore(root),
        UploadStore(root),
        AllowedSources([str(allowed)]),
        base_modules(model).shapes,
        fingerprints(model),
        max_lora_rank=MAX_LORA_RANK,
        dtype="float32",
    )
    yield intake


async def take_in(intake: Intake, adapter: str, offer: Offer) -> None:
    announced = Announced(offer.expected_sha256, offer.fingerprints)
    async with (
        asyncio.timeout(DEADLINE_S),
        intake.inspect("default", adapter, offer.source_uri, announced),
    ):
        pass


async def refusal(intake: Intake, broken: Broken, offer: Offer) -> tuple[str, ...]:
    """Findings of what must be refused."""
    try:
        await take_in(intake, broken.name, offer)
    except AdapterInvalid as invalid:
        assert broken.reason == "ADAPTER_INVALID"
        return invalid.findings
    except SourceNotAllowed as forbidden:
        assert broken.reason == "SOURCE_NOT_ALLOWED"
        return (str(forbidden),)
    raise AssertionError(f"{broken.name} passes")


def build(broken: Broken, allowed: Path, model: Path) -> Offer:
    folder = allowed / broken.name
    folder.mkdir()
    offer = broken.build(folder, model)
    assert isinstance(offer, Offer)
    return offer


@pytest.mark.parametrize("broken", CHECKED, ids=lambda broken: broken.name)
async def test_it_is_refused_with_its_own_finding(
    intake: Intake, root: Path, allowed: Path, model: Path, broken: Broken
) -> None:
    offer = build(broken, allowed, model)
    with meddling(offer):
        for _ in range(ROUNDS if offer.meddle else 1):
            found = await refusal(intake, broken, offer)
            assert any(re.search(broken.expected, finding) for finding in found), found
            assert len(found) == broken.findings
            assert all(finding.isprintable() for finding in found)
    assert not (allowed / broken.name / CANARY).exists(), "code of a pickle ran"
    assert not list((root / "staging").iterdir())
    assert not list((root / "adapters").iterdir())


@pytest.mark.parametrize("broken", PROBED, ids=lambda broken: broken.name)
async def test_what_only_an_engine_can_tell_passes_the_check(
    intake: Intake, allowed: Path, model: Path, broken: Broken
) -> None:
    await take_in(intake, broken.name, build(broken, allowed, model))


async def test_the_adapter_that_all_are_made_of_passes(
    intake: Intake, allowed: Path, model: Path
) -> None:
    folder = allowed / "good"
    folder.mkdir()
    good_draft(model).write(folder)
    await take_in(intake, "good", Offer(str(folder)))


def test_unpickled_the_canary_of_the_pickles_is_seen(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Canary(tmp_path)))
    assert (tmp_path / CANARY).exists()


def test_each_kind_has_its_cases_and_each_case_its_name() -> None:
    names = Counter(broken.name for broken in CORPUS)
    assert max(names.values()) == 1
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", name) for name in names)
    assert {broken.kind for broken in CORPUS} == set(Kind)
    assert len(CORPUS) >= 75
