"""What the server renders is what was trained on: ids and masks, on chat templates of three kinds.

The dataset is prepared by the process that prepares it for jobs, and rendered by vLLM's renderer,
set up as the engine's host does it. No engine runs.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import pytest_asyncio

from engine.core import EngineOptions
from engine.generation import Chat, ChatMessage
from engine.models import resolve_model
from engine.rendering import PromptRenderer
from engine.shard import Shard
from gateway.preview import Previews
from lora_gateway.v1 import training_pb2 as pb
from tests.trainer.prepared import digests, exchange, prepared, record, rows_of, write_lines
from tests.trainer.templates import CHATML, server_of, write_tokenizer
from trainer.preparation import Preparations, Prepared
from trainer.rows import IGNORED
from trainer.served import ServedModel
from trainer.spec import DataSpec

if TYPE_CHECKING:
    from vllm.renderers import BaseRenderer

TEMPLATES = (CHATML, "llama", "inst")
"""Of `tests/trainer/templates.py`. The last two begin a text with a token of their own, which a
server must not write twice; the last has no header for an answer."""
SUPPORT = Path(__file__).parents[2] / "examples" / "data" / "support.jsonl"
MAX_MODEL_LEN = 512
DATA = DataSpec().resolved(max_model_len=MAX_MODEL_LEN)
TALK = [
    ("system", "Be kind,\nand brief. "),
    ("user", " What is 2 and 2?"),
    ("assistant", "It is 4."),
    ("user", "é🙂\n\n"),
    ("user", "<b>bold</b>\tx"),
    ("assistant", "\u0301Done.  More?"),
    ("user", "No"),
    ("assistant", "Bye"),
]
LINES = [
    exchange("What is 2 and 2?", "It is 4."),
    exchange("", "[INST] x <|eot_id|> y"),
    exchange("x<|im_end|>", "a" * 90),
    {"messages": [{"role": role, "content": content} for role, content in TALK]},
]
NUMBERS = range(1, len(LINES) + 1)


@dataclass(frozen=True, slots=True)
class RenderingShard:
    """What a preview asks of a shard, which is to render."""

    renderer: PromptRenderer

    async def render(self, chat: Chat) -> Any:
        return await self.renderer.render(chat)


@dataclass(frozen=True, slots=True)
class Side:
    """Training and serving of one model."""

    model: Path
    preparations: Preparations
    prepared: Prepared
    shard: Shard


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("dataset") / "data.jsonl", LINES)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def sides(
    tmp_path_factory: pytest.TempPathFactory, dataset: Path
) -> AsyncIterator[dict[str, Side]]:
    """By template."""
    tiny = resolve_model("tiny", tmp_path_factory.mktemp("models"))
    renderers = []

    async def made(template: str) -> Side:
        model = tiny
        if template != CHATML:
            model = tmp_path_factory.mktemp(template) / "model"
            write_tokenizer(tiny, shutil.copytree(tiny, model), template)
        prompts, renderer = served(model)
        renderers.append(renderer)
        root = tmp_path_factory.mktemp("state")
        preparations = Preparations(
            root, trained_on(model), os.environ, python=sys.executable, digests=digests
        )
        prepared = await preparations.prepare(record(), dataset, DATA)
        return Side(model, preparations, prepared, cast(Shard, RenderingShard(prompts)))

    both = await asyncio.gather(*map(made, TEMPLATES))
    found = dict(zip(TEMPLATES, both, strict=True))
    yield found
    for side in found.values():
        await side.preparations.close()
    for renderer in renderers:
        renderer.shutdown()


def served(model: Path) -> tuple[PromptRenderer, BaseRenderer[Any]]:
    """A model's renderer as a shard has it (`VllmShard.attach`)."""
    from vllm.renderers import renderer_from_config

    config = EngineOptions(
        model_path=model,
        served_model_name="tiny",
        dtype="float32",
        quantization=None,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=2,
        gpu_memory_utilization=0.5,
        max_loras=1,
        max_cpu_loras=1,
        max_lora_rank=8,
    ).build_config()
    renderer = renderer_from_config(config)
    return PromptRenderer(renderer, config), renderer


