"""What is taken in is a private copy, looked at once, and gone unless it was kept."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from pathlib import Path

import pytest

from engine import intake as module
from engine.errors import AdapterInvalid
from engine.intake import Announced, Inspected, Intake
from store.artifacts import WEIGHTS_FILE, ArtifactStore, StagedArtifact
from store.sources import SourceNotAllowed
from store.uploads import UploadPlan, UploadStore
from tests.engine.drafts import Draft, Spoil, configure
from tests.engine.library import PRINTS, TENANT, make_intake

SOON_S = 30.0
TOO_WIDE = configure(r=4)
WITHOUT_TEMPLATE = dataclasses.replace(PRINTS, chat_template_sha256="")


class Place:
    """An intake, its store, and the one folder that callers may read."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.allowed = root / "allowed"
        self.allowed.mkdir()
        self.store = ArtifactStore(root / "state")
        self.uploads = UploadStore(root / "state")
        self.intake: Intake = make_intake(
            self.store, self.uploads, self.allowed, served=WITHOUT_TEMPLATE
        )

    def source(self, spoil: Spoil = lambda draft: None, folder: str = "allowed/one") -> str:
        path = self.root / folder
        path.mkdir()
        draft = Draft()
        spoil(draft)
        draft.write(path)
        return str(path)

    async def take_in(self, source_uri: str, announced: Announced | None = None) -> Inspected:
        """What was learned; the copy is gone."""
        async with self.intake.inspect(TENANT, "sql", source_uri, announced or Announced()) as seen:
            return seen

    async def refusal(self, source_uri: str, announced: Announced | None = None) -> tuple[str, ...]:
        with pytest.raises(AdapterInvalid) as caught:
            await self.take_in(source_uri, announced)
        assert caught.value.adapter == "sql"
        assert not self.staged
        return caught.value.findings

    @property
    def staged(self) -> list[Path]:
        return list((self.root / "state" / "staging").iterdir())


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


async def test_only_the_copy_is_looked_at(place: Place) -> None:
    source = Path(place.source())
    async with place.intake.inspect(TENANT, "sql", str(source), Announced()) as inspected:
        copy = inspected.staged.path
        assert copy.parent == place.root / "state" / "staging"
        (source / WEIGHTS_FILE).write_bytes(b"something else by now")
        artifact = inspected.staged.commit()
    assert inspected.facts.rank == 8
    assert not place.staged and artifact.digest == inspected.staged.digest
    assert place.store.verify(artifact.digest).weights_sha256 == inspected.staged.weights_sha256


async def test_what_was_not_kept_is_dropped(place: Place) -> None:
    source = place.source()
    await place.take_in(source)
    assert not place.staged
    with pytest.raises(ZeroDivisionError):
        async with place.intake.inspect(TENANT, "sql", source, Announced()):
            raise ZeroDivisionError
    assert not place.staged
    assert not list((place.root / "state" / "adapters").iterdir())


async def test_a_place_that_callers_may_not_name_is_not_touched(place: Place) -> None:
    outside = place.source(folder="outside")
    with pytest.raises(SourceNotAllowed):
        place.intake.check_source("sql", outside)
    with pytest.raises(SourceNotAllowed):
        await place.take_in(outside)


async def test_the_operator_may_name_any_folder(place: Place) -> None:
    outside = Path(place.source(folder="outside"))
    async with place.intake.inspect_folder("sql", outside) as inspected:
        assert inspected.facts.target_modules == ("q_proj", "v_proj")
    assert not place.staged


def test_the_text_of_a_source_is_checked_without_a_look_at_the_place(place: Place) -> None:
    place.intake.check_source("sql", str(place.allowed / "nothing-there"))
    with pytest.raises(AdapterInvalid, match="neither an absolute path nor a URL") as caught:
        place.intake.check_source("sql", "one")
    assert caught.value.adapter == "sql"


async def test_a_source_that_is_not_there_is_a_finding(place: Place) -> None:
    (finding,) = await place.refusal(str(place.allowed / "nothing-there"))
    assert "does not exist; name the adapter's folder" in finding


