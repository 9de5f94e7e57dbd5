"""Tokenizers with chat templates of several kinds, made from the tiny model's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainer.chat_tokenizer import ChatTokenizer
from trainer.formats import Turn

Models = Callable[[str], Path]
"""The folder of a model with a template, by its name in TEMPLATES or CHATML."""

CHATML = "chatml"
"""The tiny model as it is; each turn begins with the token that begins a text."""

LLAMA = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system turns, please') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Writes more before the last answer than before those of earlier turns."""
JOINED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""That of the tiny model, for a tokenizer that has a token for two line ends."""
OPENED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
"""Begins an answer in a way that no answer of a chat begins."""
ENDED_LAST = (
    "{% for m in messages %}[INST] {{ m.content }}{% endfor %}"
    "{% if messages[-1].role == 'assistant' %}{{ eos_token }}{% endif %}"
)
"""Ends the last answer alone."""
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Has no token of its own."""
TWICE = "{{ bos_token }}" + LLAMA
"""Begins a text twice."""
HOLLOW = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}<|im_end|>"
    "{% endif %}{% endfor %}"
)
"""Leaves out the answers."""

TEMPLATES = {
    "llama": LLAMA,
    "gemma": GEMMA,
    "inst": INST,
    "thinking": THINKING,
    "joined": JOINED,
    "opened": OPENED,
    "ended_last": ENDED_LAST,
    "plain": PLAIN,
    "twice": TWICE,
    "hollow": HOLLOW,
    "none": None,
}
SPECIAL = (
    "<bos>",
    "<eos>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "[INST]",
    "[/INST]",
)


def write_tokenizer(tiny: Path, folder: Path, template: str) -> Path:
    """A folder with a tokenizer of one of TEMPLATES."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_special_tokens(
        {
            "additional_special_tokens": list(SPECIAL[2:]),
            "bos_token": "<bos>",
            "eos_token": "<eos>",
        }
    )
    tokenizer.add_tokens(["\n\n"])
    tokenizer.chat_template = TEMPLATES[template]
    tokenizer.save_pretrained(folder)
    return folder


class Server:
    """Renders prompts as the server does."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)

    def prompt(self, turns: Sequence[Turn] | Sequence[tuple[str, str]]) -> list[int]:
        """The ids of a chat up to where the assistant begins to answer."""
        ids: list[int] = self.tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns],
            add_generation_prompt=True,
            return_dict=False,
        )
        return ids

    def text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text


@functools.cache
def chat_of(model: Path) -> ChatTokenizer:
    return ChatTokenizer(model)


@functools.cache
def server_of(model: Path) -> Server:
    return Server(model)
