"""From turns to token ids, and to the tokens of them that are trained on.

Each assistant turn is trained after exactly the ids that the server would render before it, and
up to the token that ends it:

    text     <|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\nhello<|im_end|>\\n
             '--- what the server renders, as its prompt ----------''- trained ---'

So the template is asked what it renders before each of them, and the chat is refused where that
is not how the whole chat begins. It works for any template, and knows none.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

from trainer.chat_tokenizer import ChatTokenizer
from trainer.formats import ASSISTANT, USER, BadLine, Turn
from trainer.report import LineIssueCode
from trainer.rows import IGNORED
from trainer.spec import LossMask

PROBE = "PROBE"
"""A word that no template holds."""
MAX_TAILS, MAX_TAIL_CHARACTERS = 1024, 256
"""Ends of prompts whose ids are remembered: most templates write the same each time."""


class Prompt(NamedTuple):
    """What stands before an assistant turn that is trained."""

    turns: int
    """The first so many of the row's."""
    tokens: int
    """The first so many of the row's."""


@dataclass(frozen=True, slots=True)
class MaskedRow:
    """One chat as the trainer sees it."""

    turns: Sequence[Turn]
    text: str
    ids: list[int]
    labels: list[int]
    """The id where it is trained on, else IGNORED; as many as `ids`."""
    prompts: Sequence[Prompt]

    @property
    def trained(self) -> int:
        """How many tokens the loss counts. The first follows nothing, so it is never one."""
        return len(self.labels) - 1 - self.labels[1:].count(IGNORED) if self.labels else 0


@dataclass(frozen=True, slots=True)
class Draft:
    """One chat, rendered and tokenized."""

    turns: Sequence[Turn]
    text: str
    encoding: Any
    """Of the text; see `ChatTokenizer.encode`."""
    left_out: int = 0
    """Turns of the line that it does not have; a system turn is not among them."""

    @property
    def tokens(self) -> int:
        return len(self.encoding)


class _Span(NamedTuple):
    """Characters of an assistant turn, with what ends it."""

    turn: int
    begin: int
    end: int


