"""What is trained on is each answer with the token that ends it, after the server's own ids."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.trainer.templates import CHATML, Models, Server, chat_of, server_of
from trainer.chat_tokenizer import ChatTokenizer, TokenizerUnusable
from trainer.formats import BadLine, Turn
from trainer.masks import MaskedRow, Masks
from trainer.rows import IGNORED
from trainer.spec import LossMask

Chats = dict[str, tuple[Server, Masks]]

EXCHANGE = [Turn("user", "2 and 2?"), Turn("assistant", "It is 4.")]
TALK = [*EXCHANGE, Turn("user", "Sure?"), Turn("assistant", "Yes.")]


def row_of(model: Path, turns: list[Turn], loss_mask: LossMask = LossMask.ASSISTANT) -> MaskedRow:
    masks = Masks(chat_of(model), loss_mask)
    draft = masks.draft(turns, max_tokens=2048)
    assert draft is not None
    return masks.mask(draft)


def refused(model: Path, turns: list[Turn], loss_mask: LossMask = LossMask.ASSISTANT) -> BadLine:
    with pytest.raises(BadLine) as caught:
        row_of(model, turns, loss_mask)
    return caught.value


def trained_texts(model: Path, row: MaskedRow) -> list[str]:
    """The texts of the tokens that are trained on, each run of them."""
    server, texts, run = server_of(model), list[str](), list[int]()
    for token_id, label in zip([*row.ids, 0], [*row.labels, IGNORED], strict=True):
        if label != IGNORED:
            assert label == token_id
            run.append(token_id)
        elif run:
            texts.append(server.text(run))
            run = []
    return texts


# --- what is trained on -----------------------------------------------------


@pytest.mark.parametrize(
    ("template", "trained"),
    [
        (CHATML, ["It is 4.<|im_end|>", "Yes.<|im_end|>"]),
        ("llama", ["It is 4.<|eot_id|>", "Yes.<|eot_id|>"]),
        ("gemma", ["It is 4.<end_of_turn>", "Yes.<end_of_turn>"]),
        ("inst", [" It is 4.<eos>", " Yes.<eos>"]),
        ("thinking", ["It is 4.<|im_end|>", "<think>\n\n</think>\n\nYes.<|im_end|>"]),
    ],
)
def test_each_answer_is_trained_up_to_the_token_that_ends_it(
    models: Models, template: str, trained: list[str]
) -> None:
    row = row_of(models(template), TALK)
    assert trained_texts(models(template), row) == trained
    assert row.trained == sum(label != IGNORED for label in row.labels)


@pytest.mark.parametrize("template", [CHATML, "llama", "gemma", "inst", "thinking", "ended_last"])
def test_the_last_answer_alone_is_trained_if_asked_for(models: Models, template: str) -> None:
    row = row_of(models(template), TALK, LossMask.LAST_ASSISTANT)
    [trained] = trained_texts(models(template), row)
    assert "Yes." in trained and "4" not in trained
    [prompt] = row.prompts
    assert prompt.turns == 3


def test_all_tokens_are_trained_if_asked_for_and_the_first_is_not_counted(models: Models) -> None:
    row = row_of(models("llama"), TALK, LossMask.ALL)
    assert row.labels == row.ids
    assert row.trained == len(row.ids) - 1
    assert [prompt.turns for prompt in row.prompts] == [1, 3]


def test_the_answer_of_a_template_without_tokens_of_its_own_ends_with_its_line(
    models: Models,
) -> None:
    row = row_of(models("plain"), EXCHANGE)
    assert trained_texts(models("plain"), row) == ["It is 4.\n"]


def test_white_space_of_an_answer_is_trained_where_the_template_keeps_it(models: Models) -> None:
    turns = [Turn("user", "a"), Turn("assistant", "  b \n")]
    assert trained_texts(models(CHATML), row_of(models(CHATML), turns)) == ["  b \n<|im_end|>"]
    assert trained_texts(models("llama"), row_of(models("llama"), turns)) == ["b<|eot_id|>"]


def test_a_greeting_is_context_and_not_trained(models: Models) -> None:
    row = row_of(models(CHATML), [Turn("assistant", "Hello!"), *EXCHANGE])
    assert trained_texts(models(CHATML), row) == ["It is 4.<|im_end|>"]


def test_an_answer_that_the_template_leaves_out_trains_nothing(models: Models) -> None:
    assert row_of(models("hollow"), EXCHANGE).trained == 0


def test_a_chat_of_many_turns_is_masked_as_one_of_few(models: Models) -> None:
    row = row_of(models("llama"), TALK * 20)
    assert trained_texts(models("llama"), row) == ["It is 4.<|eot_id|>", "Yes.<|eot_id|>"] * 20


# --- after the server's own ids ---------------------------------------------

AWKWARD = [
    "\n\nx",
    "x\n\n",
    " x ",
    "\u0301x",
    "é🙂",
    "x<|im_end|>",
    "<|eot_id|>",
    "[INST]",
    "a" * 90,
]


@pytest.mark.parametrize(
    "template", [CHATML, "llama", "gemma", "inst", "thinking", "joined", "plain"]
)
@pytest.mark.parametrize("content", AWKWARD)
def test_parity_masks_train_an_answer_after_what_the_server_renders(
    models: Models, template: str, content: str
) -> None:
    model = models(template)
    turns = [Turn("user", content), Turn("assistant", content)]
    row = row_of(model, turns)
    [prompt] = row.prompts
    assert row.ids[: prompt.tokens] == server_of(model).prompt(turns[:1])
    assert row.labels[: prompt.tokens] == [IGNORED] * prompt.tokens
    assert content.strip() in server_of(model).text(row.ids[prompt.tokens :])


contents = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("\n \tab"), min_size=1, max_size=8
).filter(str.strip)


@pytest.mark.parametrize("template", [CHATML, "llama", "gemma", "inst", "thinking", "joined"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts=st.lists(contents, min_size=2, max_size=6))
def test_parity_masks_hold_for_any_chat_or_it_is_refused(
    chats: Chats, template: str, texts: list[str]
) -> None:
    server, masks = chats[template]
    texts = texts[: len(texts) // 2 * 2]
    turns = [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    draft = masks.draft(turns, max_tokens=2048)
    assert draft is not None
    try:
        row = masks.mask(draft)
    except BadLine as error:
        # Only a first character that is joined with what stands before it.
        assert error.code.name == "MASK_UNSTABLE"
        assert template in ("thinking", "joined") and any(text[0] == "\n" for text in texts[1:-1:2])
        return
    assert [prompt.turns for prompt in row.prompts] == list(range(1, len(turns), 2))
    for prompt in row.prompts:
        assert row.ids[: prompt.tokens] == server.prompt(turns[: prompt.turns])
        assert row.labels[prompt.tokens - 1] == IGNORED
        assert row.labels[prompt.tokens] == row.ids[prompt.tokens]


@pytest.fixture(scope="module")
def chats(models: Models) -> Chats:
    return {
        template: (
            server_of(models(template)),
            Masks(chat_of(models(template)), LossMask.ASSISTANT),
        )
        for template in (CHATML, "llama", "gemma", "inst", "thinking", "joined")
    }


# --- what is refused --------------------------------------------------------


def test_a_template_that_refuses_a_chat_is_quoted(models: Models) -> None:
    error = refused(models("gemma"), [Turn("system", "be brief"), *EXCHANGE])
    assert (error.code.name, error.field) == ("TEMPLATE_REFUSED", "")
    assert "no system turns, please" in error.message
    assert refused(models(CHATML), [Turn("tool", "4"), *EXCHANGE]).code.name == "TEMPLATE_REFUSED"


@pytest.mark.parametrize(
    ("template", "turns", "field", "why"),
    [
        ("opened", EXCHANGE, "messages[1]", "what stands before it is rendered differently"),
        ("ended_last", TALK, "messages[1]", "it is rendered differently"),
        ("plain", TALK, "messages[1]", "joined with the one before"),
        (
            "joined",
            [Turn("user", "a"), Turn("assistant", "\nb"), *TALK],
            "messages[1]",
            "joined with the one before",
        ),
    ],
)
def test_a_turn_that_is_served_otherwise_than_trained_is_refused(
    models: Models, template: str, turns: list[Turn], field: str, why: str
) -> None:
    error = refused(models(template), turns)
    assert (error.code.name, error.field) == ("MASK_UNSTABLE", field)
    assert why in error.message and "LAST_ASSISTANT" in error.message


def test_an_answer_that_begins_with_a_line_end_is_trained_alone_or_last(models: Models) -> None:
    answer = Turn("assistant", "\nb")
    model = models("joined")
    for turns in ([*EXCHANGE[:1], answer], [*TALK[:3], answer]):
        row = row_of(model, turns)
        assert trained_texts(model, row)[-1] == "\nb<|im_end|>"
        assert row.ids != server_of(model).tokenizer(row.text)["input_ids"]
    assert refused(model, [*EXCHANGE[:1], answer, *EXCHANGE]).code.name == "MASK_UNSTABLE"
    last = row_of(model, [*EXCHANGE[:1], answer, *EXCHANGE], LossMask.LAST_ASSISTANT)
    assert trained_texts(model, last) == ["It is 4.<|im_end|>"]


def test_a_model_without_a_chat_template_cannot_be_trained(models: Models) -> None:
    with pytest.raises(TokenizerUnusable, match="no chat template"):
        ChatTokenizer(models("none"))
