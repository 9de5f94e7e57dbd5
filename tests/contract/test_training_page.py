"""What docs/training.md says of defaults, states, reasons and messages is so."""

from __future__ import annotations

import ast
import enum
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.core
import typer.main
from google.protobuf.json_format import Parse
from pydantic import BaseModel

from gateway.cli import app
from lora_gateway import JobKeywords, TrainingClient
from lora_gateway.v1 import training_pb2 as pb
from store.job_records import JobState
from trainer.events import PublicationState
from trainer.report import LineIssueCode
from trainer.spec import (
    Backend,
    DatasetFormat,
    GateSpec,
    Hyperparameters,
    JobSpec,
    Precision,
    Quantization,
)

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text()
README = (ROOT / "README.md").read_text()

OF_THE_DEVICE = {
    "hyperparameters.fit_micro_batch",
    "hyperparameters.gradient_checkpointing",
}
"""The text below the table tells these; they have no one default."""
NOT_DEFAULTED = {"base_model", "backend", "dataset", "adapter", "publish", "init_from"}


def tables() -> Iterator[list[list[str]]]:
    """Each table of the page, as cells of its rows with the header first."""
    for block in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        lines = [line for line in block.splitlines() if not line.startswith("|---")]
        yield [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def table(first: str) -> list[list[str]]:
    """Rows of the table whose first column has that title."""
    found = [rows[1:] for rows in tables() if rows[0][0] == first]
    assert len(found) == 1, first
    return found[0]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def shown(value: object) -> str:
    """A default as the page writes it."""
    match value:
        case enum.Enum():
            return value.name
        case bool():
            return str(value).lower()
        case float():
            return f"{value:f}".rstrip("0").rstrip(".")
        case tuple():
            return ", ".join(map(str, value))
        case _:
            return str(value)


def defaults() -> dict[str, str]:
    """What a job that says nothing gets on a CPU: path of the field, value as it is shown."""
    asked = JobSpec(dataset="d", adapter="a")
    resolved = asked.resolved(
        base_model="m",
        max_model_len=2048,
        served_dtype="bfloat16",
        backend=Backend.PEFT,
        on_gpu=False,
    )
    found: dict[str, object] = {}
    for name, value in resolved:
        if name in NOT_DEFAULTED:
            continue
        if isinstance(value, BaseModel):
            found |= {f"{name}.{field}": inner for field, inner in value if inner is not None}
        else:
            found[name] = value
    for name in ("cancel_grace", "checkpoint_interval"):
        found[name] = f"{found.pop(f'{name}_s'):g} s"
    found.pop("data.eval_dataset")
    return {name: shown(value) for name, value in found.items() if name not in OF_THE_DEVICE}


def test_the_recipe_is_documented_with_its_defaults() -> None:
    documented = {field.strip("`"): default for field, default, _ in table("field")}
    assert documented == defaults()


@pytest.mark.parametrize(
    ("row", "quantization", "precision", "served_dtype"),
    [
        (0, Quantization.NF4, Precision.BFLOAT16, "bfloat16"),
        (0, Quantization.NF4, Precision.FLOAT32, "float32"),
        (1, Quantization.NONE, Precision.BFLOAT16, "bfloat16"),
        (1, Quantization.NONE, Precision.FLOAT32, "bfloat16"),
        (2, Quantization.NONE, Precision.FLOAT32, "float32"),
    ],
)
def test_the_gates_tolerance_is_documented(
    row: int, quantization: Quantization, precision: Precision, served_dtype: str
) -> None:
    trained = Hyperparameters(quantization=quantization, precision=precision)
    limits = GateSpec().resolved(trained, served_dtype)
    _, mean, worst = table("trained and served")[row]
    assert mean == f"{limits.max_logprob_delta_mean:g}"
    assert worst == (
        "none" if limits.max_logprob_delta is None else f"{limits.max_logprob_delta:g}"
    )
    assert limits.max_eval_loss_ratio == 1 and limits.max_eval_loss is None
    assert f"`min_effect_ratio` {limits.min_effect_ratio:g}" in PAGE


def test_every_state_and_code_is_explained() -> None:
    assert {row[0] for row in table("state")} == {state.name for state in JobState}
    assert {row[0] for row in table("publication")} == {state.name for state in PublicationState}
    codes = {code for row in table("code of a line") for code in re.findall(r"`(\w+)`", row[0])}
    assert codes == {code.name for code in LineIssueCode}
    assert {row[0] for row in table("format")} == {format.value for format in DatasetFormat}


def test_the_job_that_is_shown_is_one() -> None:
    (text,) = blocks("json")
    job = Parse(text, pb.CreateJobRequest())
    assert job.spec.publish.gate.max_eval_loss == 1.5


def test_lines_that_are_shown_parse() -> None:
    for name, line, *_ in table("format"):
        example = re.findall(r"`(\{.*?\})`", line)[0]
        assert ast.literal_eval(example), name


def test_the_program_that_is_shown_calls_what_there_is() -> None:
    (text,) = blocks("python")
    tree = ast.parse(text)
    called = {
        node.func.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Attribute)
        and node.func.value.attr == "training"
    }
    assert len(called) >= 5
    assert all(hasattr(TrainingClient, name) for name in called)
    keywords = {
        keyword.arg
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "create_job"
        for keyword in node.keywords
    }
    assert {"dataset", "adapter"} <= keywords <= JobKeywords.__annotations__.keys()


def commands() -> Iterator[list[str]]:
    """Each `gateway` command in a shell block of this page and of the README."""
    for text in (PAGE, README):
        for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            for line in re.findall(r"(?:^|/|\| )gateway (.*)", block, re.MULTILINE):
                yield shlex.split(line, comments=True)


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_commands_that_are_shown_are_ones(words: list[str]) -> None:
    command = typer.main.get_command(app)
    while isinstance(command, typer.core.TyperGroup):
        command = command.commands[words[0]]
        words = words[1:]
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options


def test_there_are_commands() -> None:
    assert {"train", "jobs", "datasets", "adapters"} <= {words[0] for words in commands()}
