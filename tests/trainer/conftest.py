from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.models import resolve_model
from tests.trainer.proxy import Proxy
from tests.trainer.templates import CHATML, Models, write_tokenizer
from tests.trainer.training_run import STARTED, Ended, start, write_rows
from trainer import recovery
from trainer.spec import Backend


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model."""
    return resolve_model("tiny", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def models(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Folders of tokenizers, each with a chat template of its kind."""
    made = {CHATML: tiny}

    def model(template: str) -> Path:
        if template not in made:
            folder = tmp_path_factory.mktemp(template)
            made[template] = write_tokenizer(tiny, folder, template)
        return made[template]

    return model


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 prepared rows."""
    return write_rows(tmp_path_factory.mktemp("prepared") / "rows")


HOLD_OUT_TWO = {"data": {"eval_fraction": 0.1}}


@pytest.fixture(scope="session")
def proxy() -> Iterator[Proxy]:
    """Between the two runs below and the network."""
    proxy = Proxy()
    yield proxy
    proxy.close()


def run_defaults(backend: Backend, tiny: Path, rows: Path, folder: Path, proxy: Proxy) -> Ended:
    environment = {**os.environ, **proxy.environment}
    running = start(folder, tiny, rows, HOLD_OUT_TWO, backend=backend, environment=environment)
    return running.wait()


@pytest.fixture(scope="session")
def peft_run(
    tiny: Path, rows: Path, proxy: Proxy, tmp_path_factory: pytest.TempPathFactory
) -> Ended:
    """A run by PEFT that has ended, of the defaults but for two rows that are held out."""
    return run_defaults(Backend.PEFT, tiny, rows, tmp_path_factory.mktemp("runs") / "peft", proxy)


@pytest.fixture(scope="session")
def unsloth_run(
    tiny: Path, rows: Path, proxy: Proxy, tmp_path_factory: pytest.TempPathFactory
) -> Ended:
    """The same by Unsloth."""
    folder = tmp_path_factory.mktemp("runs") / "unsloth"
    return run_defaults(Backend.UNSLOTH, tiny, rows, folder, proxy)


@pytest.fixture(autouse=True)
def lost_attempts_are_followed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "BACKOFF_S", 0.02)


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Ends training processes of a test that failed."""
    yield
    while STARTED:
        STARTED.pop().kill()