async def test_an_upload_is_taken_in_of_its_own_tenant_once_it_is_complete(place: Place) -> None:
    draft = Draft()
    weights = draft.encoded_weights()
    sha256 = (await place.take_in(place.source())).staged.weights_sha256
    plan = UploadPlan("night-1", "sql", draft.encoded_config(), len(weights), sha256)
    (finding,) = await place.refusal("upload:night-1")
    assert "there is no upload 'night-1'" in finding
    with place.uploads.open(TENANT, plan) as upload:
        upload.write(0, weights[:10])
    (finding,) = await place.refusal("upload:night-1")
    assert "ends at offset 10" in finding
    with place.uploads.open(TENANT, plan) as upload:
        upload.write(10, weights[10:])
        upload.finish()
    assert (await place.take_in("upload:night-1")).staged.weights_sha256 == sha256
    with pytest.raises(AdapterInvalid, match="there is no upload"):
        async with place.intake.inspect("other", "sql", "upload:night-1", Announced()):
            pass


async def test_all_that_is_wrong_is_told_at_once(place: Place) -> None:
    announced = Announced("0" * 64, {"config_sha256": "1" * 64, "chat_template_sha256": "2" * 64})
    weights, config, template, *rest = await place.refusal(place.source(TOO_WIDE), announced)
    assert "expected_sha256 is 000" in weights
    assert config.startswith(f"fingerprints.config_sha256 is {'1' * 64}, and the served model's")
    assert "the served model's is none" in template
    assert any("other shapes" in finding for finding in rest)


async def test_what_was_announced_alone_is_enough_to_refuse(place: Place) -> None:
    (finding,) = await place.refusal(place.source(), Announced("0" * 64))
    assert "it is another file, or damaged" in finding


async def test_what_was_announced_rightly_or_not_at_all_passes(place: Place) -> None:
    source = place.source()
    sha256 = (await place.take_in(source)).staged.weights_sha256
    prints = {"config_sha256": PRINTS.config_sha256, "tokenizer_sha256": ""}
    await place.take_in(source, Announced(sha256, prints))


class Gate:
    """Holds threads up in the copying, and counts them."""

    def __init__(self, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inside = 0
        self.most_inside = 0
        self.passed = 0
        self._open = threading.Event()
        self._lock = threading.Lock()
        self._stage = store.stage
        monkeypatch.setattr(store, "stage", self._pass)

    def open(self) -> None:
        self._open.set()

    def _pass(self, source: Path) -> StagedArtifact:
        with self._lock:
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
        assert self._open.wait(SOON_S)
        staged = self._stage(source)
        with self._lock:
            self.inside -= 1
            self.passed += 1
        return staged


async def test_few_are_copied_at_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    source, gate = place.source(), Gate(place.store, monkeypatch)
    several = [asyncio.create_task(place.take_in(source)) for _ in range(5)]
    async with asyncio.timeout(SOON_S):
        while gate.inside < module.MAX_AT_ONCE:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)  # in which one more would have come
        gate.open()
        await asyncio.gather(*several)
    assert gate.most_inside == module.MAX_AT_ONCE
    assert gate.passed == 5


async def test_who_leaves_while_it_is_copied_leaves_no_copy_and_frees_the_place_after_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, gate = place.source(), Gate(place.store, monkeypatch)
    async with asyncio.timeout(SOON_S):
        for _ in range(2):
            several = [asyncio.create_task(place.take_in(source)) for _ in range(3)]
            while gate.inside < module.MAX_AT_ONCE:
                await asyncio.sleep(0.001)
            for task in several:
                task.cancel()
            await asyncio.gather(*several, return_exceptions=True)
        last = asyncio.create_task(place.take_in(source))
        await asyncio.sleep(0.02)
        assert gate.inside == module.MAX_AT_ONCE, "threads go on, and count until they end"
        gate.open()
        await last
        while place.staged:
            await asyncio.sleep(0.001)


async def test_our_own_disk_is_not_the_adapters_fault(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path) -> StagedArtifact:
        raise OSError(28, "No space left on device")

    source = place.source()
    monkeypatch.setattr(place.store, "stage", fail)
    for _ in range(module.MAX_AT_ONCE + 1):  # a failure frees its place, too
        async with asyncio.timeout(SOON_S):
            with pytest.raises(OSError, match="No space left"):
                await place.take_in(source)