def trained_on(model: Path) -> ServedModel:
    """A model as training is told of it."""
    return ServedModel(
        name="tiny",
        path=model,
        fingerprints={},  # each has a state folder of its own
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        max_lora_rank=8,
        target_modules=("q_proj",),
    )


async def previewed(
    training: Side, serving: Side, dataset: Path, line: int
) -> pb.PreviewTokensResponse:
    """What PreviewTokens answers."""
    previews = Previews(training.preparations, lambda: serving.shard)
    return await previews.preview(record(), dataset, line, DATA)


@pytest.mark.parametrize("template", TEMPLATES)
async def test_parity_masks_are_equal_in_training_in_previews_and_in_serving(
    sides: dict[str, Side], dataset: Path, template: str
) -> None:
    side = sides[template]
    side.prepared.require_valid()
    rows = rows_of(side.prepared.folder)
    assert [row["line"] for row in rows] == list(NUMBERS)
    for row, line in zip(rows, LINES, strict=True):
        shown = await previewed(side, side, dataset, row["line"])
        assert (shown.kept, shown.reason) == (True, "")
        assert [token.id for token in shown.tokens] == row["input_ids"]
        trained = [label != IGNORED for label in row["labels"]]
        assert [token.trained for token in shown.tokens] == trained
        assert (shown.matches_serving, shown.mismatch) == (True, "")
        # And without what previews compare: an answer begins where what is served ends.
        messages = [ChatMessage(each["role"], each["content"]) for each in line["messages"]]
        for number, message in enumerate(messages):
            if message.role == "assistant":
                asked = (await side.shard.render(Chat(messages[:number]))).token_ids
                assert row["input_ids"][: len(asked)] == list(asked)
                assert trained[len(asked) - 1 : len(asked) + 1] == [False, True]


async def test_parity_masks_that_differ_from_what_is_served_are_told(
    sides: dict[str, Side], dataset: Path
) -> None:
    for training, serving in itertools.permutations(TEMPLATES, 2):
        for line in NUMBERS:
            shown = await previewed(sides[training], sides[serving], dataset, line)
            assert shown.kept and not shown.matches_serving
            assert "in training and" in shown.mismatch and "they differ from" in shown.mismatch


@pytest.mark.parametrize("template", TEMPLATES)
async def test_pitfalls_all_rows_of_a_dataset_are_trained_on_as_they_are_served(
    sides: dict[str, Side], tmp_path: Path, template: str
) -> None:
    side = sides[template]
    report = prepared(side.model, SUPPORT, tmp_path / "rows")
    rows = rows_of(tmp_path / "rows")
    lines = [json.loads(line) for line in SUPPORT.read_text().splitlines()]
    assert len(rows) == len(lines) == report.rows >= 200
    bos = server_of(side.model).tokenizer.bos_token_id
    served_tokens = 0
    for row, line in zip(rows, lines, strict=True):
        turns = [ChatMessage(each["role"], each["content"]) for each in line["messages"]]
        asked = (await side.shard.render(Chat(turns[:-1]))).token_ids
        # What was answered is served again once the talk goes on.
        again = (await side.shard.render(Chat([*turns, ChatMessage("user", "?")]))).token_ids
        ids = row["input_ids"]
        assert ids == list(again[: len(ids)])
        assert ids[: len(asked)] == list(asked)
        assert [label != IGNORED for label in row["labels"][: len(asked)]] == [False] * len(asked)
        # Of the tiny model's own template, each turn begins with the token that begins a text.
        assert ids.count(bos) == (len(turns) if template == CHATML else 1) and ids[0] == bos
        served_tokens += len(ids)
    assert report.tokens.total == served_tokens