class Masks:
    """Masks for one model. Not for several threads at once."""

    def __init__(self, chat: ChatTokenizer, loss_mask: LossMask) -> None:
        self._chat = chat
        self._loss_mask = loss_mask
        self._tails: dict[str, list[int]] = {}
        self._ending, self._header, self._bos_is_marker = self._probe()

    def draft(self, turns: Sequence[Turn], *, max_tokens: int, left_out: int = 0) -> Draft | None:
        """The chat as text and ids; None if it has more tokens than that. Raises BadLine."""
        self._check_contents(turns)
        text = self._chat.render(turns, prompt=False)
        if len(text) > max_tokens * self._chat.max_token_characters:
            return None  # told without the work of it
        draft = Draft(turns, text, self._chat.encode(text), left_out)
        return draft if draft.tokens <= max_tokens else None

    def mask(self, draft: Draft) -> MaskedRow:
        """The row of a chat. Raises BadLine if it cannot be trained as it would be served."""
        ids: list[int] = draft.encoding.ids
        self._check_begin(ids)
        # Before the first of all turns stands nothing, and no server answers to that.
        answers = [i for i, turn in enumerate(draft.turns) if i and turn.role == ASSISTANT]
        if self._loss_mask is LossMask.LAST_ASSISTANT:
            answers = answers[-1:]
        spans = [self._span(draft, index) for index in answers]
        anchors = self._anchors(draft) if spans else []
        bounds = list[tuple[int, int]]()
        for span in spans:
            at, prompt_end = self._prompt_end(draft.text, anchors, span.begin)
            begin = at + len(prompt_end)
            if ids[at:begin] == prompt_end:
                bounds.append((begin, _tokens_before(draft.encoding, span.end)))
                continue
            answer = self._chat.encode(draft.text[span.begin :])
            apart = ids[:at] + prompt_end + answer.ids
            if span is not spans[-1] or self._chat.decode(apart) != self._chat.decode(ids):
                raise _unstable(draft, span.turn, "its first token is joined with the one before")
            ids = apart
            bounds.append((begin, begin + _tokens_before(answer, span.end - span.begin)))
        labels = [IGNORED] * len(ids)
        for begin, end in bounds:
            labels[begin:end] = ids[begin:end]
        if self._loss_mask is LossMask.ALL:
            labels = list(ids)
        prompts = [Prompt(span.turn, begin) for span, (begin, _) in zip(spans, bounds, strict=True)]
        return MaskedRow(draft.turns, draft.text, ids, labels, prompts)

    # --- where a turn begins and ends ---------------------------------------

    def _span(self, draft: Draft, index: int) -> _Span:
        text, turns = draft.text, draft.turns
        prompt = self._chat.render(turns[:index], prompt=True)
        if not text.startswith(prompt):
            raise _unstable(draft, index, "what stands before it is rendered differently")
        begin, content = len(prompt), turns[index].content
        if index == len(turns) - 1:
            return _Span(index, begin, begin + _answer_length(text[begin:], content))
        if self._ending:
            for answer in (content, content.strip()):
                if text.startswith(answer + self._ending, begin):
                    return _Span(index, begin, begin + len(answer) + len(self._ending))
        # A template with more to it: ask it for the chat up to this turn.
        until = self._chat.render(turns[: index + 1], prompt=False)
        if text.startswith(until):
            length = _answer_length(until[begin:], content)
            return _Span(index, begin, begin + length)
        answer = content.strip()
        _, found, after = until[begin:].rpartition(answer)
        end = answer + after.rstrip()
        if not found or end == answer or not text.startswith(end, begin):
            raise _unstable(draft, index, "it is rendered differently")
        return _Span(index, begin, begin + len(end))

    def _anchors(self, draft: Draft) -> list[tuple[int, int]]:
        """Index and first character of the tokens that tokenizing can begin at."""
        known = self._chat.anchors
        return [
            (at, draft.encoding.token_to_chars(at)[0])
            for at, token_id in enumerate(draft.encoding.ids)
            if token_id in known
        ]

    def _prompt_end(
        self, text: str, anchors: Sequence[tuple[int, int]], end: int
    ) -> tuple[int, list[int]]:
        """The last ids of the prompt that ends at a character, as the server has them; and the
        index of the first of these. The ids before them are those of the whole chat."""
        nearest = bisect_left(anchors, end, key=itemgetter(1)) - 1
        at, begin = anchors[nearest] if nearest >= 0 else (0, 0)
        tail = text[begin:end]
        found = self._tails.get(tail)
        if found is None:
            found = self._chat.encode(tail).ids
            if len(tail) <= MAX_TAIL_CHARACTERS and len(self._tails) < MAX_TAILS:
                self._tails[tail] = found
        return at, found

    # --- what a dataset brings along ----------------------------------------

    def _check_contents(self, turns: Sequence[Turn]) -> None:
        """Refuse texts that a template was applied to already: it would be applied twice."""
        for index, turn in enumerate(turns):
            if self._chat.bos and self._chat.bos in turn.content:
                raise BadLine(
                    LineIssueCode.DOUBLE_BOS,
                    f"messages[{index}].content",
                    f"holds {self._chat.bos}, which the model's chat template writes: leave it "
                    "out, and give the text as it was before a template",
                )
            if self._header and self._header in turn.content:
                raise BadLine(
                    LineIssueCode.TEMPLATE_REFUSED,
                    f"messages[{index}].content",
                    f"holds {self._header!a}, with which the model's chat template begins an "
                    "answer: give the text as it was before a template, which is applied here",
                )

    def _check_begin(self, ids: Sequence[int]) -> None:
        bos = self._chat.bos_id
        if bos is None:
            return
        twice = list(ids[:2]) == [bos, bos]
        if twice or (not self._bos_is_marker and ids.count(bos) > 1):
            raise BadLine(
                LineIssueCode.DOUBLE_BOS,
                "",
                f"the model's chat template writes {self._chat.bos} more than once: tell the "
                "operator that the template is wrong",
            )

    def _probe(self) -> tuple[str, str, bool]:
        """What ends an answer, what begins one, and whether each turn begins with the token that
        begins a text. Empty where the template does not tell."""
        chat = [Turn(USER, PROBE), Turn(ASSISTANT, PROBE)]
        try:
            text = self._chat.render(chat, prompt=False)
            asked = self._chat.render(chat[:1], prompt=True)
            said = self._chat.render(chat[:1], prompt=False)
            ids = self._chat.encode(self._chat.render(chat * 2, prompt=False)).ids
        except BadLine:
            return "", "", False
        ending = text.rpartition(PROBE)[2].rstrip()
        header = asked.removeprefix(said).strip() if asked.startswith(said) else ""
        marks = self._chat.anchors.intersection(self._chat.encode(header).ids)
        bos = self._chat.bos_id
        return ending, header if marks else "", bos is not None and ids.count(bos) > 1


def _answer_length(segment: str, content: str) -> int:
    """Of what a template makes of an answer, the characters up to what ends it.

    White space after that belongs to the next turn. Where nothing else ends an answer, it is what
    ends it.
    """
    told = segment.rstrip()
    return len(segment) if told.strip() == content.strip() else len(told)


def _tokens_before(encoding: Any, character: int) -> int:
    """How many tokens begin before a character."""
    if character <= 0:
        return 0
    last = encoding.char_to_token(character - 1)
    if last is not None:
        return int(last) + 1
    return sum(begin < character for begin, _ in encoding.offsets)


def _unstable(draft: Draft, index: int, why: str) -> BadLine:
    return BadLine(
        LineIssueCode.MASK_UNSTABLE,
        f"messages[{index + draft.left_out}]",
        f"the server would not render it so, because {why} once the rest of the chat follows: "
        "train on the last answer alone (loss_mask LAST_ASSISTANT), or give each answer a line of "
        "its own",
    )
