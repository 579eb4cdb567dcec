"""Conversations in the words of a base's own chat template, and which of its tokens are the assistant's.

A template with ``{% generation %}`` says so itself. Of another one the assistant's turn number i is what
``turns[:i + 1]`` has beyond ``turns[:i]`` with the generation prompt: what a model is asked to write there. This is
checked on every conversation. Where a template rewrites earlier turns (Qwen3 removes thoughts from them), each turn of
the assistant is an example of its own, as it was when the model wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lrconvert.core.errors import DataError, DependencyError
from lrconvert.live.texts.layouts import LeftOut
from lrconvert.live.texts.tally import BAD, NO_TURN
from lrconvert.live.texts.text import Conversation, Turn

Runs = tuple[tuple[int, int], ...]  # of tokens or characters, from one up to another
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """The tokens of a conversation, and the runs of them that the assistant writes."""

    ids: tuple[int, ...]
    answers: Runs


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer."""

    tokenizer: Any

    def render(self, conversation: Conversation) -> list[Rendered]:
        """Return a conversation in tokens; several where each turn of the assistant is an example of its own. Raises
        LeftOut for one that the template refuses, E-DATA for a template that does not tell whose a token is."""
        if self._marks_answers:
            return [self._marked(conversation)]
        whole = self._text(conversation, len(conversation.turns))
        last = len(conversation.turns) - 1
        spans: list[tuple[int, int]] = []
        for n in _answered(conversation):
            start, end = self._span(conversation, n) if n < last else (self._opening(conversation, n), whole)
            if not (whole.startswith(end) and end.startswith(start)):
                return self._turn_by_turn(conversation)
            spans.append((len(start), len(end)))
        return [self._tokens(whole, spans)]

    @cached_property
    def _marks_answers(self) -> bool:
        """Say whether the template tells itself what the assistant writes. Raises E-DATA without a template."""
        named: Any = getattr(self.tokenizer, "chat_template", None)
        if not named:
            raise DataError(
                "conversations need a chat template, and the base's tokenizer has none",
                fix="give the base that the LoRA was trained on, put its chat_template.jinja into the base's folder, "
                "or write the data as `prompt` and `completion`",
            )
        template = self.tokenizer.get_chat_template() if isinstance(named, dict) else named
        return bool(_GENERATION.search(str(template))) and bool(getattr(self.tokenizer, "is_fast", False))

    def _applied(self, conversation: Conversation, turns: Sequence[Turn], **options: Any) -> Any:
        import jinja2

        tools: Any = list(conversation.tools) or None
        try:
            return self.tokenizer.apply_chat_template(list(turns), tools=tools, **conversation.options, **options)
        except ImportError as error:
            raise DependencyError(f"chat templates need jinja2: {error}", fix="pip install jinja2") from None
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise LeftOut(BAD, f"the chat template refuses it: {lines[0]:.100}") from None

    def _text(self, conversation: Conversation, count: int, opening: bool = False) -> str:
        """The first `count` turns; with the `opening` of the assistant's next one."""
        turns = conversation.turns[:count]
        text: str = self._applied(conversation, turns, tokenize=False, add_generation_prompt=opening)
        return text

    def _opening(self, conversation: Conversation, n: int) -> str:
        return self._text(conversation, n, opening=True)

    def _span(self, conversation: Conversation, n: int) -> tuple[str, str]:
        """The text before turn number `n`, and with it."""
        return self._opening(conversation, n), self._text(conversation, n + 1)

    def _marked(self, conversation: Conversation) -> Rendered:
        """A conversation by a template that marks what the assistant writes."""
        marked = self._applied(
            conversation, conversation.turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = tuple(marked["input_ids"]), list(marked["assistant_masks"])
        if conversation.first:
            before = common_start(ids, self._ids(self._opening(conversation, conversation.first)))
            mask[:before] = [0] * before
        if not any(mask):
            raise LeftOut(NO_TURN)
        return Rendered(ids, _runs(mask))

    def _turn_by_turn(self, conversation: Conversation) -> list[Rendered]:
        rendered = []
        for n in _answered(conversation):
            start, end = self._span(conversation, n)
            if not end.startswith(start):
                at = common_start(start, end)
                raise DataError(
                    f"the base's chat template begins the assistant's turn with {start[at:]!r:.60} and writes "
                    f"{end[at:]!r:.60} there: which tokens are the answer cannot be told ({conversation.place})",
                    fix="write the data as `prompt` and `completion`, or put {% generation %} into the template",
                )
            rendered.append(self._tokens(end, [(len(start), len(end))]))
        return rendered

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _tokens(self, text: str, spans: Sequence[tuple[int, int]]) -> Rendered:
        """A text in tokens, of which those that reach into a span are answers."""
        if getattr(self.tokenizer, "is_fast", False):
            coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            mask = [any(_reaches(offset, span) for span in spans) for offset in coded["offset_mapping"]]
            return Rendered(tuple(coded["input_ids"]), _runs(mask))
        ids = self._ids(text)
        ends = [tuple(common_start(ids, self._ids(text[:at])) for at in span) for span in spans]
        return Rendered(ids, tuple((start, end) for start, end in ends if start < end))


def _answered(conversation: Conversation) -> list[int]:
    """The numbers of the assistant's turns that count."""
    return [
        n for n in range(conversation.first, len(conversation.turns)) if conversation.turns[n]["role"] == "assistant"
    ]


def common_start(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Count the items, tokens or characters, that two sequences begin with."""
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


def _reaches(offset: tuple[int, int], span: tuple[int, int]) -> bool:
    (first, last), (start, end) = offset, span
    return first < end and (last > start or first == last == start)


def _runs(mask: Sequence[Any]) -> Runs:
    """The runs of what is true."""
    edges = [n for n in range(len(mask) + 1) if bool(n < len(mask) and mask[n]) != bool(n and mask[n - 1])]
    return tuple(zip(edges[::2], edges[1::2], strict=True))
